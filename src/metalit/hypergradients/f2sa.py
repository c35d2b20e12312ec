"""A hypergradient of first derivatives alone: what a penalty on the outer loss changes in the inner problem's value."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, ClassVar

from torch import Tensor
from torch.func import grad

from metalit.adapt import Outer, Start, beginning, path
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps, problem_alone
from metalit.hypergradients.paths import Path
from metalit.hypergradients.stationary import check_stationary, not_stationary
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, axpy, leaves


@dataclass(frozen=True)
class F2SA(Hypergradient):
    """The fully first-order bilevel gradient, of the penalty λ(g(θ, φ) − min g) on f (Kwon et al. 2023, "F²SA").

    ∇φ f(θ_λ, φ) + λ (∇φ g(θ_λ, φ) − ∇φ g(θ*, φ)),  θ* = argmin g,  θ_λ = argmin g + f/λ

    f is the outer and g the inner loss; no product with a Hessian or Jacobian is taken. Where g is strongly convex it
    tends to :class:`~metalit.hypergradients.Implicit`'s as λ grows, with an error of O(1/λ), and of rounding that grows
    with λ: half precision is refused. Both inner variables take ``steps`` steps from the same start on the same
    minibatches: what either lacks to its minimum, which λ would enlarge, cancels to O(1/λ) too. Where the inner loss
    takes minibatches, ∇φ g are of the next one. ``loss`` is that at θ*, which is the inner variable that is found.

    Args:
        steps: the number of inner steps, which are taken twice.
        weight: λ, so large that θ_λ is near θ*.
        stationary: see :class:`~metalit.hypergradients.Implicit`.

    Raises:
        InputError: no inner step, a weight that is not a finite positive number, ``stationary`` that is not positive.
    """

    carries: ClassVar[frozenset[Path]] = frozenset({"inner_loss", "outer_loss"})
    needs: ClassVar[frozenset[Path]] = frozenset({"inner_loss"})
    second_order: ClassVar[bool] = False
    differences: ClassVar[bool] = True
    steps: int = 10
    weight: float = 100.0
    stationary: float = 0.01

    def __post_init__(self) -> None:
        check_steps("F2SA", self.steps)
        if not (isfinite(self.weight) and self.weight > 0):
            raise InputError(f"F2SA: weight={self.weight} must be a finite positive number, such as 100")
        check_stationary("F2SA", self.stationary)

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Adapt with and without the penalty, and compare."""
        own, judged = outer["problem"], problem.after(self.steps)
        *_, last = path(problem, optimizer, outer, task, self.steps, start)
        share = 1 / (self.weight * problem.scaled(next(leaf for _, leaf in leaves(own)).new_ones(())))

        def both(inner: Tree, step: int) -> Tree:
            slope = grad(lambda inner: judged.outer_loss(inner, own, task))(inner)
            return axpy(share, slope, problem.inner_grad(inner, own, task, step))

        shifted, state = beginning(problem, optimizer, own, task, start)
        for step in range(self.steps):
            shifted, state = optimizer.update(partial(both, step=step), shifted, state, outer["optimizer"], step)

        def value(own: dict[str, Tensor]) -> Tensor:
            above, below = (problem.inner_loss(at, own, task, self.steps) for at in (shifted, last.inner))
            return judged.outer_loss(shifted, own, task) + problem.scaled(self.weight * (above - below))

        loss = judged.outer_loss(last.inner, own, task)
        return Estimate(loss, problem_alone(grad(value)(own), outer), last.inner, state=last.state)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Warn where the inner point is not stationary."""
        return not_stationary("F2SA", metrics, self.stationary)
