"""Bayesian linear regression on learned features: a prior that is learned over tasks, a posterior for each."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.linalg import cholesky_ex, solve_triangular

from metalit.errors import InputError
from metalit.losses import gaussian_nll, mean_of_rows
from metalit.problem import Points, Task
from metalit.problems.heads import (
    QUERY_DRAW,
    SUPPORT_DRAW,
    Head,
    check_positive,
    check_width,
    feature_count,
    joined,
    product,
    real_rows,
    row_count,
    shifted,
)


class BayesianHead(Head):
    """Learn a Gaussian prior of the last layer, features and noise; answer with the posterior (Harrison et al. 2018).

    With features φ(x) = (1, x, …, x^degree, network(x)), rows Φ, noise of variance σ² and W ~ N(W₀, σ²Λ₀⁻¹) (ALPaCA):

    Λ = Λ₀ + ΦᵀΦ,  W̄ = Λ⁻¹(Λ₀W₀ + Φᵀy),  y(x) ~ N(φᵀW̄, σ²(1 + φᵀΛ⁻¹φ))

    It is a Gaussian process with the kernel σ²ΦΛ₀⁻¹Φᵀ + σ²I and, without a network, an empirical-Bayes polynomial.
    W₀, Λ₀ = LLᵀ, σ and the network are learned through the posterior, by
    :class:`~metalit.hypergradients.direct.Direct`, without an inner step: on the negative log likelihood of each point
    of the query set, or on that of the whole curve, support and query set as one, divided by its rows. Several outputs
    share Λ; each has a σ of its own. All is solved in double precision.

    Args:
        inputs, outputs: the numbers of columns; in a configuration, ``auto`` for as many as the data has.
        degree: powers of each input among the features; 0 for the constant alone.
        network: any module that maps ``[rows, inputs]`` to further features, ``[rows, features]``.
        train_on: ``query``, or ``curve`` for the marginal likelihood of whole curves.
        noise: where σ starts; the prior starts as N(0, I).

    Raises:
        InputError: numbers that are not positive, or another kind of ``train_on``; later: classes as targets, data of
            other columns.

    >>> sorted(BayesianHead(inputs=1, outputs=1, degree=2).outer())
    ['log_noise', 'prior_factor', 'prior_mean']
    """

    def __init__(
        self,
        inputs: int | Literal["auto"],
        outputs: int | Literal["auto"],
        degree: int = 1,
        network: nn.Module | None = None,
        train_on: Literal["query", "curve"] = "query",
        noise: float = 0.3,
    ) -> None:
        super().__init__()
        self.inputs = check_width("BayesianHead", "inputs", inputs)
        self.outputs = check_width("BayesianHead", "outputs", outputs)
        if degree < 0:
            raise InputError(f"BayesianHead: degree={degree} must not be negative; 0 has the constant alone")
        if train_on not in ("query", "curve"):
            raise InputError(f"BayesianHead: train_on={train_on!r} must be 'query' or 'curve'")
        check_positive("BayesianHead", "noise", noise, 0.3)
        self.degree, self.network, self.train_on = degree, network, train_on
        width = 1 + degree * self.inputs + (0 if network is None else feature_count(network, self.inputs))
        self.prior_mean = nn.Parameter(torch.zeros(width, self.outputs))
        # the lower triangle of L, with the logarithm of its diagonal
        self.prior_factor = nn.Parameter(self.written("prior_factor", math.log(noise) * torch.eye(width).double()))
        self.log_noise = nn.Parameter(self.written("log_noise", [math.log(noise)] * self.outputs))

    def init(self, outer: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The posterior: ``mean`` W̄, ``[features, outputs]``, and the lower triangular ``root`` C with CᵀC = Λ⁻¹."""
        found = _posterior(outer, self._features(outer, task.support.x, task, SUPPORT_DRAW), task.support)
        return {name: value.to(outer["prior_mean"].dtype) for name, value in found.items()}

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """½‖ΦW − y‖² + ½‖Lᵀ(W − W₀)‖² on the support set, divided by its rows: the mean W̄ is its minimum."""
        features = self._features(outer, task.support.x, task, step)
        squares = _squares(inner["mean"], outer, features, task.support)
        return (0.5 * squares.sum() / row_count(task.support)).to(features.dtype)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The negative log likelihood of the query set, or of the whole curve, each of a row."""
        if self.train_on == "curve":
            return self._of_curve(outer, task)
        features = self._features(outer, task.query.x, task, QUERY_DRAW)
        rows = gaussian_nll(product(features, inner["mean"]), _deviation(inner, outer, features), task.query.y)
        return mean_of_rows(rows, task.query.mask)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The mean φᵀW̄ at ``x``."""
        return product(self._features(outer, x), inner["mean"])

    def spread(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The standard deviation σ√(1 + φᵀΛ⁻¹φ) of a new point at ``x``, noise included."""
        return _deviation(inner, outer, self._features(outer, x))

    def _of_curve(self, outer: dict[str, Tensor], task: Task) -> Tensor:
        """−log N(y; ΦW₀, σ²(I + ΦΛ₀⁻¹Φᵀ)) of all rows; its quadratic form is what W̄ of all rows minimises."""
        points = joined(task)
        features = self._features(outer, points.x, task, QUERY_DRAW)
        found = _posterior(outer, features, points)
        squares = _squares(found["mean"], outer, features, points) / (2 * outer["log_noise"].double()).exp()
        # |I + ΦΛ₀⁻¹Φᵀ| = |Λ| / |Λ₀| = |C|⁻² / |L|²
        logs = -found["root"].diagonal().log().sum() - outer["prior_factor"].double().diagonal().sum()
        each = 0.5 * math.log(2 * math.pi) + outer["log_noise"].double()
        return (each + (logs + 0.5 * squares) / row_count(points)).mean().to(outer["prior_mean"].dtype)

    def _features(self, outer: dict[str, Tensor], x: Tensor, task: Task | None = None, draw: int = 0) -> Tensor:
        powers = [x**power for power in range(1, self.degree + 1)]
        further = [] if self.network is None else [self.called("network", outer, x, task, draw)]
        return torch.cat([torch.ones_like(x[:, :1]), *powers, *further], 1)


def _posterior(outer: dict[str, Tensor], features: Tensor, points: Points) -> dict[str, Tensor]:
    phi, factor, prior = real_rows(features, points.mask), _factor(outer), outer["prior_mean"].double()
    whitened = solve_triangular(factor, phi.mT, upper=False)
    # I + L⁻¹ΦᵀΦL⁻ᵀ has no eigenvalue below 1, whatever was learned
    inside = cholesky_ex(shifted(whitened @ whitened.mT, phi.new_ones(())))[0]
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    root = solve_triangular(factor @ inside, identity, upper=False)
    right = phi.mT @ (real_rows(points.y, points.mask) - phi @ prior)
    return {"mean": prior + root.mT @ (root @ right), "root": root}


def _squares(mean: Tensor, outer: dict[str, Tensor], features: Tensor, points: Points) -> Tensor:
    """‖ΦW − y‖² + ‖Lᵀ(W − W₀)‖² of each output."""
    errors = real_rows(features.double() @ mean.double() - points.y, points.mask)
    offset = _factor(outer).mT @ (mean.double() - outer["prior_mean"])
    return errors.square().sum(0) + offset.square().sum(0)


def _deviation(inner: dict[str, Tensor], outer: dict[str, Tensor], features: Tensor) -> Tensor:
    squares = product(features, inner["root"].mT).square().sum(1, keepdim=True)
    return (1 + squares).sqrt() * outer["log_noise"].exp()


def _factor(outer: dict[str, Tensor]) -> Tensor:
    """L, in double precision."""
    given = outer["prior_factor"].double()
    return given.tril(-1) + given.diagonal().exp().diag()
