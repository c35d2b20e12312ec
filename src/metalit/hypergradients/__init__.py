"""Hypergradients: how the outer variable learns through the inner one. One file for each estimator."""

from metalit.hypergradients.base import Estimate, Hypergradient, Progress, over_tasks
from metalit.hypergradients.direct import Direct
from metalit.hypergradients.first_order import FirstOrder
from metalit.hypergradients.implicit import Implicit
from metalit.hypergradients.jtg import JTg
from metalit.hypergradients.recomputed import Recomputed
from metalit.hypergradients.tasks import for_each_task
from metalit.hypergradients.truncated import Truncated
from metalit.hypergradients.unrolled import Unrolled
from metalit.hypergradients.weights import Annealed

__all__ = [
    "Annealed",
    "Direct",
    "Estimate",
    "FirstOrder",
    "Hypergradient",
    "Implicit",
    "JTg",
    "Progress",
    "Recomputed",
    "Truncated",
    "Unrolled",
    "for_each_task",
    "over_tasks",
]
