"""Means over tasks, with the interval that the field reports."""

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean over ``tasks`` tasks and half the width of its 95 % interval; ``diverged`` tasks had no finite value."""

    mean: float
    half_width: float
    diverged: int
    tasks: int

    def __str__(self) -> str:
        form = ".1e" if 0 < abs(self.mean) < 5e-4 else ".3f"
        text = f"{self.mean:{form}} ± {self.half_width:{form}}"
        return f"{text} ({self.diverged} of {self.tasks} diverged)" if self.diverged else text


def means_of_tasks(values: Tensor, tasks: Tensor) -> Tensor:
    """The mean of each task's draws, ``[tasks, ...]`` by rising number; ``[draws, ...]`` and their ``[draws]`` tasks.

    >>> means_of_tasks(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7, 4, 7])).tolist()
    [2.0, 2.0]
    """
    numbers, place, draws = tasks.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(numbers), *values.shape[1:]).index_add(0, place, values)
    return sums / draws.view(-1, *[1] * (values.dim() - 1))


def mean_with_interval(values: Tensor, tasks: Tensor | None = None) -> Interval:
    """Return mean ± 1.96 σ/√n of n tasks' values (Finn et al. 2017, Table 2); σ is that of a sample.

    Several draws of one task are no tasks of their own: their mean counts once. Values that are not finite are counted,
    never dropped: they make the mean NaN or infinite.

    Args:
        values: ``[draws]``.
        tasks: the number of the task that each is of; each is a task of its own if not given.

    >>> str(mean_with_interval(torch.tensor([1.0, 3.0])))
    '2.000 ± 1.960'
    """
    values = values.double().cpu()
    if tasks is not None:
        values = means_of_tasks(values, tasks.cpu())
    count = values.numel()
    half_width = 1.96 * values.std() / count**0.5 if count > 1 else values.new_tensor(torch.nan)
    return Interval(float(values.mean()), float(half_width), int((~torch.isfinite(values)).sum()), count)
