"""Nyström's approximation of a matrix by some of its columns, inverted in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import one_hot

from metalit.errors import InputError
from metalit.keys import permutation
from metalit.linsolve.base import LinearSolver, MatVec, Solution
from metalit.linsolve.dense import single, solve
from metalit.tree import Tree, flatten, unflatten

_KEY = 2023  # chooses the columns: the same ones at every step, of every run


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """x = (A_K + ρI)⁻¹ b, A_K = C W⁺ Cᵀ, with C some columns of A and W their rows among these (Hataya, Yamada 2023).

    By Woodbury's identity x = b/ρ − C (W + CᵀC/ρ)⁻¹ Cᵀb / ρ²: as many products as columns, all at once, and no
    iteration. It is exact for A + ρI once there are as many columns as A has rank, if they are of its range; where A
    has a few large eigenvalues, few do. ``indefinite`` says whether W has an eigenvalue below 0, by more than √(machine
    epsilon) of its largest entry: then A has one too. An A of low rank is right.

    ρ stands for the directions that are left out: the smaller it is, the larger is x there. It is added to A, so leave
    the damping of :class:`~metalit.hypergradients.Implicit` at 0.

    Args:
        rank: the number of columns, which a fixed key chooses; at most all.
        rho: ρ.

    Raises:
        InputError: no column, or ρ that is not a finite positive number.

    >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
    >>> Nystrom(2, rho=1.0)(lambda v: A @ v, b).x.round(decimals=4)  # that of A + I
    tensor([0.7273, 0.8182])
    """

    rank: int = 10
    rho: float = 0.01

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"Nystrom: rank={self.rank} must be at least 1")
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise InputError(f"Nystrom: rho={self.rho} must be a finite positive number, such as 0.01")

    def __call__(self, matvec: MatVec, b: Tree) -> Solution:
        """Take the columns, and invert."""
        flat = flatten(b)
        chosen = permutation(torch.tensor(_KEY, device=flat.device), flat.numel())[: self.rank]
        basis = one_hot(chosen, flat.numel()).to(flat.dtype)
        rows = single(vmap(lambda column: flatten(matvec(unflatten(column, b))))(basis))  # Cᵀ, of a symmetric A
        corner, right = rows @ basis.mT.to(rows.dtype), single(flat)
        matrix = corner + rows @ rows.mT / self.rho
        # columns that depend on each other would make it singular; so much is rounding
        eps, identity = torch.finfo(matrix.dtype).eps, torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        small = solve(matrix + eps * _size(matrix) * identity, rows @ right)
        x = (right - rows.mT @ small / self.rho) / self.rho
        _, failed = torch.linalg.cholesky_ex(corner + eps**0.5 * _size(corner) * identity)
        return Solution(unflatten(x.to(flat.dtype), b), failed > 0)


def _size(matrix: Tensor) -> Tensor:
    """The largest entry, or 1 if all are 0."""
    size = matrix.abs().amax()
    return torch.where(size > 0, size, 1.0)
