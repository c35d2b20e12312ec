"""The protocol of a hypergradient, and its average over a batch of tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    each = for_each_task(partial(hypergradient, problem, optimizer), outer, tasks)
    return Estimate(each.loss.mean(), tree_map(lambda value: value.mean(0), each.gradient), each.inner)


def for_each_task(fn: Callable[[Outer, Any], Any], outer: Outer, tasks: Any) -> Any:
    """Evaluate ``fn(outer, task)`` for every task of a batch at once; results get a leading task dimension.

    Raises:
        InputError: the network draws random numbers that do not follow the task's key.
    """
    dims = pytree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tasks)
    try:
        return vmap(fn, in_dims=(None, dims))(outer, tasks)
    except RuntimeError as error:
        if "randomness error mode" not in str(error):
            raise
        raise InputError(
            "network: it draws random numbers by other means than the modules torch.nn.Dropout, Dropout1d, Dropout2d "
            "and Dropout3d, so its draws would not follow the task; use those"
        ) from error


def check_steps(owner: str, steps: int) -> None:
    """Raise an :class:`InputError` unless ``steps`` is at least one."""
    if steps < 1:
        raise InputError(f"{owner}: steps={steps} must be at least 1: without an inner step nothing adapts")
