"""The inner loop: how an inner variable is adapted to one task. The heart of the project."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import grad

from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, tree_map

Outer = dict[str, dict[str, Tree]]


def outer_variable(problem: Problem, optimizer: InnerOptimizer, task: Any = None) -> Outer:
    """Return the whole outer variable with its initial values, ``{"problem": …, "optimizer": …}``."""
    own = problem.outer()
    return {"problem": own, "optimizer": optimizer.outer(problem.init(own, task))}


def iterates(
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    steps: int,
    start: Tree | None = None,
    first_order: bool = False,
) -> Iterator[Tree]:
    """Yield the inner variable before the first inner step and after each.

    Args:
        problem, optimizer: what is adapted, and how.
        outer: ``{"problem": …, "optimizer": …}``.
        task: one task, without a task dimension; ``torch.func.vmap`` over this function adapts to many at once.
        steps: the number of inner steps.
        start: where to start instead of ``problem.init``; a constant for differentiation.
        first_order: treat the inner gradients as constants.
    """
    own = outer["problem"]
    inner = problem.init(own, task) if start is None else tree_map(Tensor.detach, start)
    state = optimizer.init(inner)
    yield inner
    for step in range(steps):
        grad_fn = grad(partial(problem.inner_loss, outer=own, task=task, step=step))
        if first_order:
            grad_fn = partial(_constant_gradient, grad_fn)
        inner, state = optimizer.update(grad_fn, inner, state, outer["optimizer"], step)
        yield inner


def _constant_gradient(grad_fn: Any, inner: Tree) -> Tree:
    return tree_map(Tensor.detach, grad_fn(inner))


def adapt(
    problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, steps: int, start: Tree | None = None
) -> Tree:
    """Return the inner variable after ``steps`` inner steps; the arguments are those of :func:`iterates`."""
    *_, last = iterates(problem, optimizer, outer, task, steps, start)
    return last
