"""Which paths lead from the outer variable to the outer loss, and whether an estimator carries their derivatives."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from metalit.adapt import Outer
from metalit.errors import InputError
from metalit.inner.base import InnerOptimizer
from metalit.private_torch import tree_leaves
from metalit.problem import Problem
from metalit.tree import SomeTree, Tree, leaves, tree_map

Path = Literal["init", "inner_loss", "outer_loss", "inner optimiser"]
ALL: frozenset[Path] = frozenset(get_args(Path))


class Claims(NamedTuple):
    """What an estimator says of itself; see :class:`~metalit.hypergradients.base.Hypergradient`."""

    estimator: str
    carries: frozenset[Path]
    needs: frozenset[Path]
    second_order: bool


def paths(problem: Problem, outer: Outer, task: Any, start: Tree | None = None, steps: int = 1) -> dict[Path, set[str]]:
    """Find, by autograd on one task, which outer parameters enter where; ``init`` counts unless ``start`` is given.

    The inner loss is that of all of ``steps`` inner steps, or of 16 among them from the first to the last.

    Raises:
        InputError: a loss that is no scalar, an inner variable that is no tree; an inner loss that does not depend on
            the inner variable; an outer parameter that is reached through the problem itself.
    """
    with torch.enable_grad():
        own = _free(outer["problem"])
        initial = problem.init(own, task) if start is None else start
        if not isinstance(initial, Tensor | dict):
            raise InputError(
                f"{type(problem).__name__}.init returned a {type(initial).__name__}; it must return a tensor or a "
                "dictionary of tensors"
            )
        for name, value in leaves(initial):
            if not isinstance(value, Tensor):
                raise InputError(
                    f"{type(problem).__name__}.init returned a {type(value).__name__} at {name!r}; all leaves of the "
                    "inner variable must be tensors"
                )
        check_real("its outer variable", outer["problem"])
        check_real("its inner variable", initial)
        inner = _free(initial)
        inner_losses, outer_loss = [], problem.after(steps).outer_loss(inner, own, task)
        check_scalar("outer_loss", problem, outer_loss)
        if tree_leaves(inner):
            inner_losses = [problem.inner_loss(inner, own, task, step) for step in sorted({0, max(0, steps - 1)})]
            for inner_loss in inner_losses:
                check_scalar("inner_loss", problem, inner_loss)
            if not _reaches(inner, inner_losses):
                raise InputError(
                    f"{type(problem).__name__}.inner_loss does not depend on the inner variable, so no inner step "
                    "changes it; compute it from its argument `inner`"
                )
        initial_values = [value for _, value in leaves(initial)] if start is None else []
        _check_bypass(problem, [*initial_values, *inner_losses, outer_loss])
        between: set[str] = set()
        for step in _between(steps) if inner_losses else ():  # one after the other, as each has a graph
            inner_loss = problem.inner_loss(inner, own, task, step)
            check_scalar("inner_loss", problem, inner_loss)
            _check_bypass(problem, [inner_loss])
            between |= _reaches(own, [inner_loss])
        found: dict[Path, set[str]] = {
            "init": _reaches(own, initial_values),
            "inner_loss": _reaches(own, inner_losses) | between,
            "outer_loss": _reaches(own, [outer_loss]),
            "inner optimiser": set(outer["optimizer"]),
        }
    return {path: names for path, names in found.items() if names}


def check_paths(
    claims: Claims,
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    start: Tree | None = None,
    steps: int = 1,
) -> None:
    """Raise an :class:`InputError` where the estimator is not valid for this problem with this inner optimiser.

    Warns of single outer parameters to which it carries no derivative.
    """
    name, estimator = type(problem).__name__, claims.estimator
    entries = paths(problem, outer, task, start, steps)
    found = entries.keys()
    own = found - {"inner optimiser"}
    if not own and (outer["problem"] or not found):
        warm = " (with a warm start, its init does not count)" if start is not None else ""
        raise InputError(
            f"{name}: neither loss depends on the outer variable{warm}, so there is nothing to learn; use the argument "
            "`outer` in init, inner_loss or outer_loss"
        )
    if optimizer.second_order and not claims.second_order:
        raise InputError(
            f"hypergradient {estimator} takes no derivative of inner gradients, but {type(optimizer).__name__} "
            "differentiates them; use SGD inside, or another hypergradient"
        )
    if "inner optimiser" in found - claims.carries:
        raise InputError(
            f"inner_optimizer {type(optimizer).__name__} brings outer parameters, to which hypergradient {estimator} "
            "carries no derivative: they would never learn; use SGD with a fixed lr inside, or Unrolled outside"
        )
    if (own and not own & claims.carries) or claims.needs - own:
        other = f", or give {name} {problem.inner_term}" if problem.inner_term and claims.needs - own else ""
        raise InputError(
            f"hypergradient {estimator} learns through {_words(claims.needs or claims.carries)}, but the outer "
            f"variable of {name} enters through {_words(own)} alone: its gradient would be zero or wrong; use "
            f"Unrolled{other}"
        )
    moved = set().union(*(names for path, names in entries.items() if path in claims.carries))
    still = sorted(set().union(*entries.values()) - moved)
    if still:
        warnings.warn(
            f"hypergradient {estimator} carries no derivative to {', '.join(still)} of {name}, which will not move; "
            "that is right for what matters at init alone where the inner problem is solved; else use Unrolled",
            stacklevel=2,
        )


def _check_bypass(problem: Problem, values: Iterable[Tensor]) -> None:
    """Raise an :class:`InputError` where the values depend on the problem's own parameters, not on given ones."""
    bypassed = sorted(_reaches(problem.outer(), values))
    if bypassed:
        raise InputError(
            f"{type(problem).__name__}: its init or losses reach the outer parameter(s) {', '.join(bypassed)} by "
            "another way than the argument `outer`, so these would never learn; use the values in `outer`, such as "
            f"outer[{bypassed[0]!r}]; for a network, metalit.autodiff.call(network, parameters, x) takes them by the "
            "network's own names; for a constant, use .detach() or requires_grad_(False)"
        )
    registered = {id(parameter) for parameter in problem.parameters()}
    lost = [leaf for leaf in _parameters_below(values) if id(leaf) not in registered]
    if lost:
        warnings.warn(
            f"{type(problem).__name__}: its init or losses use {len(lost)} parameter(s) that are not registered with "
            f"it, the first of shape {list(lost[0].shape)}, which will not move; keep layers in nn.ModuleList or "
            "nn.ModuleDict, not in a plain list or dictionary",
            stacklevel=2,
        )


