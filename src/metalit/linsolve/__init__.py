"""Linear systems Ax = b with A known by its products alone: a fixed number of steps, so that they run under ``vmap``.

>>> import torch
>>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
>>> [solver(lambda v: A @ v, b).x.round(decimals=4) for solver in (CG(2), Dense())]
[tensor([1., 1.]), tensor([1., 1.])]
"""

from metalit.linsolve.base import LinearSolver, MatVec, Solution
from metalit.linsolve.conjugate import CG, NormalCG
from metalit.linsolve.dense import Dense, single, solve
from metalit.linsolve.neumann import Neumann
from metalit.linsolve.nystrom import Nystrom

__all__ = [
    "CG",
    "Dense",
    "LinearSolver",
    "MatVec",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Solution",
    "single",
    "solve",
]
