"""The exact hypergradient: differentiate through every inner step (second order)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from metalit.adapt import Outer, Start
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.first_order import FirstOrder
from metalit.hypergradients.paths import ALL, Path
from metalit.hypergradients.through_steps import through_steps
from metalit.hypergradients.weights import Weights, check_given
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
        first_order_until: the first so many outer steps are of first order, by :class:`FirstOrder` with the same
            weights, which is cheaper (the derivative-order annealing of Antoniou et al. 2019, section 4). Each order is
            a program of its own where ``model.compile`` is set; the second is compiled when it begins.

    Raises:
        InputError: no inner step, weights of another number or another sum, a negative ``first_order_until``.
    """

    carries: ClassVar[frozenset[Path]] = ALL
    steps: int = 1
    weights: Weights | None = None
    first_order_until: int = 0

    def __post_init__(self) -> None:
        check_steps("Unrolled", self.steps)
        check_given("Unrolled: weights", self.weights, self.steps)
        if not (isinstance(self.first_order_until, int) and self.first_order_until >= 0):
            raise InputError(
                f"Unrolled: first_order_until={self.first_order_until!r} must be a whole number of outer steps"
            )

    @property
    def begins(self) -> tuple[int, ...]:
        """0, and where the second order begins."""
        return (0, self.first_order_until) if self.first_order_until else (0,)

    def at(self, progress: int) -> Hypergradient:
        """Return :class:`FirstOrder` before ``first_order_until``, and from then on this without it."""
        if progress < self.first_order_until:
            return FirstOrder(self.steps, self.weights)
        return replace(self, first_order_until=0) if self.first_order_until else self

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
        if self.first_order_until:
            return self.at(int(progress))(problem, optimizer, outer, task, start, progress)
        return through_steps(problem, optimizer, outer, task, self.steps, start, self.weights, progress)
