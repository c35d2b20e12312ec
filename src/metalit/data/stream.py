"""The order in which tasks come: decided by the global index alone, whoever draws them and whenever."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from metalit.private_torch import pytree_map, tree_leaves

# small tasks are drawn for many steps in one call, which costs as much as for one; large ones when they are due
_BLOCK_STEPS = 64
_BLOCK_BYTES = 2**24

Draw: TypeAlias = Callable[[Tensor], Any]  # n indices as n tasks, or rows, or keys
Some = TypeVar("Some")


class Fused(NamedTuple):
    """The tasks of several outer steps, one after the other along the leading dimension of every tensor."""

    tasks: Any
    steps: int


def fused_steps(trainer: Trainer) -> int:
    """How many outer steps the learner takes on each batch: 1 unless it fuses several."""
    return getattr(trainer.lightning_module, "fused_steps", 1)


def overfitted(draw: Draw, tasks: int, trainer: Trainer) -> Draw:
    """Repeat the tasks of the first steps for ever, if ``trainer.overfit_batches`` asks for it.

    Args:
        draw: maps ``[n]`` indices to n tasks.
        tasks: those of one outer step, over all ranks.
        trainer: its ``overfit_batches`` is a number of steps, or a share of them.
    """
    steps = getattr(trainer, "overfit_batches", 0)
    if not steps:
        return draw
    count = tasks * (steps if isinstance(steps, int) else max(1, int(steps * trainer.max_steps)))
    return lambda index: draw(index % count)


class TrainStream:
    """The tasks of every outer step: step s takes the indices s·T … (s+1)·T − 1, and each rank its share of them.

    Args:
        draw: maps ``[n]`` indices to n tasks.
        tasks: T, the tasks of one outer step, over all ranks.
        steps: the number of outer steps; the length of the stream.
        first_step: called when iteration starts; returns the step to start at.
        rank, ranks: which share is drawn: that of rank number ``rank`` of ``ranks``.
        fused: if more than 1, so many steps come at once, as :class:`Fused`; it divides ``steps`` and the first step.
    """

    def __init__(
        self,
        draw: Draw,
        tasks: int,
        steps: int,
        first_step: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
        fused: int = 1,
    ) -> None:
        self.draw = draw
        self.share = tasks // ranks
        self.stride = tasks
        self.offset = rank * self.share
        self.steps = steps
        self.first_step = first_step
        self.fused = fused

    def __len__(self) -> int:
        return self.steps // self.fused

    def __iter__(self) -> Iterator[Any]:
        step, length = self.first_step(), self._block_length
        while True:
            # blocks start at multiples of their length, so that a resumed run makes the very same calls
            start = step - step % length
            block = self.draw(self._indices(start, length))
            for position in range(step - start, length, self.fused):
                tasks = take(block, slice(position * self.share, (position + self.fused) * self.share))
                yield Fused(tasks, self.fused) if self.fused > 1 else tasks
            step = start + length

    def _indices(self, start: int, steps: int) -> Tensor:
        """This rank's indices of so many steps, ``[steps · share]``."""
        step = torch.arange(start, start + steps).unsqueeze(-1)
        return (step * self.stride + self.offset + torch.arange(self.share)).flatten()

    @cached_property
    def _block_length(self) -> int:
        """The number of steps that are drawn in one call."""
        first = [leaf for leaf in tree_leaves(self.draw(self._indices(0, 2))) if isinstance(leaf, Tensor)]
        # what is expanded, with a stride of 0, needs no memory of its own; two steps, since one may be a single task
        size = sum(leaf.nbytes for leaf in first if leaf.stride(0)) / 2
        steps = min(_BLOCK_STEPS, int(_BLOCK_BYTES // max(size, 1)))
        return self.fused * max(1, steps // self.fused)


class EvalStream:
    """A fixed number of tasks, in batches; task i belongs to rank i modulo the number of ranks.

    Args:
        draw: maps ``[n]`` indices to n tasks.
        tasks: how many tasks there are, over all ranks.
        batch: how many come at once on each rank.
        rank, ranks: which share is drawn: that of rank number ``rank`` of ``ranks``.
    """

    def __init__(self, draw: Draw, tasks: int, batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.draw = draw
        self.chunks = torch.arange(rank, tasks, ranks).split(batch)

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Any]:
        return map(self.draw, self.chunks)


def take(tasks: Some, which: slice | Tensor) -> Some:
    """Choose tasks out of a batch."""
    return pytree_map(lambda leaf: None if leaf is None else leaf[which], tasks)
