"""The protocol of a task distribution: tasks are a pure function of (seed, split, index)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from metalit.data.cells import Categories, input_names
from metalit.data.scaling import Scaling
from metalit.data.table import Columns
from metalit.errors import InputError
from metalit.keys import fold
from metalit.problem import Task

Split = Literal["train", "val", "test"]


def task_keys(seed: int, split: Split, index: Tensor) -> Tensor:
    """The key of each task, which alone decides what is drawn. ``index`` is ``[tasks]``, counted over all ranks."""
    return fold(torch.tensor(seed), get_args(Split).index(split), index)


class TaskDistribution(ABC):
    """Where tasks come from."""

    @property
    @abstractmethod
    def columns(self) -> Columns:
        """How the user names the task, the inputs and the outputs, in files and in pictures."""

    @property
    def inputs(self) -> list[str]:
        """The name of each input of a network: those of x, and of each level of a category."""
        return input_names(self.columns.x, self.levels)

    @property
    def levels(self) -> Categories:
        """The levels of those columns of x that hold texts: each becomes as many inputs of 0 or 1."""
        return {}

    @abstractmethod
    def sample(self, split: Split, index: Tensor, key: Tensor, shots: int, queries: int | None) -> Task:
        """Return tasks, normalised, in ``float64``.

        Args:
            split: one of ``train``, ``val``, ``test``.
            index: ``[tasks]`` global indices within the split.
            key: ``[tasks]`` keys, the only source of randomness.
            shots, queries: rows to adapt to, rows to be judged on; ``None`` for all that there are.

        Returns:
            A :class:`~metalit.problem.Task` with a leading task dimension.
        """

    @property
    def noisy(self) -> bool:
        """Whether y scatters about its curve, so that pictures show it as dots."""
        return False

    def needs(self, rows: Mapping[Split, int]) -> None:  # noqa: B027  (most tasks have as many rows as are asked for)
        """Called before :meth:`prepare` with the number of rows that a task of each split must have."""

    def prepare(self) -> None:  # noqa: B027  (most distributions are made from nothing)
        """Read and check what the tasks are made from; called once, before anything is drawn."""

    def check(self, split: Split, shots: int, queries: int | None) -> None:
        """Raise an :class:`InputError` if tasks of this size cannot be drawn."""
        if queries is None:
            raise InputError(f"data.{split}.queries='all': {type(self).__name__} has no last row, so give a number")

    def count(self, split: Split) -> int | None:
        """The number of different tasks in a split, 0 where it has none, or None where they never end."""
        return None

    def which(self, split: Split, index: Tensor) -> Tensor:
        """The number of the task at each of ``[n]`` global indices: tasks of a finite split come in turn."""
        count = self.count(split)
        return index if count is None else index % count

    def name(self, split: Split, index: int) -> str | None:
        """How the user calls the task with this global index, or None where it has no name."""
        return None

    def scaling(self) -> Scaling:
        """How the user's units were normalised."""
        columns = self.columns
        return Scaling.identity(len(columns.x), len(columns.y))

    def baselines(self, tasks: Task) -> dict[str, Tensor]:
        """Predictions without meta-learning at the query points: ``[tasks, queries, outputs]`` by name."""
        return {}
