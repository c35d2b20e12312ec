"""The outer loss after each inner step, differentiated through the inner loop."""

from functools import reduce
from operator import add
from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from metalit.adapt import Iterate, Outer, Start, path
from metalit.hypergradients.base import Estimate, Progress
from metalit.hypergradients.weights import Weights, weights_at
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


def through_steps(
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    steps: int,
    start: Start,
    weights: Weights | None,
    progress: Progress,
    first_order: bool = False,
) -> Estimate:
    """d/dφ Σₖ wₖ · outer_loss(θₖ(φ), φ); without weights only the last step counts.

    Args:
        problem, optimizer, outer, task, steps, start, first_order: see :func:`metalit.adapt.path`.
        weights: w₁ … w_steps, after ``progress`` outer steps.
    """

    given = start, weights, progress, first_order
    gradient, (value, last) = grad_and_value(
        lambda outer: weighted_loss(problem, optimizer, outer, task, steps, *given), has_aux=True
    )(outer)
    return Estimate(value, gradient, last.inner, state=last.state)


def weighted_loss(
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    task: Any,
    steps: int,
    start: Start = None,
    weights: Weights | None = None,
    progress: Progress = 0,
    first_order: bool = False,
) -> tuple[Tensor, Iterate]:
    """Σₖ wₖ · outer_loss(θₖ(φ), φ), which is differentiated, and where the inner loop ends; arguments as above."""
    each = list(path(problem, optimizer, outer, task, steps, start, first_order))
    first = steps if weights is None else 1
    losses = [
        problem.after(count).outer_loss(each[count].inner, outer["problem"], task) for count in range(first, steps + 1)
    ]
    now = weights_at(weights, progress, losses[-1])
    if now is None:
        return losses[-1], each[-1]
    return reduce(add, (weight * value for weight, value in zip(now, losses, strict=True))), each[-1]
