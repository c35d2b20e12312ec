"""What an outer step over rows is taken at, and what it finds."""

from typing import NamedTuple

from torch import Tensor

from metalit.autodiff.untouched import Kept
from metalit.training.outer_gradient import OuterGradient


class RowsContext(NamedTuple):
    """What a pass over the rows of a batch is taken at.

    Attributes:
        weights: the trainable parameters by name.
        key: what dropout draws from.
        scale: what the gradient is multiplied by in 16-mixed precision.
        real: how many rows count, as a mean over the ranks, and how many rows there are; None where all count.
        kept: the network's state, where the pass may change it as a forward pass does.
    """

    weights: dict[str, Tensor]
    key: Tensor
    scale: Tensor | None
    real: tuple[Tensor, int] | None
    kept: Kept | None


class Perturbed(NamedTuple):
    """What a step found: the gradient at w + α, and by how much the loss there is above that at w, if it is known."""

    gradient: OuterGradient
    alpha: dict[str, Tensor]
    sharpness: Tensor | None


def restore(context: RowsContext) -> None:
    """Let the network be as it was before a pass that begins again."""
    if context.kept is not None:
        context.kept.restore()
