"""The exact hypergradient with differences of first derivatives for its Hessian products."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp

from metalit.adapt import Outer, Start, beginning
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps
from metalit.hypergradients.paths import ALL, Path
from metalit.hypergradients.recomputed import as_tree, pulled
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Problem
from metalit.tree import Tree, axpy, norm, tree_map


@dataclass(frozen=True)
class FiniteDifference(Hypergradient):
    """:class:`Unrolled`'s gradient, with a difference for each second derivative (Liu et al. 2019, "DARTS", eq. 7).

    ∂g/∂(θ, φ)ᵀu ≈ ‖u‖ (∇L(θ⁺, φ) − ∇L(θ⁻, φ)) / 2ε,  θ± = θ ± ε u/‖u‖,  L = inner_loss, g = ∇θ L, ∇ by θ and φ

    With one step from a constant start it is that of DARTS, where u is −ξ ∇θ outer_loss; with more,
    each step is swept back in the same way, from its iterate. The error is that of central differences, ε²/6 times a
    third derivative along the direction, and none where the inner loss is quadratic in θ. Rounding is divided by ε:
    single precision is right to about four digits, and half precision is refused.

    Args:
        steps: the number of inner steps.
        epsilon: ε, by how much θ is moved as a whole.

    Raises:
        InputError: no inner step, or ε that is not a finite positive number; before training: an inner optimiser that
            takes other than one inner gradient in a step.
    """

    carries: ClassVar[frozenset[Path]] = ALL
    second_order: ClassVar[bool] = False
    differences: ClassVar[bool] = True
    steps: int = 1
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_steps("FiniteDifference", self.steps)
        if not (isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"FiniteDifference: epsilon={self.epsilon} must be a finite positive number, such as 0.01")

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Adapt, then sweep back."""
        own, rates = outer["problem"], outer["optimizer"]

        def first_iterate(own: dict[str, Tensor]) -> tuple[Tree, dict[str, Any]]:
            inner, state = beginning(problem, optimizer, own, task, start)
            return inner, as_tree(state)

        def slopes(number: int, inner: Tree) -> tuple[Tree, dict[str, Tensor]]:
            return grad(lambda inner, own: problem.inner_loss(inner, own, task, number), argnums=(0, 1))(inner, own)

        path, gradients = [first_iterate(own)], []
        # without an inner variable there is nothing to sweep back through
        for number in range(self.steps if tree_leaves(path[0][0]) else 0):

            def grad_fn(point: Tree, number: int = number) -> Tree:
                gradients.append(problem.inner_grad(point, own, task, number))
                return gradients[-1]

            inner, state, _ = _taken(optimizer, number, *path[-1], rates, grad_fn)
            path.append((inner, state))
        judged, (inner, state) = problem.after(self.steps).outer_loss, path.pop()
        (at_inner, gradient), value = grad_and_value(judged, argnums=(0, 1))(inner, own, task)
        learned, pull = tree_map(torch.zeros_like, rates), (at_inner, pytree_map(torch.zeros_like, state))
        for number, (before, given) in reversed(list(enumerate(zip(path, gradients, strict=True)))):
            step = partial(_constant, optimizer, number)
            (_, _, point), back = vjp(step, *before, rates, given)[:2]
            *direct, u = back((*pull, pytree_map(torch.zeros_like, point)))
            by_inner, by_outer = self._product(u, point, partial(slopes, number))
            *indirect, _ = back((*pytree_map(torch.zeros_like, pull), by_inner))
            *pull, by_rates = pytree_map(torch.add, direct, indirect)
            learned, gradient = axpy(1.0, by_rates, learned), axpy(1.0, by_outer, gradient)
        (through,) = pulled(first_iterate, (own,), tuple(pull))
        return Estimate(
            value, {"problem": axpy(1.0, through, gradient), "optimizer": learned}, inner, state=state.get("state", {})
        )

    def _product(self, u: Tree, point: Tree, slopes: Callable[[Tree], tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
        """∂g/∂(θ, φ)ᵀu at a point, given ∇L by θ and φ."""
        size = norm(u)
        size = torch.where(size > 0, size, 1.0)
        ahead, behind = (slopes(axpy(sign * self.epsilon / size, u, point)) for sign in (1, -1))
        return pytree_map(lambda a, b: size / (2 * self.epsilon) * (a - b), ahead, behind)


def _taken(
    optimizer: InnerOptimizer, number: int, inner: Tree, state: dict[str, Any], rates: Any, grad_fn: GradFn
) -> tuple[Tree, dict[str, Any], Tree]:
    """The inner variable and state after a step, and where the inner gradient was taken.

    Raises:
        InputError: it was taken at none or several points.
    """
    points = []

    def noted(point: Tree) -> Tree:
        points.append(point)
        return grad_fn(point)

    inner, after = optimizer.update(noted, inner, state.get("state"), rates, number)
    if len(points) != 1:
        raise InputError(
            f"hypergradient FiniteDifference needs an inner optimiser that takes one inner gradient in each step, and "
            f"{type(optimizer).__name__} takes {len(points)}; use SGD inside, or Unrolled outside"
        )
    return inner, as_tree(after), points[0]


def _constant(
    optimizer: InnerOptimizer, number: int, inner: Tree, state: dict[str, Any], rates: Any, gradient: Tree
) -> tuple[Tree, dict[str, Any], Tree]:
    """The same, with an inner gradient that is given."""
    return _taken(optimizer, number, inner, state, rates, lambda _: gradient)
