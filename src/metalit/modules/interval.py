"""Means over tasks, with the interval that the field reports."""

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean over ``count`` tasks and half the width of its 95 % interval; ``diverged`` tasks had no finite value."""

    mean: float
    half_width: float
    diverged: int
    count: int

    def __str__(self) -> str:
        text = f"{self.mean:.3f} ± {self.half_width:.3f}"
        return f"{text} ({self.diverged} of {self.count} diverged)" if self.diverged else text


def mean_with_interval(values: Tensor) -> Interval:
    """Return mean ± 1.96 σ/√n of ``[n]`` values (Finn et al. 2017, Table 2); σ is that of a sample.

    Values that are not finite are counted, never dropped: they make the mean NaN or infinite.

    >>> str(mean_with_interval(torch.tensor([1.0, 3.0])))
    '2.000 ± 1.960'
    """
    values = values.double()
    count = values.numel()
    half_width = 1.96 * values.std() / count**0.5 if count > 1 else values.new_tensor(torch.nan)
    return Interval(float(values.mean()), float(half_width), int((~torch.isfinite(values)).sum()), count)
