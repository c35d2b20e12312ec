"""A warm start: each outer step begins where the last one left the inner variables."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from metalit.errors import InputError
from metalit.private_torch import pytree_map, tree_leaves
from metalit.training.ranks import rows_of_ranks
from metalit.tree import Tree, tree_map


class WarmStart:
    """The inner variables that the last outer step left, with a leading dimension of tasks.

    A rank holds those of its own tasks; a checkpoint holds those of all ranks.
    """

    def __init__(self) -> None:
        self._own: Tree | None = None
        self._all: Tree | None = None

    def keep(self, inner: Tree) -> None:
        """Take what an outer step left this rank's tasks."""
        self._own, self._all = tree_map(Tensor.detach, inner), None

    def load(self, inner: Tree | None) -> None:
        """Take what a checkpoint holds."""
        self._own, self._all = None, inner

    def of_all(self, trainer: Trainer) -> Tree | None:
        """Those of the tasks of all ranks, which must ask together; None before the first step."""
        if self._all is None and self._own is not None:
            self._all = tree_map(partial(rows_of_ranks, trainer), self._own)
        return self._all

    def of_rank(self, trainer: Trainer, share: int, initial: Callable[[], Tree]) -> Tree:
        """Those of this rank's tasks.

        Args:
            trainer: knows the ranks.
            share: the number of tasks of each rank.
            initial: finds where they start if there was no step yet; also of which type and where they are.

        Raises:
            InputError: there are those of another number of tasks.
        """
        ranks = trainer.world_size
        if self._own is None and self._all is None:
            self._own = initial()
        held = count_of(self._own) * ranks if self._own is not None else count_of(self._all)
        if held != share * ranks:
            raise InputError(
                f"model.warm_start: training, or the checkpoint, left the inner variables of {held} tasks, and each "
                f"outer step now has {share * ranks}; use the number that it was trained with"
            )
        if self._own is None:
            first, everybody = trainer.global_rank * share, cast(Tree, self._all)
            part = tree_map(lambda value: value[first : first + share], everybody)
            self._own = like(part, initial())  # which may be of another precision
        return self._own


def count_of(tasks: Any) -> int:
    """The number of tasks of a batch, or of trees with a leading dimension of tasks."""
    return len(next(leaf for leaf in tree_leaves(tasks) if isinstance(leaf, Tensor)))


def task_at(tasks: Any, index: int) -> Any:
    """One task of a batch, without a leading dimension."""
    return pytree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tasks)


def like(inner: Tree, other: Tree) -> Tree:
    """``inner`` of the types and on the devices of ``other``."""
    return tree_map(lambda value, given: value.to(given), inner, other)


def stacked(trees: list[Tree]) -> Tree:
    """Trees of single tasks as one with a leading dimension of tasks."""
    return tree_map(lambda *values: torch.stack(values), *trees)
