"""The implicit hypergradient: differentiate the condition that the inner problem is solved, not the way there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from metalit.adapt import Outer, Start, path
from metalit.errors import check_not_negative
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps, problem_alone
from metalit.hypergradients.paths import Path
from metalit.hypergradients.stationary import check_stationary, not_stationary
from metalit.inner.base import InnerOptimizer
from metalit.linsolve import CG, Dense, LinearSolver, Nystrom
from metalit.problem import Problem
from metalit.tree import Tree, axpy, norm

_ENOUGH = 0.1  # the largest relative residual without a warning


@dataclass(frozen=True)
class Implicit(Hypergradient):
    """dφ outer_loss(θ*(φ), φ) by the implicit function theorem (Pedregosa 2016; Rajeswaran et al. 2019, "iMAML").

    ∂outer_loss/∂φ − Jᵀq,  (H + damping · I) q = ∂outer_loss/∂θ,  H = ∂²inner_loss/∂θ²,  J = ∂²inner_loss/∂φ∂θ at θ*.

    Valid at a stationary point of the inner loss where H is positive definite: take enough inner steps (a warm start
    saves them), and watch ``inner_grad_norm``. Where the inner loop starts does not matter there, so what only ``init``
    knows of the outer variable gets no gradient. Where the inner loss takes minibatches, H and J are of the next one.

    Args:
        steps: the number of inner steps; memory does not grow with it.
        solver: how the linear system is solved: :class:`~metalit.linsolve.CG`, ``NormalCG``, ``Neumann``, ``Nystrom``
            or ``Dense``.
        damping: what is added to the diagonal of H.
        stationary: the inner gradient counts as solved below this share of what it is at ``init``; above, the learner
            warns.

    Raises:
        InputError: no inner step, a negative damping, or ``stationary`` that is not positive.
    """

    carries: ClassVar[frozenset[Path]] = frozenset({"inner_loss", "outer_loss"})
    needs: ClassVar[frozenset[Path]] = frozenset({"inner_loss"})
    steps: int = 10
    solver: LinearSolver = field(default_factory=CG)
    damping: float = 0.0
    stationary: float = 0.01

    def __post_init__(self) -> None:
        check_steps("Implicit", self.steps)
        check_not_negative("Implicit", "damping", self.damping)
        check_stationary("Implicit", self.stationary)

    @property
    def damped_by(self) -> str:
        """Its damping, where the solver is exact: of a singular H there is no solution, and CG's steps grow."""
        return "hypergradient.damping" if isinstance(self.solver, Dense | CG) else ""

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Adapt, then solve; ``metrics`` are ``solver_residual``, ‖b − Aq‖/‖b‖, and ``indefinite``, 0 or 1."""
        own = outer["problem"]
        *_, (inner, state) = path(problem, optimizer, outer, task, self.steps, start)

        def gradient(inner: Tree, own: dict[str, Tensor]) -> Tree:
            return problem.inner_grad(inner, own, task, self.steps)

        (b, direct), loss = grad_and_value(problem.after(self.steps).outer_loss, argnums=(0, 1))(inner, own, task)
        _, hessian = vjp(lambda inner: gradient(inner, own), inner)[:2]
        q, indefinite = self.solver(lambda v: axpy(self.damping, v, hessian(v)[0]), b)
        _, pull_back = vjp(gradient, inner, own)[:2]
        product, indirect = pull_back(q)
        left = norm(axpy(-1.0, axpy(self.damping, q, product), b))
        size = norm(b)
        metrics = {
            "solver_residual": left / torch.where(size > 0, size, 1.0),
            "indefinite": indefinite.to(left.dtype),
        }
        return Estimate(loss, problem_alone(axpy(-1.0, indirect, direct), outer), inner, metrics, state)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Warn where the inner point is not stationary, the Hessian not positive definite, or the system not solved."""
        found = not_stationary("Implicit", metrics, self.stationary)
        if metrics["indefinite"] > 0:
            found["indefinite"] = (
                "Implicit: the Hessian of the inner loss is not positive definite at the inner point "
                f"({100 * metrics['indefinite']:.3g} % of the tasks); raise hypergradient.damping, regularise the "
                "inner loss, or use Unrolled"
            )
        elif not metrics["solver_residual"] <= _ENOUGH:
            more = "give it more iterations (Neumann: a scale below 2/‖H‖), or raise hypergradient.damping"
            if isinstance(self.solver, Nystrom):
                more = "give it a higher rank, or a smaller rho"
            found["not solved"] = (
                f"Implicit: {type(self.solver).__name__} left {100 * metrics['solver_residual']:.3g} % of its "
                f"right-hand side; {more}"
            )
        return found
