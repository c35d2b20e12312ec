"""The outer gradient and the loss that it is of, as one vector: what the ranks average."""

from typing import NamedTuple

import torch
from torch import Tensor

from metalit.tree import Tree, flatten


class OuterGradient(NamedTuple):
    """The outer loss, its gradient, and whether one of them is not finite.

    They lie in one ``vector``, ``[1 + parameters + 1]``, since ranks average one vector faster than three.

    >>> found = OuterGradient.of(torch.tensor(2.0), {"weight": torch.tensor([[3.0, torch.inf]])})
    >>> found.loss, found.gradient, found.not_finite
    (tensor(2.), tensor([3., inf]), tensor([1.]))
    """

    vector: Tensor

    @classmethod
    def of(cls, loss: Tensor, gradient: Tree) -> "OuterGradient":
        """Join a scalar loss and its gradient, a tree."""
        values = torch.cat([loss.detach().reshape(1), flatten(gradient)])
        return cls(torch.cat([values, (~torch.isfinite(values).all()).to(values.dtype).reshape(1)]))

    @property
    def loss(self) -> Tensor:
        """The outer loss, a scalar."""
        return self.vector[0]

    @property
    def gradient(self) -> Tensor:
        """The gradient, ``[parameters]``, in the order of the outer variable's leaves."""
        return self.vector[1:-1]

    @property
    def not_finite(self) -> Tensor:
        """``[1]``: 1 if the loss or an entry of the gradient is not finite, or 0; a mean over ranks lies between."""
        return self.vector[-1:]

    def at_loss_of(self, other: "OuterGradient") -> "OuterGradient":
        """This gradient with another one's loss; not finite if either is not."""
        not_finite = torch.maximum(self.not_finite, other.not_finite)
        return OuterGradient(torch.cat([other.loss.reshape(1), self.gradient, not_finite]))
