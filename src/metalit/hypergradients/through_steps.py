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

    def loss(outer: Outer) -> tuple[Tensor, Iterate]:
        each = list(path(problem, optimizer, outer, task, steps, start, first_order))
        first = steps if weights is None else 1
        losses = [
            problem.after(count).outer_loss(each[count].inner, outer["problem"], task)
            for count in range(first, steps + 1)
        ]
        now = weights_at(weights, progress, losses[-1])
        if now is None:
            return losses[-1], each[-1]
        return reduce(add, (weight * value for weight, value in zip(now, losses, strict=True))), each[-1]

    gradient, (value, last) = grad_and_value(loss, has_aux=True)(outer)
    return Estimate(value, gradient, last.inner, state=last.state)
