"""A table of rows in three parts, which is the task of each outer step of a bilevel problem."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from metalit.data.base import Split, task_keys
from metalit.data.draws import DrawsDataModule, expanded
from metalit.data.rows import Rows, RowSource
from metalit.data.scaling import Scaling
from metalit.errors import InputError
from metalit.keys import fold, normal, permutation, uniform
from metalit.problem import Points, Splits


class Table(NamedTuple):
    """Normalised splits, without a leading dimension, and how the user names and measures their columns."""

    splits: Splits
    scaling: Scaling
    columns: Sequence[str]
    target: str
    classes: Sequence[str]


@dataclass(frozen=True)
class Partition:
    """How rows become train, val and test.

    The rows are shuffled and cut. Inputs and a real target are normalised by mean and deviation of the training rows
    alone; then what is to be spoiled on purpose is spoiled. Each part is a function of ``split_seed`` by itself: a row
    keeps its noise when the fractions change.

    Args:
        val, test: the fractions of rows held out for validation and test.
        noise_columns: how many columns of standard normal noise are appended to the inputs of all rows.
        corrupt: the fraction of training rows whose class is replaced by one drawn uniformly from the others:
            ``round(corrupt · rows)`` of them. Validation and test stay clean.
        split_seed: the seed of all of this.
    """

    val: float = 0.25
    test: float = 0.25
    noise_columns: int = 0
    corrupt: float = 0.0
    split_seed: int = 0

    def of(self, rows: Rows) -> Table:
        """Split, normalise and spoil.

        Raises:
            InputError: fractions beyond their range or that leave a split without a row, a negative number of noise
                columns, a corruption of real targets.
        """
        self._check(rows)
        key = fold(torch.tensor(self.split_seed), len(get_args(Split)))
        order = permutation(fold(key, 0), len(rows.x))
        val, test = self._held(len(rows.x)).values()
        test_rows, val_rows, train_rows = order.split([test, val, len(order) - val - test])
        # classes have no units: a column of zeros has the identity
        scaling = Scaling.of(rows.x[train_rows], torch.zeros(1, 1) if rows.classes else rows.y[train_rows])
        y = rows.y if rows.classes else scaling.normalise_y(rows.y)
        noise = normal(fold(key, 1), len(rows.x), self.noise_columns)
        x = torch.cat([scaling.normalise_x(rows.x), noise], dim=1)
        train, corrupted = self._corrupted(y[train_rows], len(rows.classes), key)
        splits = Splits(
            train=Points(x[train_rows], train),
            val=Points(x[val_rows], y[val_rows]),
            test=Points(x[test_rows], y[test_rows]),
            noise=torch.arange(x.shape[1]) >= rows.x.shape[1],
            corrupted=corrupted,
            key=key,
        )
        scaling = replace(
            scaling,
            x_mean=[*scaling.x_mean, *[0.0] * self.noise_columns],
            x_std=[*scaling.x_std, *[1.0] * self.noise_columns],
        )
        return Table(splits, scaling, [*rows.columns, *self._noise_names()], rows.target, list(rows.classes))

    def _corrupted(self, y: Tensor, classes: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Training targets, some replaced, and which."""
        wrong = torch.zeros(len(y), dtype=torch.bool)
        if not self.corrupt:
            return y, wrong
        wrong[permutation(fold(key, 2), len(y))[: round(self.corrupt * len(y))]] = True
        other = 1 + (uniform(fold(key, 3), len(y)) * (classes - 1)).long()  # 1 … classes − 1 further on, in a circle
        return torch.where(wrong, (y + other) % classes, y), wrong

    def _held(self, rows: int) -> dict[str, int]:
        return {"val": round(rows * self.val), "test": round(rows * self.test)}

    def _noise_names(self) -> list[str]:
        return [f"noise{number}" for number in range(1, self.noise_columns + 1)]

    def _check(self, rows: Rows) -> None:
        for name in ("val", "test"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data.{name}={getattr(self, name)} must be a fraction between 0 and 1")
        held = self._held(len(rows.x))
        if self.val + self.test >= 1 or min(held.values()) < 1 or sum(held.values()) >= len(rows.x):
            raise InputError(
                f"data.rows: {len(rows.x)} row(s) cannot be split into train, val and test with data.val={self.val} "
                f"and data.test={self.test}: each split needs one at least; change the fractions or add rows"
            )
        if not (isinstance(self.noise_columns, int) and self.noise_columns >= 0):
            raise InputError(f"data.noise_columns={self.noise_columns!r} must be a whole number, at least 0")
        taken = sorted({*rows.columns} & {*self._noise_names()})
        if taken:
            raise InputError(
                f"data.noise_columns={self.noise_columns}: the table has columns {taken} of its own; rename them"
            )
        if not 0 <= self.corrupt < 1:
            raise InputError(f"data.corrupt={self.corrupt} must be a fraction, at least 0 and below 1")
        if self.corrupt and len(rows.classes) < 2:
            raise InputError(
                f"data.corrupt={self.corrupt}: only classes can be wrong, and the target {rows.target!r} has "
                f"{len(rows.classes)}; leave data.corrupt out or take a target of several classes"
            )


class TableDataModule(DrawsDataModule):
    """Draws from a table in three parts.

    After :meth:`setup`, ``splits`` are its parts, ``columns`` the names of the inputs with those of noise, ``target``
    that of the target, ``classes`` those of its classes (none where it is real), and ``scaling`` the way back to the
    user's units (of classes and columns of noise, the identity).
    """

    splits: Splits
    scaling: Scaling
    columns: Sequence[str]
    target: str
    classes: Sequence[str]

    def __init__(self, rows: RowSource, partition: Partition, number: int, argument: str, seed: int) -> None:
        super().__init__(number, argument, seed)
        self.rows = rows
        self.partition = partition

    def prepare(self) -> None:
        """Read the rows and split them."""
        self.splits, self.scaling, self.columns, self.target, self.classes = self.partition.of(self.rows.read())


class SplitsDataModule(TableDataModule):
    """The whole table in each outer step, ``draws`` times, each with a key of its own: for bilevel learners.

    A step yields this rank's share of the draws as one :class:`~metalit.problem.Splits` with a leading dimension; its
    tensors are expanded, never copied. Validation and test are one draw, the same on every rank.

    Args:
        rows: where the rows come from.
        val, test, noise_columns, corrupt, split_seed: see :class:`Partition`.
        seed: the seed of the draws' keys.
        draws: how many draws an outer step averages over, over all ranks.

    Raises:
        InputError: from :meth:`setup`: rows that cannot be used or split; ``draws`` that the ranks do not divide.
    """

    def __init__(
        self,
        rows: RowSource,
        val: float = 0.25,
        test: float = 0.25,
        noise_columns: int = 0,
        corrupt: float = 0.0,
        split_seed: int = 0,
        seed: int = 0,
        draws: int = 1,
    ) -> None:
        partition = Partition(val, test, noise_columns, corrupt, split_seed)
        super().__init__(rows, partition, draws, "data.draws", seed)

    def draw(self, split: Split, index: Tensor) -> Splits:
        """Return the table once for each index, ``[n]``."""
        return expanded(self.splits, task_keys(self.seed, split, index))
