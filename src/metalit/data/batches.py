"""Batches of rows: the data of supervised training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from metalit.data.base import Split, task_keys
from metalit.data.rows import RowSource
from metalit.data.splits import Partition, TableDataModule
from metalit.data.stream import EvalStream, TrainStream, take
from metalit.errors import InputError
from metalit.keys import permutation
from metalit.problem import Points


class BatchDataModule(TableDataModule):
    """Batches of training rows; each row comes once in an epoch, in an order of that epoch's own.

    Row number g of training, g = step · batch_size + i counted over all ranks, is row ``g % rows`` of the permutation
    of epoch ``g // rows``: a batch may straddle epochs, and one that is larger than the table holds rows repeatedly.
    Validation and test are their whole split, in batches, in turn on the ranks.

    Args:
        rows: where the rows come from.
        val, test, noise_columns, corrupt, split_seed: see :class:`~metalit.data.splits.Partition`.
        seed: the seed of the order of rows.
        batch_size: the rows of one outer step, over all ranks; in validation and test, of one batch on each rank.

    Raises:
        InputError: from :meth:`setup`: rows that cannot be used or split; a ``batch_size`` that the ranks do not
            divide; a validation or test split of fewer rows than ranks.
    """

    def __init__(
        self,
        rows: RowSource,
        val: float = 0.25,
        test: float = 0.25,
        noise_columns: int = 0,
        corrupt: float = 0.0,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        partition = Partition(val, test, noise_columns, corrupt, split_seed)
        super().__init__(rows, partition, batch_size, "data.batch_size", seed)

    def prepare(self) -> None:
        """Read the rows, split them, and share out what is evaluated."""
        super().prepare()
        ranks = self.ranks.number
        for split in ("val", "test"):
            rows = len(self.points(split).x)
            if rows < ranks:
                raise InputError(
                    f"data.{split}={getattr(self.partition, split)} leaves some of {ranks} processes without a row: "
                    f"there are {rows}; hold out more or use fewer processes"
                )

    def points(self, split: Split) -> Points:
        """All rows of a split."""
        return getattr(self.splits, split)

    def draw(self, split: Split, index: Tensor) -> Points:
        """Return the rows with these global numbers, ``[n]``."""
        return take(self.points(split), self._positions(index) if split == "train" else index)

    def train_dataloader(self) -> "Mapped":
        """The batches of every outer step."""
        # the stream draws the positions of rows for many steps at once; the rows, which may be large, step by step
        return Mapped(partial(take, self.points("train")), self.train_stream(self._positions))

    def eval_stream(self, split: Split) -> EvalStream:
        """All rows of a split, in batches, this rank's share of them."""
        return EvalStream(partial(self.draw, split), len(self.points(split).x), self.number, *self.ranks)

    def _positions(self, index: Tensor) -> Tensor:
        rows = len(self.points("train").x)
        epochs, which = (index // rows).unique(return_inverse=True)
        order = permutation(task_keys(self.seed, "train", epochs), rows)
        return order[which, index % rows]


@dataclass(frozen=True)
class Mapped:
    """A stream of which each batch is made by a function when it is due."""

    make: Callable[[Any], Any]
    stream: TrainStream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, self.stream)
