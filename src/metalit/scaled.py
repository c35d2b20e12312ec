"""Losses that are scaled before they are differentiated, so that half precision keeps what is small."""

from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from metalit.autodiff.attention import plain_attention
from metalit.problem import Problem
from metalit.tree import Tree, tree_map

_LEAST = 2.0**-40  # of a loss that is 0, or as good as


class Scaled(Problem):
    """A problem with the same inner gradients and a hypergradient that is ``scale`` times as large.

    outer_loss ← s · outer_loss,  ∇θ inner_loss ← ∇θ(r · inner_loss) / r,  r = min(2^(4 − ⌊log₂|inner_loss| / 2⌋), 16 s)

    (Loss scaling: Micikevicius et al. 2018, section 3.2.) r is a constant for differentiation. It grows as the inner
    loss falls, as the square root, because gradients fall in proportion to the loss where its units are large, and as
    its root near a minimum: at a loss of 10⁻⁶ it is 2¹⁴. A loss near 0 may have a large gradient all the same: where
    that overflows, s is made smaller, and r with it. The division is done in single precision, on the parameters' own
    gradients.

    Args:
        problem: the problem.
        scale: s, as a tensor of no dimensions.

    >>> from metalit.problems import ThetaPhi
    >>> problem, (theta, phi) = ThetaPhi([1.0], [2.0]), (torch.tensor([1.0]), {"phi": torch.tensor([2.0])})
    >>> scaled = Scaled(problem, torch.tensor(1024.0))
    >>> problem.outer_loss(theta, phi, None), scaled.outer_loss(theta, phi, None)
    (tensor(4.), tensor(4096.))
    >>> problem.inner_grad(theta, phi, None, 0), scaled.inner_grad(theta, phi, None, 0)
    (tensor([8.]), tensor([8.]))
    """

    def __init__(self, problem: Problem, scale: Tensor) -> None:
        super().__init__()
        self.problem = problem
        self.scale = scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the problem has beside the protocol, such as predict
            return getattr(super().__getattr__("problem"), name)

    def outer(self) -> dict[str, Tensor]:
        """Return that of the problem."""
        return self.problem.outer()

    def init(self, outer: dict[str, Tensor], task: Any) -> Tree:
        """Return that of the problem."""
        return self.problem.init(outer, task)

    def inner_loss(self, inner: Tree, outer: dict[str, Tensor], task: Any, step: int) -> Tensor:
        """Return that of the problem."""
        return self.problem.inner_loss(inner, outer, task, step)

    def inner_grad(self, inner: Tree, outer: dict[str, Tensor], task: Any, step: int) -> Tree:
        """Return that of the problem."""

        def enlarged(inner: Tree) -> tuple[Tensor, Tensor]:
            loss = self.inner_loss(inner, outer, task, step)
            loss = loss.float() if loss.dtype == torch.half else loss
            factor = torch.exp2(4 - torch.floor(torch.log2(loss.detach().abs().clamp(min=_LEAST)) / 2))
            factor = torch.minimum(factor, 16 * self.scale)
            return factor * loss, factor

        with plain_attention():
            gradient, factor = grad(enlarged, has_aux=True)(inner)
        return tree_map(lambda value: value / factor, gradient)

    def after(self, steps: int) -> "Scaled":
        """Return that of the problem, scaled."""
        return Scaled(self.problem.after(steps), self.scale)

    def outer_loss(self, inner: Tree, outer: dict[str, Tensor], task: Any) -> Tensor:
        """Return s times that of the problem."""
        return self.scaled(self.problem.outer_loss(inner, outer, task))

    def scaled(self, value: Tensor) -> Tensor:
        """Return s times ``value``."""
        return self.scale * value  # in single precision, as the scale is
