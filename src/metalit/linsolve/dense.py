"""Elimination, with the matrix written down."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from metalit.linsolve.base import LinearSolver, MatVec, Solution
from metalit.tree import Tree, flatten, unflatten


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
