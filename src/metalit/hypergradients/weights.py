"""How much the outer loss after each inner step counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metalit.errors import InputError
from metalit.hypergradients.base import Progress


@dataclass(frozen=True)
class Annealed:
    """Weights that move in a straight line over the first outer steps (the annealing of Antoniou et al. 2019, sec. 4).

    w(t) = first + min(t / over, 1) · (last − first), with t the number of outer steps taken before.

    Args:
        first: the weights of the first outer step, one for each inner step; they sum to 1.
        last: those after ``over`` outer steps, and from then on.
        over: the number of outer steps.

    Raises:
        InputError: weights of different numbers or another sum; ``over`` below 1.

    >>> import torch
    >>> Annealed([0.5, 0.5], [0.0, 1.0], over=10).at(5, torch.tensor(0.0))
    [0.25, 0.75]
    """

    first: Sequence[float]
    last: Sequence[float]
    over: int

    def __post_init__(self) -> None:
        check_weights("Annealed: first", self.first, len(self.last))
        check_weights("Annealed: last", self.last, len(self.first))
        if self.over < 1:
            raise InputError(f"Annealed: over={self.over} must be a number of outer steps, at least 1")

    def at(self, progress: Progress, like: Tensor) -> Sequence[float | Tensor]:
        """The weights after ``progress`` outer steps; where that is a tensor, tensors of the type of ``like``."""
        share: Any = progress.to(like.dtype) if isinstance(progress, Tensor) else progress
        share = share / self.over
        share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
        return [(1 - share) * first + share * last for first, last in zip(self.first, self.last, strict=True)]


Weights = Sequence[float] | Annealed


def check_weights(owner: str, weights: Sequence[float], steps: int) -> None:
    """Raise an :class:`InputError` unless there is a weight for each inner step, and they sum to 1."""
    if len(weights) != steps or not abs(sum(weights) - 1) <= 1e-6:
        raise InputError(f"{owner}={list(weights)} must be {steps} numbers, one for each inner step, that sum to 1")
