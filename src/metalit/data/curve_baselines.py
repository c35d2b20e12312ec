"""Predictions of curves without meta-learning, by polynomials whose degrees are chosen."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from metalit.data.random_coefficients import RandomCoefficients
from metalit.private_torch import pytree_map
from metalit.problem import Points, Task

_DEGREES = range(6)  # of the polynomials among which the baselines choose

_Fit = Callable[[Task, int], Tensor]  # (tasks, degree) -> predictions at their query points


class _Prior(NamedTuple):
    basis: Tensor  # [powers, features]
    outputs: list[RandomCoefficients]


class Polynomials:
    """What polynomials say of a task: one for all tasks, one for each, and one for each with a prior from all.

    Args:
        train: the training tasks, ``[tasks, rows, …]``, masked, normalised, in ``float64``.
    """

    def __init__(self, train: Points) -> None:
        self._train = train
        self._priors: dict[int, _Prior] = {}

    def predictions(self, tasks: Task, val: Task) -> dict[str, Tensor]:
        """By name, each of the degree that does best on ``val``: ``[tasks, queries, outputs]``, on the tasks' device.

        Where several polynomials fit equally well, it is the one with the smallest coefficients.
        """
        device = tasks.query.x.device
        tasks = pytree_map(_on_cpu, tasks)
        fits: dict[str, _Fit] = {
            "one polynomial for all tasks": self.of_all,
            "a polynomial for each support set": self.of_each,
            "an empirical-Bayes polynomial": self.with_prior,
        }
        chosen = {
            name: min(_DEGREES, key=lambda degree: _error(fit(val, degree), val.query)) for name, fit in fits.items()
        }
        return {name: fit(tasks, chosen[name]).to(device) for name, fit in fits.items()}

    def of_all(self, tasks: Task, degree: int) -> Tensor:
        """One that is fitted to all rows of the training tasks."""
        return _powers(tasks.query.x, degree) @ _least_squares(_powers(self._rows.x, degree), self._rows.y)

    def of_each(self, tasks: Task, degree: int) -> Tensor:
        """One for each task, fitted to its support set alone."""
        return _powers(tasks.query.x, degree) @ _least_squares(_powers(tasks.support.x, degree), tasks.support.y)

    def with_prior(self, tasks: Task, degree: int) -> Tensor:
        """One for each task, the likeliest in view of its support set and of the training tasks' coefficients.

        Coefficients are normally distributed over tasks, each output on its own; mean, covariance and the noise of the
        rows are those under which the training tasks are likeliest, so it is a mixed-effects model.
        """
        prior = self._prior(degree)
        support, query = (_powers(points.x, degree) @ prior.basis for points in tasks[:2])
        each = zip(prior.outputs, tasks.support.y.unbind(-1), strict=True)
        return torch.stack([output.predict(support, y, query) for output, y in each], -1)

    @cached_property
    def _rows(self) -> Points:
        x, y, mask = self._train
        return Points(x[mask], y[mask])

    def _prior(self, degree: int) -> _Prior:
        if degree not in self._priors:
            x, y, mask = self._train
            basis = _whitening(_powers(self._rows.x, degree))
            features = _powers(x, degree) @ basis
            self._priors[degree] = _Prior(
                basis, [RandomCoefficients.fitted(features, values, mask) for values in y.unbind(-1)]
            )
        return self._priors[degree]


def _on_cpu(leaf: Tensor | None) -> Tensor | None:
    """In ``float64``: the solver is a CPU's, and no half precision is enough for it."""
    return leaf if leaf is None else leaf.to("cpu", torch.float64 if leaf.is_floating_point() else None)


def _least_squares(features: Tensor, y: Tensor) -> Tensor:
    """The smallest of the solutions, if there are several: a dose of three values has no fourth power of its own."""
    # by singular values: the default driver reads uninitialised memory, and is wrong, where the rank is not full
    return torch.linalg.lstsq(features, y, driver="gelsd").solution


def _powers(x: Tensor, degree: int) -> Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), *(x**power for power in range(1, degree + 1))], dim=-1)


def _whitening(features: Tensor) -> Tensor:
    """The ``[powers, features]`` matrix that makes the columns of ``[rows, powers]`` uncorrelated, of unit size.

    There are as many as the rank: a dose of two values has no square of its own.
    """
    _, sizes, directions = torch.linalg.svd(features, full_matrices=False)
    rank = int((sizes > sizes[0] * 1e-10).sum())
    return directions[:rank].mT / sizes[:rank] * len(features) ** 0.5


def _error(prediction: Tensor, points: Points) -> float:
    squares = (prediction - points.y).square().mean(-1)
    return float(squares.mean() if points.mask is None else squares[points.mask].mean())
