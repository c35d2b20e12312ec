"""The protocol of a solver of linear systems."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from metalit.tree import Tree

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
