"""A warm start: each outer step begins where the last one left the inner variables, and the optimiser's states."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from metalit.adapt import Iterate, inner_of, kept
from metalit.errors import InputError
from metalit.inner.base import InnerOptimizer
from metalit.private_torch import pytree_map, tree_flatten, tree_leaves, tree_unflatten
from metalit.training.ranks import rows_of_ranks
from metalit.tree import Tree, tree_map


class WarmStart:
    """The inner variables that the last outer step left, and the inner optimiser's states, both with a leading
    dimension of tasks.

    A rank holds those of its own tasks; a checkpoint holds those of all ranks.

    Args:
        optimizer: the inner optimiser, whose states they are.
    """

    def __init__(self, optimizer: InnerOptimizer) -> None:
        self.optimizer = optimizer
        self._own: Iterate | None = None
        self._all: Iterate | None = None

    def keep(self, last: Iterate) -> None:
        """Take what an outer step left this rank's tasks."""
        self._own, self._all = pytree_map(Tensor.detach, last), None

    def kept(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint keeps of all ranks, which must ask together: the inner variables, the states' leaves."""
        held = self.of_all(trainer)
        return {"inner": inner_of(held), "inner_state": [] if held is None else tree_leaves(held.state)}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint keeps; one of an older version has no states, which then begin anew."""
        inner, state = checkpoint["inner"], checkpoint.get("inner_state", [])
        self._own, self._all = None, None if inner is None else Iterate(inner, state)

    def of_all(self, trainer: Trainer) -> Iterate | None:
        """Those of the tasks of all ranks, which must ask together; None before the first step."""
        if self._all is None and self._own is not None:
            self._all = pytree_map(partial(rows_of_ranks, trainer), self._own)
        return self._all

    def of_rank(self, trainer: Trainer, share: int, initial: Callable[[], Tree]) -> Iterate:
        """Those of this rank's tasks.

        Args:
            trainer: knows the ranks.
            share: the number of tasks of each rank.
            initial: finds the inner variables at ``init``: where they start if there was no step yet, and of which type
                and where they are.

        Raises:
            InputError: there are those of another number of tasks.
        """
        ranks = trainer.world_size
        if self._own is None and self._all is None:
            self._own = self._begun(initial())
        held = count_of(self._own) * ranks if self._own is not None else count_of(self._all)
        if held != share * ranks:
            raise InputError(
                f"model.warm_start: training, or the checkpoint, left the inner variables of {held} tasks, and each "
                f"outer step now has {share * ranks}; use the number that it was trained with"
            )
        if self._own is None:
            first = trainer.global_rank * share
            inner, state = pytree_map(lambda value: value[first : first + share], cast(Iterate, self._all))
            begun = self._begun(like(inner, initial()))  # which may be of another precision
            self._own = begun._replace(state=_taken_up(tree_leaves(state), begun.state))
        return self._own

    def _begun(self, inner: Tree) -> Iterate:
        """With the states before the first step."""
        each = [kept(self.optimizer.init(task_at(inner, index))) for index in range(count_of(inner))]
        return Iterate(inner, stacked(each))


def _taken_up(state: Sequence[Tensor], begun: Any) -> Any:
    """A state of the form of ``begun`` with the values of a checkpoint, which may be of another optimiser, or none."""
    values, form = tree_flatten(begun)
    if [value.shape for value in state] != [value.shape for value in values]:
        return begun
    return tree_unflatten([value.to(other) for value, other in zip(state, values, strict=True)], form)


def count_of(tasks: Any) -> int:
    """The number of tasks of a batch, or of trees with a leading dimension of tasks."""
    return len(next(leaf for leaf in tree_leaves(tasks) if isinstance(leaf, Tensor)))


def task_at(tasks: Any, index: int) -> Any:
    """One task of a batch, without a leading dimension."""
    return pytree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tasks)


def like(inner: Tree, other: Tree) -> Tree:
    """``inner`` of the types and on the devices of ``other``."""
    return tree_map(lambda value, given: value.to(given), inner, other)


def stacked(trees: list[Any]) -> Any:
    """Trees of single tasks as one with a leading dimension of tasks."""
    return pytree_map(lambda *values: torch.stack(values), *trees)
