"""Sine tasks: the regression benchmark of meta-learning."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metalit.data.base import Split, TaskDistribution
from metalit.data.scaling import Scaling, known
from metalit.data.table import Columns
from metalit.errors import InputError
from metalit.keys import fold, normal, uniform
from metalit.problem import Points, Task

Range = tuple[float, float]


@dataclass(frozen=True)
class Sine(TaskDistribution):
    """Tasks y = A · sin(ωx − p) + noise; every draw is uniform on its range.

    The defaults are Finn et al. 2017, section 5.1. The family of Meta-SGD (Li et al. 2017, section 4.1),
    A · sin(ωx + b), is ``frequency=[0.8, 1.2]`` with ``phase=[-π, 0]``.

    Args:
        amplitude, phase, frequency: the ranges of A, p and ω.
        x: the range of the inputs.
        noise: the standard deviation of the noise on every observed y, of support and query points alike.

    Raises:
        InputError: a range that is empty or not finite, or a negative noise.
    """

    amplitude: Range = (0.1, 5.0)
    phase: Range = (0.0, math.pi)
    frequency: Range = (1.0, 1.0)
    x: Range = (-5.0, 5.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("amplitude", "phase", "frequency", "x"):
            bounds = list(getattr(self, name))
            if not (len(bounds) == 2 and all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
                raise InputError(f"Sine: {name}={bounds} must be two finite numbers, the lower one first")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"Sine: noise={self.noise} must be a finite standard deviation, at least 0")

    @property
    def columns(self) -> Columns:
        """``task``, ``x``, ``y``."""
        return Columns("task", ["x"], ["y"])

    @property
    def noisy(self) -> bool:
        """Whether there is noise."""
        return self.noise > 0

    def sample(self, split: Split, index: Tensor, key: Tensor, shots: int, queries: int | None) -> Task:
        """Draw the curve of each task, then its points."""
        assert queries is not None
        curve = uniform(fold(key, 0), 3, 1, 1)
        amplitude, phase, frequency = (
            _between(curve[:, i], bounds) for i, bounds in enumerate((self.amplitude, self.phase, self.frequency))
        )
        x = _between(uniform(fold(key, 1), shots + queries, 1), self.x)
        y = amplitude * torch.sin(frequency * x - phase)
        if self.noise:
            y = y + self.noise * normal(fold(key, 2), shots + queries, 1)
        return Task(Points(x[:, :shots], y[:, :shots]), Points(x[:, shots:], y[:, shots:]), fold(key, 3))

    def scaling(self) -> Scaling:
        """Nothing is normalised; the range of x, and that of the amplitude for y."""
        (low, high), most = self.x, max(map(abs, self.amplitude))
        return replace(known(super().scaling()), x_min=[low], x_max=[high], y_min=[-most], y_max=[most])

    def baselines(self, tasks: Task) -> dict[str, Tensor]:
        """The best predictor that knows no task."""
        return {"one curve for all tasks": self.mean_curve(tasks.query.x)}

    def mean_curve(self, x: Tensor) -> Tensor:
        """The mean of y over tasks at ``x``; for Finn's ranges −(5.1/π) cos x."""
        (amplitude, _), (frequency, frequency_half), (phase, phase_half) = (
            ((low + high) / 2, (high - low) / 2) for low, high in (self.amplitude, self.frequency, self.phase)
        )
        # the mean of sin over an interval of half width h is sin at its middle times sin(h)/h
        damping = torch.sinc(frequency_half * x / math.pi) * torch.sinc(x.new_tensor(phase_half / math.pi))
        return amplitude * torch.sin(frequency * x - phase) * damping


def _between(fraction: Tensor, bounds: Range) -> Tensor:
    low, high = bounds
    return low + (high - low) * fraction
