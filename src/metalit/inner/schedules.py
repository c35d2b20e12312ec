"""How a learning rate changes over the inner steps: by factors, the same in every task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from metalit.errors import InputError


@dataclass(frozen=True)
class Cosine:
    """From 1 to ``last`` along half a cosine over so many steps, and ``last`` from then on.

    >>> [round(Cosine(2, last=0.2).at(step), 6) for step in range(4)]
    [1.0, 0.6, 0.2, 0.2]
    """

    steps: int
    last: float = 0.0

    def at(self, step: int) -> float:
        """The factor of a step, counted from 0."""
        angle = math.pi * min(step, self.steps) / self.steps
        return self.last + (1 - self.last) * (1 + math.cos(angle)) / 2


Schedule: TypeAlias = float | Sequence[float] | Cosine


def factor(schedule: Schedule, step: int) -> float:
    """The factor of an inner step: a power of a single number; of a sequence, the last one repeats.

    >>> [factor([1.0, 0.5], step) for step in range(3)], [factor(0.5, step) for step in range(3)]
    ([1.0, 0.5, 0.5], [1.0, 0.5, 0.25])
    """
    if isinstance(schedule, float | int):
        return float(schedule**step)
    return schedule.at(step) if isinstance(schedule, Cosine) else schedule[min(step, len(schedule) - 1)]


def check_schedule(owner: str, schedule: Schedule) -> None:
    """Raise an :class:`InputError` unless all factors are finite and not negative."""
    parts: Sequence[float]
    if isinstance(schedule, Cosine):
        parts = [schedule.last] if schedule.steps >= 1 else []
    else:
        parts = [schedule] if isinstance(schedule, float | int) else schedule
    if not parts or not all(math.isfinite(part) and part >= 0 for part in parts):
        raise InputError(
            f"{owner}: schedule={schedule} must be factors that are finite and not negative: one for each inner step, "
            "or a number whose powers they are, or Cosine(steps, last)"
        )
