"""The derivatives of each problem, derived by hand: nothing here is differentiated by autograd.

θ and φ are flat vectors, in the order of ``flatten``. With f the inner loss, L the outer one, n and m their lengths:

- ``init(φ)``: θ₀ and dθ₀/dφ, ``[n, m]``
- ``g``, ``H``, ``J``: ∂f/∂θ ``[n]``, ∂²f/∂θ² ``[n, n]``, ∂²f/∂θ∂φ ``[n, m]``, all of (θ, φ, step)
- ``by_phi``: ∂f/∂φ ``[m]``
- ``twist``: ∂(Hp)/∂θ and ∂(Hp)/∂φ for a constant vector p, which Newton's derivative needs
- ``outer(θ, φ)``: L, ∂L/∂θ, ∂L/∂φ; ``after(steps)`` makes it that after so many inner steps
"""

import math
from abc import ABC, abstractmethod
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metalit.keys import fold, permutation
from metalit.problem import Points
from metalit.tree import flatten


class Derivatives(ABC):
    """What is 0 for most problems is 0 here."""

    def __init__(self, problem: Any, task: Any) -> None:
        self.problem, self.task = problem, task

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.problem.init(self.problem.outer(), self.task)
        theta = flatten(inner) if inner != {} else phi[:0]
        return theta.detach(), phi.new_zeros(len(theta), len(phi))

    @abstractmethod
    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor: ...

    @abstractmethod
    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor: ...

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return phi.new_zeros(len(theta), len(phi))

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return 0 * phi

    def twist(self, theta: Tensor, phi: Tensor, step: int, p: Tensor) -> tuple[Tensor, Tensor]:
        return phi.new_zeros(len(theta), len(theta)), phi.new_zeros(len(theta), len(phi))

    def after(self, steps: int) -> "Derivatives":
        """Of the problem as it stands after so many inner steps."""
        return self

    @abstractmethod
    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class OfBowl(Derivatives):
    """½(θ − c)ᵀA(θ − c) + ½λ‖θ − φ‖², θ₀ = φ; without the second term as outer loss."""

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return phi, _eye(phi)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.task.A @ (theta - self.task.c) + self.problem.weight * (theta - phi)

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.task.A + self.problem.weight * _eye(theta)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return -self.problem.weight * _eye(phi)

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.problem.weight * (phi - theta)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = self.task.A @ (theta - self.task.c)
        return 0.5 * slope @ (theta - self.task.c), slope, 0 * phi


class OfThetaPhi(Derivatives):
    """(θᵀθ)(φᵀφ)."""

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return 2 * (phi @ phi) * theta

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return 2 * (phi @ phi) * _eye(theta)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return 4 * theta.outer(phi)

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return 2 * (theta @ theta) * phi

    def twist(self, theta: Tensor, phi: Tensor, step: int, p: Tensor) -> tuple[Tensor, Tensor]:
        return 0 * self.H(theta, phi, step), 4 * p.outer(phi)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (theta @ theta) * (phi @ phi), self.g(theta, phi, 0), 2 * (theta @ theta) * phi


