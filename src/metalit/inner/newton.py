"""Newton's method: solves an inner problem that is quadratic in one step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from metalit.errors import InputError
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.linsolve import solve
from metalit.tree import Tree, axpy, flatten, leaves, unflatten


@dataclass(frozen=True)
class Newton(InnerOptimizer):
    """Newton's step: θ ← θ − (H + damping · I)⁻¹ ∇θ L(θ), H = ∇²θ L(θ); exact in one step where L is quadratic in θ.

    The Hessian is written down, so θ should have hundreds of entries rather than thousands. It differentiates, also
    through H (closed-form solvers as inner optimisers: Bertinetto et al. 2019, "R2D2").

    Args:
        damping: what is added to the diagonal of the Hessian.

    Raises:
        InputError: a damping that is negative or not finite.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise InputError(f"Newton: damping={self.damping} must be a finite number, 0 or more")

    @property
    def second_order(self) -> bool:
        """It asks for the derivative of the inner gradient."""
        return True

    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> tuple[Tree, Any]:
        """Step to the minimum of the quadratic model."""
        if next(leaves(inner), None) is None:
            return inner, state

        def slope(flat: Tensor) -> Tensor:
            return flatten(grad_fn(unflatten(flat, inner)))

        flat = flatten(inner)
        hessian = jacrev(slope)(flat) + self.damping * torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        return axpy(-1.0, unflatten(solve(hessian, slope(flat)), inner), inner), state
