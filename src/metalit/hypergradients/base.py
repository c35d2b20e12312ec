"""The protocol of a hypergradient, and its average over a batch of tasks."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map as pytree_map

from metalit.adapt import Outer
from metalit.errors import InputError
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, tree_map


class Estimate(NamedTuple):
    """The outer loss at one task, its gradient (shaped like the outer variable), and the adapted inner variable."""

    loss: Tensor
    gradient: Outer
    inner: Tree


class Hypergradient(ABC):
    """Estimates d outer_loss(θ_steps(φ), φ) / dφ for one task.

    Attributes:
        steps: the number of inner steps.
    """

    steps: int

    @abstractmethod
    def __call__(
        self, problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, start: Tree | None = None
    ) -> Estimate:
        """Estimate the hypergradient for one ``task``; ``start`` is that of :func:`metalit.adapt.iterates`."""


def over_tasks(
    hypergradient: Hypergradient, problem: Problem, optimizer: InnerOptimizer, outer: Outer, tasks: Any
) -> Estimate:
    """Average the loss and the gradient over a batch of tasks, vectorised by ``torch.func.vmap``.

    Args:
        tasks: a task whose tensors have a leading task dimension.

    Returns:
        An :class:`Estimate` whose ``inner`` keeps the task dimension.
    """
    each = vmap(partial(hypergradient, problem, optimizer), in_dims=(None, task_dims(tasks)))(outer, tasks)
    return Estimate(each.loss.mean(), tree_map(lambda value: value.mean(0), each.gradient), each.inner)


def task_dims(tasks: Any) -> Any:
    """The ``in_dims`` of ``vmap`` for a batch of tasks: 0 for tensors, None for what is absent."""
    return pytree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tasks)


def check_steps(owner: str, steps: int) -> None:
    """Raise an :class:`InputError` unless ``steps`` is at least one."""
    if steps < 1:
        raise InputError(f"{owner}: steps={steps} must be at least 1: without an inner step nothing adapts")
