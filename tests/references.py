"""Each estimator by hand: plain linear algebra on the derivatives of ``derivatives.py``, without autograd.

Z = dθ/d(φ, rates) is carried along with θ: the steps are those of ``rules.py``.
"""

from typing import Any

import torch
from derivatives import Derivatives
from rules import RULES, Dual, Layout
from torch import Tensor
from torch.linalg import matrix_power, solve

from metalit.adapt import Outer
from metalit.hypergradients import (
    F2SA,
    Direct,
    Estimate,
    FirstOrder,
    Hypergradient,
    Implicit,
    JTg,
    Reptile,
    Truncated,
)
from metalit.inner import InnerOptimizer
from metalit.keys import fold, uniform
from metalit.linsolve import Neumann, Nystrom
from metalit.problem import Points
from metalit.tree import Tree, flatten, leaves, unflatten


class Point:
    """θ and Z after some steps, and what the inner optimiser carries along: its state and the derivative of that."""

    def __init__(self, hand: Derivatives, optimizer: InnerOptimizer, outer: Outer, start: Tree | None) -> None:
        self.hand, self.optimizer = hand, optimizer
        self.phi, self.rates = _flat(outer["problem"]), _flat(outer["optimizer"])
        self.theta, by_phi = hand.init(self.phi)
        if start is not None:
            self.theta, by_phi = _flat(start), 0 * by_phi
        self.Z = torch.cat([by_phi, self.phi.new_zeros(len(self.theta), len(self.rates))], 1)
        self.taken = 0
        self.state: dict[str, Dual] = {}
        self.layout = Layout(hand.problem.init(outer["problem"], hand.task), outer["optimizer"], len(self.phi))

    def step(self, number: int, first_order: bool = False, dropped: bool = False) -> None:
        """Take one inner step; a dropped one leaves Z as it is, and its state is a constant."""

        def slope(at: Dual) -> Dual:
            given, by_outer = (at.value, self.phi, number), 0 * self.Z
            if not first_order:
                by_outer = self.hand.H(*given) @ at.by_outer + self.padded(self.hand.J(*given))
            return Dual(self.hand.g(*given), by_outer)

        after = RULES[type(self.optimizer)](self, Dual(self.theta, self.Z), slope, number)
        self.theta, self.taken = after.value, number + 1
        if dropped:
            self.state = {name: value.constant() for name, value in self.state.items()}
        else:
            self.Z = after.by_outer

    def padded(self, by_phi: Tensor) -> Tensor:
        """A derivative with respect to φ as one with respect to (φ, rates)."""
        return torch.cat([by_phi, by_phi.new_zeros(*by_phi.shape[:-1], len(self.rates))], -1)

    def judge(self) -> tuple[Tensor, Tensor]:
        """The outer loss, and its gradient with respect to (φ, rates)."""
        loss, by_theta, by_phi = self.hand.after(self.taken).outer(self.theta, self.phi)
        return loss, self.Z.T @ by_theta + self.padded(by_phi)

    def implicit(self, kind: Implicit) -> tuple[Tensor, Tensor]:
        """The outer loss, and ∂L/∂φ − Jᵀ(H + damping · I)⁻¹ ∂L/∂θ, or the Neumann series for the inverse."""
        given = (self.theta, self.phi, kind.steps)
        loss, by_theta, by_phi = self.hand.after(self.taken).outer(self.theta, self.phi)
        identity = torch.eye(len(self.theta), dtype=self.phi.dtype)
        K = self.hand.H(*given) + kind.damping * identity
        if isinstance(kind.solver, Neumann):
            eta = kind.solver.scale
            q = eta * sum(matrix_power(identity - eta * K, i) @ by_theta for i in range(kind.solver.terms))
        elif isinstance(kind.solver, Nystrom):
            q = solve(K + kind.solver.rho * identity, by_theta)  # with as many columns as there are
        else:
            q = solve(K, by_theta)
        return loss, self.padded(by_phi - self.hand.J(*given).T @ q)

    def reptile(self) -> tuple[Tensor, Tensor]:
        """The outer loss, and φ − θ."""
        loss, *_ = self.hand.after(self.taken).outer(self.theta, self.phi)
        return loss, self.padded(self.phi - self.theta)

    def penalised(self, kind: F2SA, shifted: Tensor) -> tuple[Tensor, Tensor]:
        """The outer loss, and ∂L/∂φ + λ(∂f/∂φ − ∂f/∂φ at θ) at the shifted θ."""
        above, below = (self.hand.by_phi(theta, self.phi, kind.steps) for theta in (shifted, self.theta))
        judged = self.hand.after(self.taken).outer
        direct = judged(shifted, self.phi)[2]
        return judged(self.theta, self.phi)[0], self.padded(direct + kind.weight * (above - below))


