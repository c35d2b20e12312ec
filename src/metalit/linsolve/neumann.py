"""The Neumann series for the inverse of a matrix."""

import math
from dataclasses import dataclass

import torch

from metalit.errors import InputError
from metalit.linsolve.base import LinearSolver, MatVec, Solution
from metalit.tree import Tree, axpy, flatten, tree_map


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