class OfRegression(Derivatives):
    """Mean squared error of ``nn.Linear``, ½ψᵀAψ − bᵀψ + constant in all weights and biases ψ, of which some adapt.

    ψ = Eφ before any adapts, with E of 0 and 1: a parameter that is reset has no column, and of one that is per step,
    step k has the columns of row k, and past the last row those. ½λ‖θ − θ₀‖² draws to θ₀, what is Eφ where it adapts.
    """

    ROWS = 2  # of what is per step
    taken = 0

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.sizes = {name: value.numel() for name, value in problem.network.named_parameters()}
        self.adapts = torch.cat([torch.full((size,), name in problem.adapted) for name, size in self.sizes.items()])
        outputs = problem.network.weight.shape[0]
        self.A, self.b, _ = _normal_equations(task.support, outputs)
        self.Q, self.d, self.constant = _normal_equations(task.query, outputs)

    def E(self, step: int) -> Tensor:
        columns, psi = [], torch.eye(len(self.adapts), dtype=self.A.dtype)
        for name, own in zip(self.sizes, psi.split(list(self.sizes.values()), 1), strict=True):
            rows = self.ROWS if name in self.problem.copies.names else 1 - (name in self.problem.reset)
            columns += [own * (row == min(max(step, 0), rows - 1)) for row in range(rows)]
        return torch.cat(columns, 1)

    def after(self, steps: int) -> "OfRegression":
        found = copy(self)
        found.taken = steps
        return found

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return (self.E(0) @ phi)[self.adapts], self.E(0)[self.adapts]

    def _all(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return (self.E(step) @ phi).masked_scatter(self.adapts, theta)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        start = (self.E(step) @ phi)[self.adapts]
        return (self.A @ self._all(theta, phi, step) - self.b)[self.adapts] + self.problem.proximal * (theta - start)

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.A[self.adapts][:, self.adapts] + self.problem.proximal * _eye(theta)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        hidden = ~self.adapts  # what adapts hides its own outer value
        return (self.A[self.adapts] * hidden) @ self.E(step) - self.problem.proximal * self.E(step)[self.adapts]

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        slope, E = (self.A @ self._all(theta, phi, step) - self.b) * ~self.adapts, self.E(step)
        return E.T @ slope - self.problem.proximal * E[self.adapts].T @ (theta - (E @ phi)[self.adapts])

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        psi, E = self._all(theta, phi, self.taken - 1), self.E(self.taken - 1)
        slope = self.Q @ psi - self.d
        loss = 0.5 * psi @ self.Q @ psi - self.d @ psi + self.constant
        return loss, slope[self.adapts], E.T @ (slope * ~self.adapts)


def _normal_equations(points: Points, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    real = slice(None) if points.mask is None else points.mask
    x, y = points.x[real], points.y[real]
    identity = torch.eye(outputs, dtype=x.dtype)
    # prediction j of row i is weight[j] · x[i] + bias[j], linear in (weight, bias) laid out row by row
    Z = torch.cat([torch.kron(identity, x), torch.kron(identity, torch.ones_like(x[:, :1]))], dim=1)
    target, count = y.T.reshape(-1), len(x) * outputs
    return 2 / count * Z.T @ Z, 2 / count * Z.T @ target, target @ target / count


class OfRidge(Derivatives):
    """1/n Σ ½(xᵢᵀw + b − yᵢ)² + ½ Σⱼ λⱼwⱼ², λ = exp(φ): row loss with slope z − y and curvature 1 in z = xᵀw + b."""

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.train, self.val = (_with_intercept(problem, points) for points in (task.train, task.val))

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = self.train
        return _minibatch(fold(self.task.key, step), self.problem.batch, x, y)

    def row(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss of each row, and its first three derivatives."""
        return 0.5 * (z - y) ** 2, z - y, torch.ones_like(z), torch.zeros_like(z)

    def penalties(self, theta: Tensor, phi: Tensor) -> Tensor:
        return torch.cat([phi.exp(), phi.new_zeros(len(theta) - len(phi))])

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        x, y = self.rows(step)
        return x.T @ self.row(x @ theta, y)[1] / len(x) + self.penalties(theta, phi) * theta

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        x, y = self.rows(step)
        return x.T * self.row(x @ theta, y)[2] @ x / len(x) + self.penalties(theta, phi).diag()

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return (self.penalties(theta, phi) * theta).diag()[:, : len(phi)]

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return (0.5 * self.penalties(theta, phi) * theta**2)[: len(phi)]

    def twist(self, theta: Tensor, phi: Tensor, step: int, p: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows(step)
        return x.T * (self.row(x @ theta, y)[3] * (x @ p)) @ x / len(x), self.J(p, phi, step)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = _minibatch(fold(self.task.key, -1), self.problem.outer_batch, *self.val)
        loss, slope, *_ = self.row(x @ theta, y)
        return loss.mean(), x.T @ slope / len(x), 0 * phi


class OfLogistic(OfRidge):
    """Row loss −y log σ(z) − (1 − y) log(1 − σ(z)): slope σ − y, curvature σ(1 − σ)."""

    def row(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = 1 / (1 + (-z).exp())
        loss = -torch.where(y == 1, p, 1 - p).log()
        return loss, p - y, p * (1 - p), p * (1 - p) * (1 - 2 * p)


def _with_intercept(problem: Any, points: Points) -> tuple[Tensor, Tensor]:
    x = torch.cat([points.x, torch.ones_like(points.x[:, :1])], 1) if problem.intercept else points.x
    return x, points.y.reshape(-1)


def _minibatch(key: Tensor, size: Any, *columns: Tensor) -> tuple[Tensor, ...]:
    rows = slice(None) if size == "all" else permutation(key, len(columns[0]))[:size]
    return tuple(column[rows] for column in columns)


class OfCleaning(Derivatives):
    """1/n Σᵢ sᵢ·(−log pᵢ[yᵢ]) + ½ decay ‖θ‖², sᵢ = σ(φᵢ), p the softmax of linear scores: its slope is p − e_y."""

    def rows(self, step: int) -> Any:
        x, y = self.task.train.x, self.task.train.y
        return zip(*_minibatch(fold(self.task.key, step), self.problem.batch, x, y, torch.arange(len(x))), strict=True)

    def row(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, p, p − e_y, and the scores' derivative by θ = (W row by row, bias)."""
        classes = self.problem.network.weight.shape[0]
        identity = torch.eye(classes, dtype=x.dtype)
        G = torch.kron(identity, x[None])
        G = G if self.problem.network.bias is None else torch.cat([G, identity], 1)
        p = (G @ theta).exp() / (G @ theta).exp().sum()
        return -p[y].log(), p, p - one_hot(y, classes), G

    def _sum(self, theta: Tensor, step: int, term: Any) -> Tensor:
        terms = [term(i, *self.row(theta, x, y)[1:]) for x, y, i in self.rows(step)]
        return sum(terms) / len(terms)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        s = phi.sigmoid()
        return self._sum(theta, step, lambda i, p, error, G: s[i] * G.T @ error) + self.problem.decay * theta

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        s = phi.sigmoid()
        rows = self._sum(theta, step, lambda i, p, error, G: s[i] * G.T @ (p.diag() - p.outer(p)) @ G)
        return rows + self.problem.decay * _eye(theta)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        ds = (phi.sigmoid() * (1 - phi.sigmoid())).diag()  # row i is dsᵢ/dφ
        return self._sum(theta, step, lambda i, p, error, G: (G.T @ error).outer(ds[i]))

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        ds = (phi.sigmoid() * (1 - phi.sigmoid())).diag()
        terms = [self.row(theta, x, y)[0] * ds[i] for x, y, i in self.rows(step)]
        return sum(terms) / len(terms)

    def twist(self, theta: Tensor, phi: Tensor, step: int, p: Tensor) -> tuple[Tensor, Tensor]:
        s = phi.sigmoid()
        ds, vector = (s * (1 - s)).diag(), p

        def by_theta(i: int, p: Tensor, error: Tensor, G: Tensor) -> Tensor:
            S, a = p.diag() - p.outer(p), G @ vector
            return s[i] * G.T @ (a.diag() @ S - (p @ a) * S - p.outer(S @ a)) @ G

        def by_phi(i: int, p: Tensor, error: Tensor, G: Tensor) -> Tensor:
            return (G.T @ (p.diag() - p.outer(p)) @ G @ vector).outer(ds[i])

        return self._sum(theta, step, by_theta), self._sum(theta, step, by_phi)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        val = _minibatch(fold(self.task.key, -1), self.problem.outer_batch, self.task.val.x, self.task.val.y)
        rows = [self.row(theta, x, y) for x, y in zip(*val, strict=True)]
        slope = sum(G.T @ error for _, _, error, G in rows) / len(rows)
        return sum(loss for loss, *_ in rows) / len(rows), slope, 0 * phi


class OfLowRank(Derivatives):
    """Σ over observed entries of (M − UVᵀ)²: θ is nothing and φ both factors; or θ is V, and φ is U."""

    def _split(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank, rows = self.problem.u.shape[1], self.problem.u.shape[0]
        U, V = torch.cat([phi, theta]).view(-1, rank).split([rows, self.task.values.shape[1]])
        return U, V, self.task.observed * (self.task.values - U @ V.T)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        U, _, R = self._split(theta, phi)
        return -2 * (R.T @ U).flatten()[: len(theta)]

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        U, *_ = self._split(theta, phi)
        blocks = torch.block_diag(*(2 * U.T * seen @ U for seen in self.task.observed.T.to(U.dtype)))
        return blocks[: len(theta), : len(theta)]

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        U, V, R = self._split(theta, phi)
        return self._by_u(U, -R, V) if len(theta) else super().J(theta, phi, step)

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        _, V, R = self._split(theta, phi)
        return -2 * (R @ V).flatten() if len(theta) else super().by_phi(theta, phi, step)

    def twist(self, theta: Tensor, phi: Tensor, step: int, p: Tensor) -> tuple[Tensor, Tensor]:
        U, V, _ = self._split(theta, phi)
        if len(theta) == 0:
            return super().twist(theta, phi, step, p)
        return 0 * self.H(theta, phi, step), self._by_u(U, U @ p.view_as(V).T, p.view_as(V))

    def _by_u(self, U: Tensor, E: Tensor, V: Tensor) -> Tensor:
        """The derivative by U of 2 Σₐ observed[a, j] U[a] E[a, j], where dE[a, j] = V[j] · dU[a]."""
        seen = self.task.observed.to(U.dtype)
        own = torch.einsum("aj,bc->jbac", seen * E, torch.eye(U.shape[1], dtype=U.dtype))
        return 2 * (own + torch.einsum("aj,ab,jc->jbac", seen, U, V)).reshape(V.numel(), U.numel())

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, V, R = self._split(theta, phi)
        by_u, by_v = -2 * (R @ V).flatten(), -2 * (R.T @ U).flatten()
        exact = len(theta) > 0
        return R.square().sum(), by_v if exact else theta, by_u if exact else torch.cat([by_u, by_v])


class OfRidgeHead(Derivatives):
    """1/n (½‖MT − y‖² + ½λ‖PT‖²), M = [Φ 1], Φ = XAᵀ + c, T = (W, b), P without b; φ = (log λ, A, c).

    θ₀ is where that has no slope, so dθ₀/dφ = −H⁻¹J there.
    """

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.support, self.query = (_real_points(points) for points in (task.support, task.query))

    def M(self, phi: Tensor, x: Tensor) -> Tensor:
        features = _linear(phi[1:], x)
        return torch.cat([features, torch.ones_like(x[:, :1])], 1) if self.problem.intercept else features

    def moves(self, phi: Tensor, x: Tensor) -> Tensor:
        """dM for each entry of φ, ``[m, rows, columns]``."""
        found = torch.cat([x.new_zeros(1, len(x), (len(phi) - 1) // (x.shape[1] + 1)), _linear_moves(phi[1:], x)])
        return torch.cat([found, 0 * found[..., :1]], 2) if self.problem.intercept else found

    def penalty(self, phi: Tensor, columns: int) -> Tensor:
        free = torch.arange(columns) == (columns - 1 if self.problem.intercept else -1)
        return torch.where(free, 0.0, phi[0].exp()).diag()

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        M, y = self.M(phi, self.support.x), self.support.y
        theta = torch.linalg.solve(M.T @ M + self.penalty(phi, M.shape[1]), M.T @ y).flatten()
        return theta, -torch.linalg.solve(self.H(theta, phi, 0), self.J(theta, phi, 0))

    def _parts(self, theta: Tensor, phi: Tensor, points: Points) -> tuple[Tensor, Tensor, Tensor]:
        M, T = self.M(phi, points.x), theta.view(-1, points.y.shape[1])
        return M, T, M @ T - points.y

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        M, T, E = self._parts(theta, phi, self.support)
        return (M.T @ E + self.penalty(phi, len(T)) @ T).flatten() / len(M)

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        M, T, _ = self._parts(theta, phi, self.support)
        return torch.kron(M.T @ M + self.penalty(phi, len(T)), torch.eye(T.shape[1], dtype=T.dtype)) / len(M)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        M, T, E = self._parts(theta, phi, self.support)
        dM = self.moves(phi, self.support.x)
        found = dM.mT @ E + M.T @ dM @ T
        found[0] += self.penalty(phi, len(T)) @ T
        return found.flatten(1).T / len(M)

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        M, T, E = self._parts(theta, phi, self.support)
        found = (self.moves(phi, self.support.x) @ T * E).sum((1, 2))
        found[0] += 0.5 * (self.penalty(phi, len(T)) @ T * T).sum()
        return found / len(M)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        M, T, E = self._parts(theta, phi, self.query)
        by_phi = (self.moves(phi, self.query.x) @ T * E).sum((1, 2))
        return E.square().mean(), 2 / E.numel() * (M.T @ E).flatten(), 2 / E.numel() * by_phi


class OfRidgeClasses(OfRidgeHead):
    """The same of one-hot y, judged by the cross-entropy of z = αMT + β; φ = (log λ, α, β, A, c)."""

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.classes, self.y = len(task.classes), self.query.y
        self.support, self.query = (
            Points(part.x, one_hot(part.y, self.classes).to(part.x.dtype)) for part in (self.support, self.query)
        )

    def _without(self, phi: Tensor) -> Tensor:
        return torch.cat([phi[:1], phi[3:]])

    def _with(self, found: Tensor) -> Tensor:
        return torch.cat([found[..., :1], 0 * found[..., :1], 0 * found[..., :1], found[..., 1:]], -1)

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        theta, by_phi = _ridge(self).init(self._without(phi))
        return theta, self._with(by_phi)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return super().g(theta, self._without(phi), step)

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return super().H(theta, self._without(phi), step)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self._with(super().J(theta, self._without(phi), step))

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self._with(super().by_phi(theta, self._without(phi), step))

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, alpha, beta = self._without(phi), phi[1], phi[2]
        M, T, _ = self._parts(theta, own, self.query)
        p = (alpha * M @ T + beta).softmax(1)
        E = (p - self.query.y) / len(p)
        by_phi = self._with(alpha * (self.moves(own, self.query.x) @ T * E).sum((1, 2)))
        by_phi[1], by_phi[2] = (M @ T * E).sum(), E.sum()
        return -p[range(len(p)), self.y].log().mean(), alpha * (M.T @ E).flatten(), by_phi


def _ridge(hand: OfRidgeClasses) -> OfRidgeHead:
    found = copy(hand)
    found.__class__ = OfRidgeHead  # type: ignore[assignment]
    return found


class OfBayesianHead(Derivatives):
    """The posterior of Φ = [1 x … xᵖ, XAᵀ + c], by (W₀, F, log σ, A, c), and the likelihood of the query or all rows.

    With dΛ₀ = dL Lᵀ + L dLᵀ and dΛ = dΛ₀ + dΦᵀΦ + ΦᵀdΦ:
    dW̄ = Λ⁻¹(Λ₀ dW₀ + dΛ₀ (W₀ − W̄) + dΦᵀ(y − ΦW̄) − Φᵀ dΦ W̄), dC = −½tril(C dΛ Cᵀ) C, where ½tril halves the diagonal.
    """

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.support, self.query = (_real_points(points) for points in (task.support, task.query))
        self.d, self.o = problem.prior_mean.shape
        self.powers = 1 + problem.degree * problem.inputs

    def split(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        W0, F, log_noise, network = phi.split([self.d * self.o, self.d**2, self.o, len(phi) - self._own])
        F = F.view(self.d, self.d)
        return W0.view(self.d, self.o), F.tril(-1) + F.diagonal().exp().diag(), log_noise, network

    @property
    def _own(self) -> int:
        return self.d * self.o + self.d**2 + self.o

    def features(self, phi: Tensor, x: Tensor) -> Tensor:
        powers = torch.cat([torch.ones_like(x[:, :1]), *(x**p for p in range(1, self.problem.degree + 1))], 1)
        network = self.split(phi)[3]
        return torch.cat([powers, _linear(network, x)], 1) if len(network) else powers

    def moves(self, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dW₀, dL and dΦ for each entry of φ, of which log σ has none."""
        m, (_, L, _, network) = len(phi), self.split(phi)
        dW0 = torch.eye(m, self.d * self.o, dtype=phi.dtype).view(m, self.d, self.o)
        dL, dPhi = phi.new_zeros(m, self.d**2), phi.new_zeros(m, len(x), self.d)
        slope = (torch.ones_like(L).tril(-1) + L.diagonal().diag()).flatten()
        dL[self.d * self.o : self.d * self.o + self.d**2] = slope.diag()
        if len(network):
            dPhi[self._own :, :, self.powers :] = _linear_moves(network, x)
        return dW0, dL.view(m, self.d, self.d), dPhi

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        (W0, L, _, _), (x, y, _) = self.split(phi), self.support
        P, (dW0, dL, dP) = self.features(phi, x), self.moves(phi, x)
        precision, prior = L @ L.T + P.T @ P, L @ L.T
        mean = torch.linalg.solve(precision, prior @ W0 + P.T @ y)
        C = torch.linalg.inv(torch.linalg.cholesky(precision))
        dprior = dL @ L.T + L @ dL.mT
        right = prior @ dW0 + dprior @ (W0 - mean) + dP.mT @ (y - P @ mean) - P.T @ dP @ mean
        inside = C @ (dprior + dP.mT @ P + P.T @ dP) @ C.T
        dC = -(inside.tril(-1) + 0.5 * torch.diag_embed(inside.diagonal(dim1=1, dim2=2))) @ C
        both = torch.cat([torch.linalg.solve(precision, right).flatten(1), dC.flatten(1)], 1)
        return torch.cat([mean.flatten(), C.flatten()]), both.T

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        raise NotImplementedError  # no step is taken

    H = g

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (self._curve if self.problem.train_on == "curve" else self._query)(theta, phi)

    def _query(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, y, _), log_noise = self.query, self.split(phi)[2]
        mean, C = theta[: self.d * self.o].view(self.d, self.o), theta[self.d * self.o :].view(self.d, self.d)
        P, dP, noise = self.features(phi, x), self.moves(phi, x)[2], (2 * log_noise).exp()
        CP = P @ C.T
        s, error = noise * (1 + CP.square().sum(1, keepdim=True)), P @ mean - y
        loss = 0.5 * (2 * torch.pi * s).log() + error**2 / (2 * s)
        by_mean, by_s = error / s / y.numel(), (0.5 / s - error**2 / (2 * s**2)) / y.numel()
        by_v = by_s @ noise  # of each row
        by_C = 2 * torch.einsum("r,ra,rb->ab", by_v, CP, P)
        by_phi = (dP @ mean * by_mean).sum((1, 2)) + 2 * torch.einsum("mrb,rb,r->m", dP @ C.T, CP, by_v)
        by_phi[self._own - self.o : self._own] += (2 * s * by_s).sum(0)
        return loss.mean(), torch.cat([(P.T @ by_mean).flatten(), by_C.flatten()]), by_phi

    def _curve(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """−log N(y; ΦW₀, K), K = σ²(I + ΦΛ₀⁻¹Φᵀ): its slope is ½ tr((K⁻¹ − ααᵀ) dK) + αᵀ dr, r = y − ΦW₀, α = K⁻¹r."""
        x, y = (torch.cat(parts) for parts in zip(self.support[:2], self.query[:2], strict=True))
        (W0, L, log_noise, _), P = self.split(phi), self.features(phi, x)
        dW0, dL, dP = self.moves(phi, x)
        S = torch.linalg.inv(L @ L.T)
        G, half = _eye(x[:, 0]) + P @ S @ P.T, dP @ S @ P.T
        dG = half + half.mT - P @ S @ (dL @ L.T + L @ dL.mT) @ S @ P.T
        loss, by_phi, r, dr = 0 * phi[0], 0 * phi, y - P @ W0, -P @ dW0 - dP @ W0
        for o, noise in enumerate((2 * log_noise).exp()):
            K = noise * G
            alpha = torch.linalg.solve(K, r[:, o])
            inside = torch.linalg.inv(K) - alpha.outer(alpha)
            loss = loss + 0.5 * (torch.logdet(2 * torch.pi * K) + r[:, o] @ alpha)
            by_phi = by_phi + 0.5 * noise * (dG * inside).sum((1, 2)) + dr[:, :, o] @ alpha
            by_phi[self._own - self.o + o] += (K * inside).sum()
        return loss / y.numel(), 0 * theta, by_phi / y.numel()


class OfNeuralProcess(Derivatives):
    """A network of tanh layers, written out, and differentiated by complex steps: ∂f/∂z = Im f(z + ih)/h, exact.

    (Squire, Trapp 1998: no difference is taken, so h may be as small as 10⁻¹⁰⁰.)
    """

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.support, self.query = (_real_points(points) for points in (task.support, task.query))
        self.shapes = {name: value.shape for name, value in problem.outer().items()}

    def network(self, name: str, phi: Tensor, x: Tensor) -> Tensor:
        pieces = phi.split([shape.numel() for shape in self.shapes.values()])
        layers = [v.view(s) for (n, s), v in zip(self.shapes.items(), pieces, strict=True) if n.startswith(f"{name}.")]
        for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
            x = (x.to(phi.dtype) @ weight.T + bias).tanh()
        return x @ layers[-2].T + layers[-1]

    def encoded(self, phi: Tensor) -> Tensor:
        """What init makes of the support set, flat; for all its rows, as those of padding have codes too."""
        x, y, mask = self.task.support
        codes = self.network("encoder", phi, torch.cat([x, y], 1))
        real = torch.ones(len(x), dtype=x.dtype) if mask is None else mask.to(x.dtype)
        if self.problem.queries is None:
            return (codes * real[:, None]).sum(0) / real.sum()
        return torch.cat(
            [codes.flatten(), self.network("queries", phi, x).flatten(), (-1e4 * (1 - real)).to(phi.dtype)]
        )

    def surprise(self, theta: Tensor, phi: Tensor) -> Tensor:
        x, y, _ = self.query
        if self.problem.queries is None:
            code = theta.expand(len(x), -1)
        else:
            rows, width = len(self.task.support.x), self.problem.encoder.out.out_features
            codes, keys, logits = theta.split([rows * width, rows * width, rows])
            weights = (self.network("queries", phi, x) @ keys.view(rows, width).T / width**0.5 + logits).exp()
            code = weights / weights.sum(1, keepdim=True) @ codes.view(rows, width)
        answer = self.network("decoder", phi, torch.cat([x.to(code.dtype), code], 1))
        mean, raw = answer.split(answer.shape[1] // 2, 1)
        std = self.problem.least_std + (1 + raw.exp()).log()
        return (((y - mean) / std) ** 2 / 2 + std.log() + math.log(2 * math.pi) / 2).mean()

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoded(phi), _complex_steps(self.encoded, phi)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        raise NotImplementedError  # no step is taken

    H = g

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_theta = _complex_steps(lambda theta: self.surprise(theta, phi.to(theta.dtype)), theta)
        by_phi = _complex_steps(lambda phi: self.surprise(theta.to(phi.dtype), phi), phi)
        return self.surprise(theta, phi), by_theta, by_phi


class OfClassifier(Derivatives):
    """The cross-entropy of z = f(x)Wᵀ + b, of which all adapts: its slope by z is D = (p − e_y)/n.

    The first derivatives by θ are D's, pulled back by hand; those are differentiated by complex steps, as are the loss
    and the start by φ. Here f(x) = x, θ = (W, b) = φ.
    """

    def __init__(self, problem: Any, task: Any) -> None:
        super().__init__(problem, task)
        self.support, self.query = (_real_points(points) for points in (task.support, task.query))
        self.ways = len(task.classes)

    def start(self, phi: Tensor) -> Tensor:
        return phi

    def scores(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        return _linear(theta, x)

    def pulled(self, D: Tensor, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        return torch.cat([(D.T @ x).flatten(), D.sum(0)])

    def loss(self, theta: Tensor, phi: Tensor, points: Points) -> Tensor:
        e = self.scores(theta, phi, points.x.to(theta.dtype)).exp()
        return -(e / e.sum(1, keepdim=True))[range(len(e)), points.y].log().mean()

    def slope(self, theta: Tensor, phi: Tensor, points: Points) -> Tensor:
        x = points.x.to(theta.dtype)
        e = self.scores(theta, phi, x).exp()
        D = (e / e.sum(1, keepdim=True) - one_hot(points.y, self.ways)) / len(e)
        return self.pulled(D, theta, phi, x)

    def init(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        return self.start(phi), _complex_steps(self.start, phi)

    def g(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return self.slope(theta, phi, self.support)

    def H(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return _complex_steps(lambda theta: self.slope(theta, phi.to(theta.dtype), self.support), theta)

    def J(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return _complex_steps(lambda phi: self.slope(theta.to(phi.dtype), phi, self.support), phi)

    def by_phi(self, theta: Tensor, phi: Tensor, step: int) -> Tensor:
        return _complex_steps(lambda phi: self.loss(theta.to(phi.dtype), phi, self.support), phi)

    def outer(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_phi = _complex_steps(lambda phi: self.loss(theta.to(phi.dtype), phi, self.query), phi)
        return self.loss(theta, phi, self.query), self.slope(theta, phi, self.query), by_phi

    def means(self, phi: Tensor) -> Tensor:
        """c_k, the mean of f(x) = XAᵀ + c over the rows of each class, ``[ways, features]``."""
        f = _linear(phi, self.support.x.to(phi.dtype))
        return torch.stack([f[self.support.y == k].sum(0) / (self.support.y == k).sum() for k in range(self.ways)])


class OfProtoMAML(OfClassifier):
    """f(x) = XAᵀ + c, θ = (A, c, W, b) starts at (A, c, 2C, −‖c_k‖²)."""

    def start(self, phi: Tensor) -> Tensor:
        C = self.means(phi)
        return torch.cat([phi, (2 * C).flatten(), -(C * C).sum(1)])

    def split(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network, W, b = theta.split([len(phi), len(theta) - len(phi) - self.ways, self.ways])
        return network, W.view(self.ways, -1), b

    def scores(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        network, W, b = self.split(theta, phi)
        return _linear(network, x) @ W.T + b

    def pulled(self, D: Tensor, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        network, W, _ = self.split(theta, phi)
        by_f = D @ W
        return torch.cat([(by_f.T @ x).flatten(), by_f.sum(0), (D.T @ _linear(network, x)).flatten(), D.sum(0)])


class OfPrototypes(OfClassifier):
    """z_k = −‖f(x) − c_k‖², f(x) = XAᵀ + c, θ = the c_k."""

    def start(self, phi: Tensor) -> Tensor:
        return self.means(phi).flatten()

    def offsets(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        return _linear(phi.to(x.dtype), x)[:, None] - theta.view(self.ways, -1)

    def scores(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        offsets = self.offsets(theta, phi, x)
        return -(offsets * offsets).sum(2)

    def pulled(self, D: Tensor, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        return 2 * (D[:, :, None] * self.offsets(theta, phi, x)).sum(0).flatten()


class OfMatching(OfClassifier):
    """z_k = log Σᵢ exp(f(x)ᵀkᵢ/‖f(x)‖ + ℓᵢₖ), f(x) = XAᵀ + c, θ = (k, ℓ) starts at f(xᵢ)/‖f(xᵢ)‖ and (0 or −10⁴)."""

    def unit(self, phi: Tensor, x: Tensor) -> Tensor:
        f = _linear(phi, x.to(phi.dtype))
        return f / (f * f).sum(1, keepdim=True).sqrt()

    def start(self, phi: Tensor) -> Tensor:
        x, y, mask = self.task.support  # rows of padding have keys too
        real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
        mine = (y[:, None] == torch.arange(self.ways)) & real[:, None]
        return torch.cat([self.unit(phi, x).flatten(), torch.where(mine, 0.0, -1e4).to(phi.dtype).flatten()])

    def scores(self, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        rows = len(self.task.support.x)
        keys, logits = theta.split([len(theta) - rows * self.ways, rows * self.ways])
        inside = self.unit(phi.to(x.dtype), x) @ keys.view(rows, -1).T
        return (inside[:, :, None] + logits.view(rows, -1)).exp().sum(1).log()

    def pulled(self, D: Tensor, theta: Tensor, phi: Tensor, x: Tensor) -> Tensor:
        rows, units = len(self.task.support.x), self.unit(phi.to(x.dtype), x)
        keys, logits = theta.split([len(theta) - rows * self.ways, rows * self.ways])
        e = (units @ keys.view(rows, -1).T)[:, :, None].add(logits.view(rows, -1)).exp()
        by_inside = D[:, None] * e / e.sum(1, keepdim=True)  # [rows of x, rows of the support set, ways]
        return torch.cat([(by_inside.sum(2).T @ units).flatten(), by_inside.sum(0).flatten()])


def _complex_steps(fn: Any, at: Tensor) -> Tensor:
    """The derivative of a function of a vector by each of its entries, in the last dimension."""
    steps = 1e-100j * torch.eye(len(at), dtype=torch.complex128)
    return torch.stack([fn(at + step).imag / 1e-100 for step in steps], -1)


def _real_points(points: Points) -> Points:
    return points if points.mask is None else Points(points.x[points.mask], points.y[points.mask])


def _linear(parameters: Tensor, x: Tensor) -> Tensor:
    """XAᵀ + c of (A, c)."""
    parameters, x = (each.to(torch.promote_types(parameters.dtype, x.dtype)) for each in (parameters, x))
    A, c = parameters.split([len(parameters) * x.shape[1] // (x.shape[1] + 1), len(parameters) // (x.shape[1] + 1)])
    return x @ A.view(-1, x.shape[1]).T + c


def _linear_moves(parameters: Tensor, x: Tensor) -> Tensor:
    """The derivative of ``_linear`` by each entry of (A, c), ``[entries, rows, features]``."""
    inputs, features = x.shape[1], len(parameters) // (x.shape[1] + 1)
    identity = torch.eye(features, dtype=x.dtype)
    by_A = torch.einsum("ri,fg->firg", x, identity).reshape(features * inputs, len(x), features)
    return torch.cat([by_A, identity[:, None].expand(-1, len(x), -1)])


def _eye(vector: Tensor) -> Tensor:
    return torch.eye(len(vector), dtype=vector.dtype)
