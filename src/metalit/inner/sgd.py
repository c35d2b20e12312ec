"""Gradient descent with a fixed step size."""

import math
from dataclasses import dataclass
from typing import Any

from metalit.errors import InputError
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.tree import Tree, axpy


@dataclass(frozen=True)
class SGD(InnerOptimizer):
    """Differentiable gradient descent: θ ← θ − lr · ∇θ L(θ).

    Args:
        lr: the step size α of Finn et al. 2017, eq. 1.

    Raises:
        InputError: ``lr`` is not a finite positive number.
    """

    lr: float = 0.01

    def __post_init__(self) -> None:
        check_lr("SGD", self.lr)

    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> tuple[Tree, Any]:
        """Step against the gradient."""
        return axpy(-self.lr, grad_fn(inner), inner), state


def check_lr(owner: str, lr: float) -> None:
    """Raise an :class:`InputError` unless ``lr`` is finite and positive."""
    if not (math.isfinite(lr) and lr > 0):
        raise InputError(f"{owner}: lr={lr} must be a finite positive number, such as 0.01")
