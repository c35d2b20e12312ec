"""Conjugate gradients, on the system itself and on its normal equation."""

from dataclasses import dataclass

import torch

from metalit.errors import InputError
from metalit.linsolve.base import LinearSolver, MatVec, Solution
from metalit.tree import Tree, axpy, dot, leaves, tree_map


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients from x = 0; exact after as many steps as A has distinct eigenvalues (Hestenes, Stiefel 1952).

    A must be positive definite. Where a direction of no or negative curvature is met, x stays as it was before it, and
    ``indefinite`` is true.

    Args:
        iterations: the number of steps.
        tolerance: x stays as it is once ‖b − Ax‖ ≤ tolerance · ‖b‖, or that is rounding.

    Raises:
        InputError: no step, or a negative tolerance.
    """

    iterations: int = 20
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        _check("CG", self.iterations, self.tolerance)

    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Iterate; steps beyond the tolerance change nothing."""
        # entries of at most 1, and an end at rounding: squares that underflow would look like no curvature
        size = torch.stack([leaf.abs().max() for _, leaf in leaves(b)]).max()
        unit = torch.where(size > 0, size, 1.0)
        residual = direction = tree_map(lambda value: value / unit, b)
        x = tree_map(torch.zeros_like, b)
        square = dot(residual, residual)
        enough = max(self.tolerance, torch.finfo(square.dtype).eps) ** 2 * square
        indefinite = torch.zeros_like(square, dtype=torch.bool)
        for _ in range(self.iterations):
            product = _product(matvec, direction)
            curvature = dot(direction, product)
            active = square > enough
            # not "<= 0", which is false for NaN
            indefinite = indefinite | (active & ~(curvature > 0))
            active = active & ~indefinite
            step = torch.where(active, square, 0.0) / torch.where(active, curvature, 1.0)
            x, residual = axpy(step, direction, x), axpy(-step, product, residual)
            before, square = square, dot(residual, residual)
            direction = axpy(torch.where(active, square, 0.0) / torch.where(active, before, 1.0), direction, residual)
        return Solution(tree_map(lambda value: unit * value, x), indefinite)


@dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equation A²x = Ab: for A of any signs (Hestenes, Stiefel 1952, section 10).

    A² is positive definite wherever A is invertible, and its condition number is the square of A's: expect more steps,
    of two products each. It sees no curvature: ``indefinite`` stays false. Of a singular A it finds the solution of
    least norm.

    Args:
        iterations: the number of steps.
        tolerance: x stays as it is once ‖A(b − Ax)‖ ≤ tolerance · ‖Ab‖, or that is rounding.

    Raises:
        InputError: no step, or a negative tolerance.

    >>> A, b = torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor([2.0, 3.0])
    >>> NormalCG(2)(lambda v: A @ v, b).x
    tensor([ 1., -3.])
    """

    iterations: int = 20
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        _check("NormalCG", self.iterations, self.tolerance)

    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Iterate."""
        return CG(self.iterations, self.tolerance)(lambda v: matvec(matvec(v)), _product(matvec, b))


def _check(owner: str, iterations: int, tolerance: float) -> None:
    if iterations < 1:
        raise InputError(f"{owner}: iterations={iterations} must be at least 1")
    if not tolerance >= 0:
        raise InputError(f"{owner}: tolerance={tolerance} must not be negative")


def _product(matvec: MatVec, direction: Tree) -> Tree:
    """``A v`` as ``|v| · A(v/|v|)``: in half precision the entries of a product with a small v would vanish."""
    size = torch.stack([leaf.abs().max() for _, leaf in leaves(direction)]).max()
    # a power of 2, so that nothing is rounded
    unit = torch.exp2(torch.floor(torch.log2(torch.where(size > 0, size, 1.0))))
    product = matvec(tree_map(lambda value: value / unit, direction))
    return tree_map(lambda value: unit * value, product)
