"""RMSprop, whose moments are differentiated too."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalit.inner.learned import DECAY, POSITIVE, RATE, SHARE, Domain, Number, is_off
from metalit.inner.pieces import mixed, root, stepped
from metalit.inner.rule import GradientRule, Numbers, State


@dataclass(frozen=True)
class RMSprop(GradientRule):
    """RMSprop (Tieleman, Hinton 2012, lecture 6e): θ ← θ − lr · g / (√v + eps), v ← alpha · v + (1 − alpha) · g².

    g = ∇θ L + weight_decay · θ; with momentum, θ ← θ − lr · u, u ← momentum · u + g / (√v + eps). The derivative is
    finite where v is 0. The values are those of ``torch.optim.RMSprop``.

    Args:
        lr, alpha, eps, weight_decay, momentum: those of ``torch.optim.RMSprop``.
        schedule, clip_norm: see :class:`~metalit.inner.rule.GradientRule`.

    Raises:
        InputError: a number outside of its domain; ``eps`` must be positive.
    """

    domains: ClassVar[dict[str, Domain]] = {
        "lr": RATE, "alpha": SHARE, "eps": POSITIVE, "weight_decay": DECAY, "momentum": SHARE,
    }  # fmt: skip
    lr: Number = 0.01
    alpha: Number = 0.99
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    momentum: Number = 0.0

    def begin(self, leaf: Tensor) -> State:
        """A zero second moment, and a zero velocity if there is momentum."""
        names = ["second"] if is_off(self.momentum) else ["second", "velocity"]
        return {name: torch.zeros_like(leaf) for name in names}

    def move(self, leaf: Tensor, gradient: Tensor, state: State, numbers: Numbers) -> tuple[Tensor, State]:
        """Step along the gradient, in units of the root of its second moment."""
        if not is_off(self.weight_decay):
            gradient = gradient + numbers["weight_decay"] * leaf
        second = mixed(numbers["alpha"], state["second"], gradient * gradient)
        step, after = gradient / (root(second) + numbers["eps"]), {"second": second}
        if not is_off(self.momentum):
            step = after["velocity"] = numbers["momentum"] * state["velocity"] + step
        return stepped(leaf, numbers["lr"], step), after
