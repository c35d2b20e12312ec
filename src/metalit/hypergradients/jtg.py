"""The gradient of ½‖∇θ f‖²: how the outer variable makes the inner gradient smaller."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.func import vjp

from metalit.adapt import Outer, Start, beginning, path
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps, problem_alone
from metalit.hypergradients.paths import Path
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import dot, tree_map


@dataclass(frozen=True)
class JTg(Hypergradient):
    """Jᵀg = ∇φ ½‖∇θ f(θ₀, φ)‖² with f = inner_loss, g = ∇θ f and J = ∂g/∂φ, all at (θ₀, φ₀); ``loss`` is ½‖g‖².

    The rule of θ/φ optimisation: θ ← θ − αg(θ₀, φ₀), then φ ← φ − βJᵀg(θ₀, φ₀): both products are taken before either
    variable moves, and θ₀ is a constant. It is not the gradient of f after the step: the indirect term of one unrolled
    step of size α is −α · Jᵀ∇θ f(θ₁, φ₀). The outer loss takes no part.

    Args:
        steps: how many inner steps θ takes, at φ₀.

    Raises:
        InputError: no inner step.
    """

    carries: ClassVar[frozenset[Path]] = frozenset({"inner_loss"})
    steps: int = 1

    def __post_init__(self) -> None:
        check_steps("JTg", self.steps)

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Take g and Jᵀg in one sweep each, then move θ."""
        own = outer["problem"]
        before = beginning(problem, optimizer, own, task, start)

        g, pull_back = vjp(lambda own: problem.inner_grad(before.inner, own, task, 0), own)[:2]
        (product,) = pull_back(tree_map(problem.scaled, g))
        *_, last = path(problem, optimizer, outer, task, self.steps, before)
        return Estimate(problem.scaled(0.5 * dot(g, g)), problem_alone(product, outer), last.inner, state=last.state)
