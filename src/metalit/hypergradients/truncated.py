"""The truncated hypergradient: differentiate through the last inner steps alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad_and_value

from metalit.adapt import Iterate, Outer, Start, path
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.paths import ALL, Path
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


@dataclass(frozen=True)
class Truncated(Hypergradient):
    """Back-propagation through the last ``kept`` of all inner steps (Shaban et al. 2019).

    An earlier step is the identity in the inner variable and a constant in the outer one. With ``kept = steps`` it is
    :class:`~metalit.hypergradients.Unrolled`. For an inner loss of strong convexity α and a step size γ that is at most
    one over its smoothness, the error is at most (1 − γα)^kept / (γα) · ‖∇outer_loss‖ · max‖∂update/∂φ‖ (their
    proposition 3.1): it falls geometrically, and memory grows with ``kept`` alone.

    Args:
        steps: the number of inner steps.
        kept: how many of them, the last ones, are differentiated.

    Raises:
        InputError: no inner step, or ``kept`` outside 1 … steps.
    """

    carries: ClassVar[frozenset[Path]] = ALL
    steps: int = 10
    kept: int = 5

    def __post_init__(self) -> None:
        check_steps("Truncated", self.steps)
        if not 1 <= self.kept <= self.steps:
            raise InputError(f"Truncated: kept={self.kept} must be between 1 and steps={self.steps}")

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Differentiate the outer loss through the steps that are kept."""
        dropped = self.steps - self.kept

        def loss(outer: Outer) -> tuple[Tensor, Iterate]:
            *_, last = path(problem, optimizer, outer, task, self.steps, start, dropped=dropped)
            return problem.after(self.steps).outer_loss(last.inner, outer["problem"], task), last

        gradient, (value, last) = grad_and_value(loss, has_aux=True)(outer)
        return Estimate(value, gradient, last.inner, state=last.state)
