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

    They are checked by the hypergradient that they are given to.

    >>> import torch
    >>> Annealed([0.5, 0.5], [0.0, 1.0], over=10).at(5, torch.tensor(0.0))
    [0.25, 0.75]
    """

    first: Sequence[float]
    last: Sequence[float]
    over: int

    def check(self, owner: str, steps: int) -> None:
        """Raise an :class:`InputError` unless they are weights of so many inner steps; asked by who is given them."""
        check_weights(f"{owner}.first", self.first, steps)
        check_weights(f"{owner}.last", self.last, steps)
        if not (isinstance(self.over, int) and self.over >= 1):
            raise InputError(f"{owner}.over={self.over!r} must be a whole number of outer steps, at least 1")

    def at(self, progress: Progress, like: Tensor) -> Sequence[float | Tensor]:
        """The weights after ``progress`` outer steps; where that is a tensor, tensors of the type of ``like``."""
        share: Any = progress.to(like.dtype) if isinstance(progress, Tensor) else progress
        share = share / self.over
        share = share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)
        return [(1 - share) * first + share * last for first, last in zip(self.first, self.last, strict=True)]


Weights = Sequence[float] | Annealed


def weights_at(weights: Weights | None, progress: Progress, like: Tensor) -> Sequence[float | Tensor] | None:
    """The weight of the loss after each inner step, after ``progress`` outer steps; None: only the last counts."""
    return weights.at(progress, like) if isinstance(weights, Annealed) else weights


def check_given(owner: str, weights: Weights | None, steps: int) -> None:
    """Raise an :class:`InputError` unless weights, if any are given, are of so many inner steps and sum to 1."""
    if isinstance(weights, Annealed):
        weights.check(owner, steps)
    elif weights is not None:
        check_weights(owner, weights, steps)


def check_weights(owner: str, weights: Sequence[float], steps: int) -> None:
    """Raise an :class:`InputError` unless there is a weight for each inner step, and they sum to 1."""
    numbers = isinstance(weights, Sequence) and all(isinstance(weight, float | int) for weight in weights)
    if not numbers or len(weights) != steps or not abs(sum(weights) - 1) <= 1e-6:
        told = list(weights) if numbers else repr(weights)
        raise InputError(f"{owner}={told} must be {steps} numbers, one for each inner step, that sum to 1")
