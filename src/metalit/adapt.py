"""The inner loop: how an inner variable is adapted to one task. The heart of the project."""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload

from torch import Tensor

from metalit.inner.base import InnerOptimizer
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Problem
from metalit.tree import Tree, tree_map

Outer: TypeAlias = dict[str, Any]  # {"problem": dict[str, Tensor], "optimizer": dict[str, Tree]}

Trees = TypeVar("Trees")


class Iterate(NamedTuple):
    """Where the inner loop stands: the inner variable, and the inner optimiser's state there, such as its momentum.

    Without any tensor in it, the state begins anew.
    """

    inner: Tree
    state: Any = {}  # noqa: RUF012  (never changed)


Start: TypeAlias = Tree | Iterate | None  # of an inner loop: None is problem.init, and of a tree the state begins anew


def outer_variable(problem: Problem, optimizer: InnerOptimizer, task: Any = None, steps: int = 1) -> Outer:
    """Return the whole outer variable with its initial values, ``{"problem": …, "optimizer": …}``.

    Args:
        problem, optimizer: what bring it.
        task: one task, where the shape of the inner variable is the task's.
        steps: the number of inner steps that are trained, for what the optimiser learns of each.
    """
    own = problem.outer()
    return {"problem": own, "optimizer": optimizer.outer(problem.init(own, task), steps) if optimizer.learns else {}}


def path(
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    steps: int,
    start: Start = None,
    first_order: bool = False,
    dropped: int = 0,
) -> Iterator[Iterate]:
    """Yield where the inner loop stands before the first inner step and after each.

    Args:
        problem, optimizer: what is adapted, and how.
        outer: ``{"problem": …, "optimizer": …}``.
        task: one task, without a task dimension; ``torch.func.vmap`` over this function adapts to many at once.
        steps: the number of inner steps.
        start: where to start instead of ``problem.init``, and with which state; a constant for differentiation.
        first_order: treat the inner gradients as constants.
        dropped: for differentiation, so many of the first steps are the identity in the inner variable and a constant
            in the outer one.
    """
    inner, state = beginning(problem, optimizer, outer["problem"], task, start)
    yield Iterate(inner, kept(state))
    for step in range(steps):
        given = _constants((inner, state, outer)) if step < dropped else (inner, state, outer)
        moved, state = inner_step(problem, optimizer, *given, task, step, first_order)
        inner = tree_map(_identity, moved, inner) if step < dropped else moved
        yield Iterate(inner, kept(state))


def beginning(
    problem: Problem, optimizer: InnerOptimizer, own: dict[str, Tensor], task: Any, start: Start = None
) -> Iterate:
    """Where the inner loop begins; ``own`` is the problem's outer variable."""
    if start is None:
        inner = problem.init(own, task)
        return Iterate(inner, optimizer.init(inner))
    inner, state = start if isinstance(start, Iterate) else Iterate(start)
    inner = tree_map(Tensor.detach, inner)
    return Iterate(inner, _constants(state) if tree_leaves(state) else optimizer.init(inner))


def inner_step(
    problem: Problem,
    optimizer: InnerOptimizer,
    inner: Tree,
    state: Any,
    outer: Outer,
    task: Any,
    step: int,
    first_order: bool = False,
) -> tuple[Tree, Any]:
    """Take inner step number ``step``: inner variable and state after it, from those before."""

    def grad_fn(inner: Tree) -> Tree:
        gradient = problem.inner_grad(inner, outer["problem"], task, step)
        return tree_map(Tensor.detach, gradient) if first_order else gradient

    return optimizer.update(grad_fn, inner, state, outer["optimizer"], step)


def _constants(trees: Trees) -> Trees:
    return pytree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, trees)


def _identity(moved: Tensor, before: Tensor) -> Tensor:
    """``moved`` in value, to the last digit, and ``before`` in derivative."""
    return moved + (before - before.detach())


def iterates(
    problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, steps: int, start: Start = None
) -> Iterator[Tree]:
    """Yield the inner variable before the first inner step and after each; the arguments are those of :func:`path`."""
    for at in path(problem, optimizer, outer, task, steps, start):
        yield at.inner


def adapt(
    problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, steps: int, start: Start = None
) -> Tree:
    """Return the inner variable after ``steps`` inner steps; the arguments are those of :func:`path`."""
    *_, last = iterates(problem, optimizer, outer, task, steps, start)
    return last


@overload
def inner_of(start: Tree | Iterate) -> Tree: ...
@overload
def inner_of(start: Start) -> Tree | None: ...
def inner_of(start: Start) -> Tree | None:
    """The inner variable of a start, if one is given."""
    return start.inner if isinstance(start, Iterate) else start


def kept(state: Any) -> Any:
    """A state as it is kept between outer steps: one that does not consist of tensors alone begins anew."""
    return state if all(isinstance(leaf, Tensor) for leaf in tree_leaves(state)) else {}
