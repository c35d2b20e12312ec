"""Hypergradients: how the outer variable learns through the inner one. One file for each estimator."""

from metalit.hypergradients.base import Estimate, Hypergradient, Progress, over_tasks
from metalit.hypergradients.direct import Direct
from metalit.hypergradients.f2sa import F2SA
from metalit.hypergradients.finite_difference import FiniteDifference
from metalit.hypergradients.first_order import FirstOrder
from metalit.hypergradients.implicit import Implicit
from metalit.hypergradients.jtg import JTg
from metalit.hypergradients.recomputed import Recomputed
from metalit.hypergradients.reptile import Reptile
from metalit.hypergradients.tasks import for_each_task
from metalit.hypergradients.truncated import Truncated
from metalit.hypergradients.unrolled import Unrolled
from metalit.hypergradients.weights import Annealed

__all__ = [
    "F2SA",
    "Annealed",
    "Direct",
    "Estimate",
    "FiniteDifference",
    "FirstOrder",
    "Hypergradient",
    "Implicit",
    "JTg",
    "Progress",
    "Recomputed",
    "Reptile",
    "Truncated",
    "Unrolled",
    "for_each_task",
    "over_tasks",
]
