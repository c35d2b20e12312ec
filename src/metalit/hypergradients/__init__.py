"""Hypergradients: how the outer variable learns through the inner one. One file for each estimator."""

from metalit.hypergradients.base import Estimate, Hypergradient, for_each_task, over_tasks
from metalit.hypergradients.first_order import FirstOrder
from metalit.hypergradients.unrolled import Unrolled

__all__ = ["Estimate", "FirstOrder", "Hypergradient", "Unrolled", "for_each_task", "over_tasks"]