def check_real(owner: str, tree: Tree) -> None:
    """Raise an :class:`InputError` for complex numbers: products and norms here are those of real ones."""
    for name, value in leaves(tree):
        if value.is_complex():
            raise InputError(
                f"problem: {owner} holds complex numbers ({name or 'the tensor'} is of {value.dtype}), which cannot be "
                "learned; keep real and imaginary parts as real parameters, and join them by torch.complex"
            )


def check_scalar(method: str, problem: Problem, value: Any) -> None:
    """Raise an :class:`InputError` unless a loss is a scalar."""
    name = f"{type(problem).__name__}.{method}"
    if not (isinstance(value, Tensor) and value.dim() == 0):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"{name} returned {got}; it must return a scalar tensor, such as the mean over rows")


def _between(steps: int) -> list[int]:
    """The inner steps between the first and the last: all, or 14 that are evenly apart."""
    return sorted({round(number * (steps - 1) / 15) for number in range(16)} - {0, steps - 1})


def _free(tree: SomeTree) -> SomeTree:
    return tree_map(lambda value: value.detach().clone().requires_grad_(value.is_floating_point()), tree)


def _reaches(tree: Tree, values: Iterable[Tensor]) -> set[str]:
    """The names of those leaves that the values depend on; a tree that is a leaf has the name ``""``."""
    sources = {name: value for name, value in leaves(tree) if value.requires_grad}
    targets = [value for value in values if value.requires_grad]
    if not (sources and targets):
        return set()
    ones = [torch.ones_like(value) for value in targets]
    gradients = torch.autograd.grad(targets, list(sources.values()), ones, retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(sources, gradients, strict=True) if gradient is not None}


def _parameters_below(values: Iterable[Tensor]) -> list[nn.Parameter]:
    """All parameters that the values depend on."""
    waiting, visited, found = [value.grad_fn for value in values if value.grad_fn is not None], set(), []
    while waiting:
        node = waiting.pop()
        if node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            found.append(leaf)
        waiting += [below for below, _ in node.next_functions if below is not None]
    return found


def _words(chosen: Iterable[Path]) -> str:
    *most, last = (path for path in get_args(Path) if path in chosen)
    return f"{', '.join(most)} and {last}" if most else last
