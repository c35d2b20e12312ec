"""Which paths lead from the outer variable to the outer loss, and whether an estimator carries their derivatives."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metalit.adapt import Outer
from metalit.errors import InputError
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, leaves, tree_map

if TYPE_CHECKING:
    from metalit.hypergradients.base import Hypergradient

Path = Literal["init", "inner_loss", "outer_loss", "inner optimiser"]
ALL: frozenset[Path] = frozenset(get_args(Path))


def paths(problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, start: Tree | None = None) -> set[Path]:
    """Find, by autograd on one task, where the outer variable enters: ``init`` counts only where nothing else starts.

    Raises:
        InputError: a loss that is no scalar; an inner loss that does not depend on the inner variable.
    """
    with torch.enable_grad():
        own = _free(outer["problem"])
        initial = problem.init(own, task) if start is None else start
        inner = _free(initial)
        inner_loss, outer_loss = None, problem.outer_loss(inner, own, task)
        check_scalar("outer_loss", problem, outer_loss)
        if tree_leaves(inner):
            inner_loss = problem.inner_loss(inner, own, task, 0)
            check_scalar("inner_loss", problem, inner_loss)
            if not _reaches(inner, [inner_loss]):
                raise InputError(
                    f"{type(problem).__name__}.inner_loss does not depend on the inner variable, so no inner step "
                    "changes it; compute it from its argument `inner`"
                )
        found: dict[Path, bool] = {
            "init": start is None and _reaches(own, [value for _, value in leaves(initial)]),
            "inner_loss": inner_loss is not None and _reaches(own, [inner_loss]),
            "outer_loss": _reaches(own, [outer_loss]),
            "inner optimiser": bool(outer["optimizer"]),
        }
    return {path for path, there in found.items() if there}


def check_paths(
    kind: "type[Hypergradient]",
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    start: Tree | None = None,
) -> None:
    """Raise an :class:`InputError` where ``kind`` is no estimator for this problem with this inner optimiser."""
    name, estimator = type(problem).__name__, kind.__name__
    found = paths(problem, optimizer, outer, task, start)
    own = found - {"inner optimiser"}
    if not own and (outer["problem"] or not found):
        warm = " (with a warm start, its init does not count)" if start is not None else ""
        raise InputError(
            f"{name}: neither loss depends on the outer variable{warm}, so there is nothing to learn; use the argument "
            "`outer` in init, inner_loss or outer_loss"
        )
    if optimizer.second_order and not kind.second_order:
        raise InputError(
            f"hypergradient {estimator} takes inner gradients for constants, but {type(optimizer).__name__} "
            "differentiates them; use SGD inside, or another hypergradient"
        )
    if "inner optimiser" in found - kind.carries:
        raise InputError(
            f"inner_optimizer {type(optimizer).__name__} brings outer parameters, to which hypergradient {estimator} "
            "carries no derivative: they would never learn; use SGD inside, or Unrolled outside"
        )
    if (own and not own & kind.carries) or kind.needs - own:
        raise InputError(
            f"hypergradient {estimator} learns through {_words(kind.needs or kind.carries)}, but the outer variable of "
            f"{name} enters through {_words(own)} alone: its gradient would be zero or wrong; use Unrolled"
        )


def check_scalar(method: str, problem: Problem, value: Any) -> None:
    """Raise an :class:`InputError` unless a loss is a scalar."""
    name = f"{type(problem).__name__}.{method}"
    if not (isinstance(value, Tensor) and value.dim() == 0):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"{name} returned {got}; it must return a scalar tensor, such as the mean over rows")


def _free(tree: Tree) -> Tree:
    return tree_map(lambda value: value.detach().clone().requires_grad_(value.is_floating_point()), tree)


def _reaches(tree: Tree, values: Iterable[Tensor]) -> bool:
    sources = [value for _, value in leaves(tree) if value.requires_grad]
    targets = [value for value in values if value.requires_grad]
    if not (sources and targets):
        return False
    ones = [torch.ones_like(value) for value in targets]
    slopes = torch.autograd.grad(targets, sources, ones, retain_graph=True, allow_unused=True)
    return any(slope is not None for slope in slopes)


def _words(chosen: Iterable[Path]) -> str:
    return " and ".join(path for path in get_args(Path) if path in chosen)
