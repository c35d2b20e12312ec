"""What steps are made of, with derivatives that are finite everywhere."""

import torch
from torch import Tensor

from metalit.tree import Tree, dot, tree_map


def stepped(leaf: Tensor, rate: float | Tensor, direction: Tensor) -> Tensor:
    """leaf − rate · direction, in no more operations than it needs: a number is negated before it meets a tensor."""
    return leaf - rate * direction if isinstance(rate, Tensor) else -rate * direction + leaf


def clipped(gradient: Tree, most: float | Tensor) -> Tree:
    """min(1, most / ‖gradient‖) · gradient, whose derivative is finite where the gradient is zero too.

    >>> clipped({"w": torch.tensor([3.0, 4.0])}, 1.0)
    {'w': tensor([0.6000, 0.8000])}
    """
    square = dot(gradient, gradient)
    beyond = square > most * most
    # no square root of zero, whose derivative is infinite
    share = torch.where(beyond, most / torch.where(beyond, square, 1.0).sqrt(), 1.0)
    return tree_map(lambda leaf: share.to(leaf.dtype) * leaf, gradient)


def mixed(share: float | Tensor, old: Tensor, new: Tensor) -> Tensor:
    """share · old + (1 − share) · new."""
    return share * old + (1 - share) * new


def root(square: Tensor) -> Tensor:
    """√square, with derivative 0 where it is 0: as |g| = √g² has where g is 0, as far as g · d|g| is concerned."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