class Shifted:
    """The derivatives of f + L/λ."""

    def __init__(self, hand: Derivatives, kind: F2SA) -> None:
        self.hand, self.judged, self.weight = hand, hand.after(kind.steps), kind.weight
        self.init, self.problem, self.task = hand.init, hand.problem, hand.task

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.hand.g(theta, phi, step) + self.judged.outer(theta, phi)[1] / self.weight


def minibatch(task: Any, size: int, step: int) -> Any:
    """The task whose support set is the next so many of all real rows, in the order that its key draws."""
    x, y = (torch.cat(pair) for pair in zip(task.support[:2], task.query[:2], strict=True))
    masks = [torch.ones(len(part.x), dtype=torch.bool) if part.mask is None else part.mask for part in task[:2]]
    ranks = uniform(fold(task.key, 0x5EED), len(x)) + (~torch.cat(masks)).double()
    order = ranks.argsort()[: int(torch.cat(masks).sum())].tolist()
    rows = [order[(step * size + place) % len(order)] for place in range(min(size, len(order)))]
    return task._replace(support=Points(x[rows], y[rows]))


def reference(
    hand: Derivatives, optimizer: InnerOptimizer, kind: Hypergradient, outer: Outer, start: Tree | None = None
) -> Estimate:
    """The estimate of ``kind`` on one task."""
    at = Point(hand, optimizer, outer, start)
    weights = getattr(kind, "weights", None) or [0.0] * (kind.steps - 1) + [1.0]
    dropped = kind.steps - kind.kept if isinstance(kind, Truncated) else 0
    if isinstance(kind, JTg):
        g, J = hand.g(at.theta, at.phi, 0), hand.J(at.theta, at.phi, 0)
        found = 0.5 * g @ g, at.padded(J.T @ g)
    else:
        found = at.judge() if isinstance(kind, Direct) else (0.0, 0.0)
    beside = Point(Shifted(hand, kind), optimizer, outer, start) if isinstance(kind, F2SA) else None
    for step in range(kind.steps):
        if beside is not None:
            beside.step(step, first_order=True)
        if getattr(kind, "batch", None) is not None:
            at.hand = type(hand)(hand.problem, minibatch(hand.task, kind.batch, step))
        at.step(step, first_order=isinstance(kind, FirstOrder), dropped=step < dropped)
        if not isinstance(kind, Implicit | JTg | Reptile | F2SA):
            found = tuple(total + weights[step] * part for total, part in zip(found, at.judge(), strict=True))
    if isinstance(kind, Implicit):
        found = at.implicit(kind)
    elif isinstance(kind, Reptile):
        found = at.reptile()
    elif beside is not None:
        found = at.penalised(kind, beside.theta)
    loss, gradient = found
    by_phi, by_rates = gradient.split([len(at.phi), len(at.rates)])
    pieces = {"problem": _like(by_phi, outer["problem"]), "optimizer": _like(by_rates, outer["optimizer"])}
    return Estimate(loss, pieces, _like(at.theta, hand.problem.init(outer["problem"], hand.task)))


def _flat(tree: Any) -> Tensor:
    return flatten(tree) if next(leaves(tree), None) is not None else torch.zeros(0, dtype=torch.float64)


def _like(vector: Tensor, tree: Tree) -> Tree:
    return unflatten(vector, tree) if next(leaves(tree), None) is not None else tree
