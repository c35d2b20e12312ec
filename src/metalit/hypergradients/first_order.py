"""The first-order hypergradient: inner gradients count as constants."""

from dataclasses import dataclass
from typing import Any, ClassVar

from metalit.adapt import Outer, Start
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.paths import ALL, Path
from metalit.hypergradients.through_steps import through_steps
from metalit.hypergradients.weights import Weights, check_given
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


@dataclass(frozen=True)
class FirstOrder(Hypergradient):
    """FOMAML's gradient: inner gradients are constants, all else is differentiated (Finn et al. 2017, section 5.2).

    For MAML it is ∇ outer_loss taken at the adapted weights: no second derivative is ever computed. What only the
    inner loss knows of the outer variable gets no gradient.

    Args:
        steps: the number of inner steps.
        weights: how much the loss after each inner step counts; see :class:`~metalit.hypergradients.Unrolled`.

    Raises:
        InputError: no inner step, or weights of another number or another sum.
    """

    carries: ClassVar[frozenset[Path]] = ALL - {"inner_loss"}
    second_order: ClassVar[bool] = False
    steps: int = 1
    weights: Weights | None = None

    def __post_init__(self) -> None:
        check_steps("FirstOrder", self.steps)
        check_given("FirstOrder: weights", self.weights, self.steps)

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Differentiate the weighted outer loss through the inner loop, with constant inner gradients."""
        given = self.steps, start, self.weights, progress
        return through_steps(problem, optimizer, outer, task, *given, first_order=True)
