"""Linear regressions, one for each task, whose coefficients come from a common normal distribution."""

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST_NOISE = 1e-10  # a variance; data are normalised
_TOLERANCE = 1e-6  # of the log-likelihood of a row, gained by an iteration
_ITERATIONS = 1000


class _Moments(NamedTuple):
    """All that the likelihood needs of the tasks: ΦᵀΦ, Φᵀy and yᵀy of each, and how many rows it has."""

    gram: Tensor  # [tasks, features, features]
    product: Tensor  # [tasks, features]
    square: Tensor  # [tasks]
    rows: Tensor  # [tasks]

    @classmethod
    def of(cls, features: Tensor, y: Tensor, mask: Tensor | None) -> "_Moments":
        real = torch.ones_like(y) if mask is None else mask.to(y.dtype)
        kept = features * real.unsqueeze(-1)
        square = (real * y.square()).sum(-1)
        return cls(kept.mT @ kept, (kept.mT @ (real * y).unsqueeze(-1)).squeeze(-1), square, real.sum(-1))


class _Posterior(NamedTuple):
    """Of each task's coefficients, given its rows."""

    mean: Tensor  # [tasks, features]
    covariance: Tensor  # [tasks, features, features]
    log_likelihood: Tensor  # [], of all rows of all tasks, the coefficients integrated out


class RandomCoefficients(NamedTuple):
    """y = φ(x)ᵀw + ε with w ~ N(mean, covariance) for each task, ε ~ N(0, noise) for each row (Laird, Ware 1982).

    It is a Gaussian process with the mean φ(x)ᵀmean and the kernel φ(x)ᵀ covariance φ(x′) + noise · 1[same row].
    """

    mean: Tensor  # [features]
    covariance: Tensor  # [features, features]
    noise: Tensor  # []

    @classmethod
    def fitted(cls, features: Tensor, y: Tensor, mask: Tensor | None = None) -> "RandomCoefficients":
        """The one under which the tasks are likeliest, by expectation maximisation: no iteration lowers the likelihood.

        Args:
            features: ``[tasks, rows, features]``, of about unit size, in ``float64``.
            y: ``[tasks, rows]``.
            mask: ``[tasks, rows]``, true for real rows.
        """
        moments = _Moments.of(features, y, mask)
        size = features.shape[-1]
        found = cls(y.new_zeros(size), torch.eye(size, dtype=y.dtype), y.new_ones(()))
        before = y.new_tensor(-torch.inf)
        for _ in range(_ITERATIONS):
            posterior = found._posterior(moments)
            if posterior.log_likelihood - before < _TOLERANCE * moments.rows.sum():
                break
            found, before = found._improved(moments, posterior), posterior.log_likelihood
        return found

    def log_likelihood(self, features: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of all rows of all tasks, the coefficients integrated out; arguments as those of :meth:`fitted`."""
        return self._posterior(_Moments.of(features, y, mask)).log_likelihood

    def predict(self, features: Tensor, y: Tensor, asked: Tensor) -> Tensor:
        """The mean of y at the ``[tasks, queries, features]`` that are asked, given each task's ``[tasks, rows]``."""
        found = self._posterior(_Moments.of(features, y, None))
        return (asked @ found.mean.unsqueeze(-1)).squeeze(-1)

    def _posterior(self, moments: _Moments) -> _Posterior:
        """By LLᵀ = covariance, which may be singular, and the Cholesky factor of 1 + LᵀΦᵀΦL / noise, which is not."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt()
        precision = torch.eye(len(root), dtype=root.dtype) + root.mT @ moments.gram @ root / self.noise
        factor = torch.linalg.cholesky(precision)

        half = torch.linalg.solve_triangular(factor, root.mT.expand_as(factor), upper=False)
        residual = moments.product - moments.gram @ self.mean  # Φᵀ(y − Φ mean)
        white = (half @ residual.unsqueeze(-1)).squeeze(-1)
        mean = self.mean + (half.mT @ white.unsqueeze(-1)).squeeze(-1) / self.noise

        squares = moments.square - (moments.product + residual) @ self.mean  # ‖y − Φ mean‖²
        distance = squares / self.noise - white.square().sum(-1) / self.noise.square()
        volume = moments.rows * (2 * torch.pi * self.noise).log() + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _Posterior(mean, half.mT @ half, -(distance + volume).sum() / 2)

    def _improved(self, moments: _Moments, posterior: _Posterior) -> "RandomCoefficients":
        """What is expected of the coefficients' mean and spread over tasks, and of the rows' squared residuals."""
        mean = posterior.mean.mean(0)
        apart = posterior.mean - mean
        covariance = posterior.covariance.mean(0) + apart.mT @ apart / len(apart)
        fitted = (moments.gram @ posterior.mean.unsqueeze(-1)).squeeze(-1)  # ΦᵀΦ mean
        squares = moments.square.sum() - ((2 * moments.product - fitted) * posterior.mean).sum()
        squares = squares + (moments.gram * posterior.covariance).sum()
        noise = (squares / moments.rows.sum()).clamp(min=_LEAST_NOISE)
        return RandomCoefficients(mean, (covariance + covariance.mT) / 2, noise)
