"""The protocol of a task distribution: tasks are a pure function of (seed, split, index)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metalit.data.cells import Categories, input_names
from metalit.data.scaling import Scaling, known
from metalit.data.table import Columns
from metalit.errors import InputError
from metalit.keys import fold
from metalit.private_torch import pytree_map
from metalit.problem import Task

Split = Literal["train", "val", "test"]
Count = int | Literal["all"]
WAYS = 5  # the classes of a task where a split does not say


@dataclass(frozen=True)
class Episodes:
    """The tasks of one split.

    Args:
        tasks: how many: in each outer step for train, in all for val and test; over all ranks. ``"all"`` stands for
            each task once, where they are finitely many.
        shots: rows to adapt to; of each class, where tasks are of classes.
        queries: rows to be judged on, likewise, as far as a curve has so many; ``"all"`` for all the others.
        ways: the classes of a task, where tasks are of classes; 5 if not given.
    """

    tasks: Count = "all"
    shots: int = 5
    queries: Count = "all"
    ways: int | None = None

    @property
    def rows(self) -> int | None:
        """The queries as a number; None for all that there are."""
        return None if self.queries == "all" else self.queries


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

    def of_size(self, split: Split, index: Tensor, key: Tensor, size: Episodes) -> Task:
        """Return tasks of this size, as :meth:`sample` draws them."""
        return self.sample(split, index, key, size.shots, size.rows)

    def load(self, tasks: Task, device: torch.device) -> Task:
        """Bring what :meth:`sample` drew to a device, as a network takes it.

        What is drawn may stand for what is large, as numbers of images do for their pixels: many are drawn ahead, and
        loaded when their outer step is due.
        """
        return _moved(tasks, device)

    def needs(self, sizes: Mapping[Split, Episodes]) -> None:  # noqa: B027  (most tasks have as many rows as are asked)
        """Called before :meth:`prepare` with the size of the tasks of each split."""

    def prepare(self) -> None:  # noqa: B027  (most distributions are made from nothing)
        """Read and check what the tasks are made from; called once, before anything is drawn."""

    def check(self, split: Split, size: Episodes) -> None:
        """Raise an :class:`InputError` if tasks of this size cannot be drawn."""
        check_no_ways(self, split, size)
        if size.rows is None:
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

    def input_shape(self) -> Sequence[int]:
        """The shape of one row of x: ``[inputs]``, or ``[channels, height, width]`` of images."""
        return [len(self.inputs)]

    def class_names(self, split: Split) -> Sequence[str] | None:
        """The name of each class that tasks of this split may hold; ``Task.classes`` are positions in it.

        None where tasks are not of classes.
        """
        return None

    @property
    def of_classes(self) -> bool:
        """Whether tasks are of classes; known before anything is read, where that takes long."""
        return self.class_names("train") is not None

    def scaling(self) -> Scaling | None:
        """How the user's units were normalised; None where nothing is trained on, which :meth:`take_scaling` needs."""
        columns = self.columns
        return Scaling.identity(len(columns.x), len(columns.y))

    def take_scaling(self, scaling: Scaling) -> None:
        """Normalise as the data did that a learner was trained on; called where there is no :meth:`scaling`."""
        self.__dict__["_taken"] = scaling

    @property
    def used_scaling(self) -> Scaling:
        """That by which tasks are normalised: their own, else the one that was taken.

        Raises:
            InputError: there is neither.
        """
        return known(self.scaling() or self.__dict__.get("_taken"))

    def baselines(self, tasks: Task) -> dict[str, Tensor]:
        """Predictions without meta-learning at the query points: ``[tasks, queries, outputs]`` by name."""
        return {}


def check_no_ways(tasks: TaskDistribution, split: Split, size: Episodes) -> None:
    """Raise an :class:`InputError` if classes are asked for of tasks that have none."""
    if size.ways is not None:
        name = type(tasks).__name__
        raise InputError(f"data.{split}.ways={size.ways}: tasks of {name} have no classes; leave it out")


def _moved(tree: Any, device: torch.device) -> Any:
    return pytree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
