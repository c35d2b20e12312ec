"""Gradient descent whose step sizes are learned, one for each entry of the inner variable."""

from dataclasses import dataclass
from typing import Any

import torch

from metalit.inner.base import GradFn, InnerOptimizer
from metalit.inner.sgd import check_lr
from metalit.tree import Tree, tree_map


@dataclass(frozen=True)
class MetaSGD(InnerOptimizer):
    """Meta-SGD: θ ← θ − α ⊙ ∇θ L(θ), with α an outer parameter of θ's shape (Li et al. 2017, eq. 2).

    After one step, ∂L_query/∂α = −∇L_support(θ) ⊙ ∇L_query(θ′). The learned α may become negative, as in the paper.

    Args:
        lr: the value that every entry of α starts from.

    Raises:
        InputError: ``lr`` is not a finite positive number.
    """

    lr: float = 0.01

    def __post_init__(self) -> None:
        check_lr("MetaSGD", self.lr)

    def outer(self, inner: Tree, steps: int) -> dict[str, Tree]:
        """``{"lr": α}``: one step size for each entry of the inner variable."""
        return {"lr": tree_map(lambda value: torch.full_like(value, self.lr), inner)}

    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> tuple[Tree, Any]:
        """Step against the gradient, entry by entry."""
        return tree_map(
            lambda value, gradient, rate: value - rate * gradient, inner, grad_fn(inner), outer["lr"]
        ), state
