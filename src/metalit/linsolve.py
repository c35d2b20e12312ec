"""Linear systems Ax = b with A known by its products alone: a fixed number of steps, so that they run under ``vmap``.

>>> import torch
>>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
>>> [solver(lambda v: A @ v, b).x.round(decimals=4) for solver in (CG(2), Dense())]
[tensor([1., 1.]), tensor([1., 1.])]
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metalit.errors import InputError
from metalit.tree import Tree, axpy, dot, flatten, leaves, tree_map, unflatten

MatVec = Callable[[Tree], Tree]


class Solution(NamedTuple):
    """An answer ``x``, and whether A was found not to be positive definite.

    That is a flag and no exception, for which a GPU would have to be waited for.
    """

    x: Tree
    indefinite: Tensor


class LinearSolver(ABC):
    """Solves Ax = b for a symmetric A."""

    @abstractmethod
    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Return x, shaped like ``b``; ``matvec`` maps a tree of that shape to its product with A."""


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
        if self.iterations < 1:
            raise InputError(f"CG: iterations={self.iterations} must be at least 1")
        if not self.tolerance >= 0:
            raise InputError(f"CG: tolerance={self.tolerance} must not be negative")

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
class Neumann(LinearSolver):
    """The Neumann series x = η Σᵢ (I − ηA)ⁱ b, i = 0 … terms − 1 (Lorraine, Vicol, Duvenaud 2020, algorithm 3).

    It converges where A is positive definite and η < 2/‖A‖; with η the step size of gradient descent, it is that
    descent's unroll of as many steps, taken at its end. It sees no curvature: ``indefinite`` stays false.

    Args:
        terms: how many terms are summed.
        scale: η.

    Raises:
        InputError: no term, or a scale that is not a finite positive number.
    """

    terms: int = 20
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise InputError(f"Neumann: terms={self.terms} must be at least 1")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"Neumann: scale={self.scale} must be a finite positive number below 2/‖A‖, such as 0.1")

    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Sum the series."""
        total = term = b
        for _ in range(self.terms - 1):
            term = axpy(-self.scale, matvec(term), term)
            total = axpy(1.0, term, total)
        never = torch.zeros((), dtype=torch.bool, device=flatten(b).device)
        return Solution(tree_map(lambda value: self.scale * value, total), never)


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Write A down, column by column, and solve by elimination: n products, n² numbers, n³ operations.

    Any invertible A is solved; ``indefinite`` says whether it lacks a Cholesky factor.
    """

    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Solve."""
        flat = flatten(b)
        basis = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        matrix = vmap(lambda column: flatten(matvec(unflatten(column, b))))(basis).mT
        # _ex: flags instead of exceptions, which vmap and a GPU would have to wait for
        _, failed = torch.linalg.cholesky_ex(single(matrix))
        return Solution(unflatten(solve(matrix, flat), b), failed > 0)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a system that is written down: ``[n, n]`` and ``[n]``, in single precision at least."""
    solution, _ = torch.linalg.solve_ex(single(matrix), single(right))
    return solution.to(right.dtype)


def single(value: Tensor) -> Tensor:
    """Cast a tensor to single precision, unless it is of more: half has no elimination."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _product(matvec: MatVec, direction: Tree) -> Tree:
    """``A v`` as ``|v| · A(v/|v|)``: in half precision the entries of a product with a small v would vanish."""
    size = torch.stack([leaf.abs().max() for _, leaf in leaves(direction)]).max()
    # a power of 2, so that nothing is rounded
    unit = torch.exp2(torch.floor(torch.log2(torch.where(size > 0, size, 1.0))))
    product = matvec(tree_map(lambda value: value / unit, direction))
    return tree_map(lambda value: unit * value, product)
