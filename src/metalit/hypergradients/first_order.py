"""The first-order hypergradient: inner gradients count as constants."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad_and_value

from metalit.adapt import Iterate, Outer, Start, path
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.paths import ALL, Path
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


@dataclass(frozen=True)
class FirstOrder(Hypergradient):
    """FOMAML's gradient: inner gradients are constants, all else is differentiated (Finn et al. 2017, section 5.2).

    For MAML it is ∇ outer_loss taken at the adapted weights: no second derivative is ever computed. What only the
    inner loss knows of the outer variable gets no gradient.

    Args:
        steps: the number of inner steps.

    Raises:
        InputError: no inner step.
    """

    carries: ClassVar[frozenset[Path]] = ALL - {"inner_loss"}
    second_order: ClassVar[bool] = False
    steps: int = 1

    def __post_init__(self) -> None:
        check_steps("FirstOrder", self.steps)

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Differentiate the outer loss after the last step, with constant inner gradients."""

        def loss(outer: Outer) -> tuple[Tensor, Iterate]:
            *_, last = path(problem, optimizer, outer, task, self.steps, start, first_order=True)
            return problem.after(self.steps).outer_loss(last.inner, outer["problem"], task), last

        gradient, (value, last) = grad_and_value(loss, has_aux=True)(outer)
        return Estimate(value, gradient, last.inner, state=last.state)
