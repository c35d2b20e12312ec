"""Newton's method: solves an inner problem that is quadratic in one step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from metalit.errors import InputError, check_not_negative
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.linsolve import single, solve
from metalit.tree import Tree, axpy, flatten, leaves, unflatten


@dataclass(frozen=True)
class Newton(InnerOptimizer):
    """Newton's step: θ ← θ − (H + damping · I)⁻¹ ∇θ L(θ), H = ∇²θ L(θ); exact in one step where L is quadratic in θ.

    The Hessian is written down, so θ should have hundreds of entries rather than thousands. It differentiates, also
    through H (closed-form solvers as inner optimisers: Bertinetto et al. 2019, "R2D2").

    Args:
        damping: what is added to the diagonal of the Hessian.

    Raises:
        InputError: a damping that is negative or not finite; before training: a Hessian that is singular.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative("Newton", "damping", self.damping)

    @property
    def second_order(self) -> bool:
        """It asks for the derivative of the inner gradient."""
        return True

    @property
    def damped_by(self) -> str:
        """Its own damping."""
        return "inner_optimizer.damping"

    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> tuple[Tree, Any]:
        """Step to the minimum of the quadratic model."""
        if next(leaves(inner), None) is None:
            return inner, state

        matrix, gradient = self._system(grad_fn, inner)
        return axpy(-1.0, unflatten(solve(matrix, gradient), inner), inner), state

    def check(self, grad_fn: GradFn, inner: Tree) -> None:
        """Raise an :class:`InputError` if the matrix at ``inner`` is singular, to rounding."""
        if next(leaves(inner), None) is None:
            return
        matrix = single(self._system(grad_fn, inner)[0])
        if not bool(torch.isfinite(matrix).all()):  # which is refused elsewhere
            return
        size = len(matrix)
        tolerance = size * torch.finfo(matrix.dtype).eps
        rank = int(torch.linalg.matrix_rank(matrix.double(), rtol=tolerance, hermitian=True))
        if rank < size:
            raise InputError(
                f"inner_optimizer Newton: the Hessian of the inner loss is singular, of rank {rank} with {size} "
                f"entries of the inner variable and damping={self.damping}; give it a positive damping=, such as 1e-3, "
                "or regularise the inner loss"
            )

    def _system(self, grad_fn: GradFn, inner: Tree) -> tuple[Tensor, Tensor]:
        """``H + damping · I`` and the gradient, written down."""

        def gradient(flat: Tensor) -> Tensor:
            return flatten(grad_fn(unflatten(flat, inner)))

        flat = flatten(inner)
        hessian = jacrev(gradient)(flat) + self.damping * torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        return hessian, gradient(flat)
