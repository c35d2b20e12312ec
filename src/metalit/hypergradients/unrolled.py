"""The exact hypergradient: differentiate through every inner step (second order)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad_and_value

from metalit.adapt import Iterate, Outer, Start, path
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.paths import ALL, Path
from metalit.hypergradients.weights import Annealed, Weights, check_weights
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """MAML's gradient: d/dφ Σₖ wₖ · outer_loss(θₖ(φ), φ), through all inner steps (Finn et al. 2017, eq. 1).

    Args:
        steps: the number of inner steps.
        weights: w₁ … w_steps, that sum to 1: how much the loss after each inner step counts (the multi-step loss of
            Antoniou et al. 2019, eq. 4). :class:`~metalit.hypergradients.weights.Annealed` ones change over the outer
            steps. If not given, only the last step counts.

    Raises:
        InputError: no inner step, or weights of another number or another sum.
    """

    carries: ClassVar[frozenset[Path]] = ALL
    steps: int = 1
    weights: Weights | None = None

    def __post_init__(self) -> None:
        check_steps("Unrolled", self.steps)
        if isinstance(self.weights, Annealed):
            self.weights.check("Unrolled: weights", self.steps)
        elif self.weights is not None:
            check_weights("Unrolled: weights", self.weights, self.steps)

    def weights_at(self, progress: Progress, like: Tensor) -> Sequence[float | Tensor] | None:
        """The weight of the loss after each inner step, after ``progress`` outer steps; None: only the last counts."""
        return self.weights.at(progress, like) if isinstance(self.weights, Annealed) else self.weights

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Differentiate the weighted outer loss through the inner loop."""

        def loss(outer: Outer) -> tuple[Tensor, Iterate]:
            each = list(path(problem, optimizer, outer, task, self.steps, start))
            first = self.steps if self.weights is None else 1
            losses = [
                problem.after(steps).outer_loss(each[steps].inner, outer["problem"], task)
                for steps in range(first, self.steps + 1)
            ]
            weights = self.weights_at(progress, losses[-1])
            if weights is None:
                return losses[-1], each[-1]
            return reduce(add, (weight * value for weight, value in zip(weights, losses, strict=True))), each[-1]

        gradient, (value, last) = grad_and_value(loss, has_aux=True)(outer)
        return Estimate(value, gradient, last.inner, state=last.state)
