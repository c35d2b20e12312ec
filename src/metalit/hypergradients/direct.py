"""No inner step: the gradient of the outer loss as it stands."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad_and_value

from metalit.adapt import Iterate, Outer, Start, path
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, problem_alone
from metalit.hypergradients.paths import Path
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem


@dataclass(frozen=True)
class Direct(Hypergradient):
    """d outer_loss(init(φ), φ) / dφ: plain optimisation of the outer variable.

    For a few-shot problem it is joint training on the query sets of all tasks, the baseline "pretrained on all tasks"
    of Finn et al. 2017; for a problem without an inner variable it is all that there is.
    """

    carries: ClassVar[frozenset[Path]] = frozenset({"init", "outer_loss"})

    steps: int = field(default=0, init=False, repr=False)

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Differentiate the outer loss at the initial inner variable."""

        def loss(own: dict[str, Tensor]) -> tuple[Tensor, Iterate]:
            (at,) = path(problem, optimizer, {**outer, "problem": own}, task, 0, start)
            return problem.after(0).outer_loss(at.inner, own, task), at

        gradient, (value, at) = grad_and_value(loss, has_aux=True)(outer["problem"])
        return Estimate(value, problem_alone(gradient, outer), at.inner, state=at.state)
