"""Gradient descent, with momentum and weight decay if they are asked for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalit.inner.learned import DECAY, RATE, SHARE, Domain, Number, is_off
from metalit.inner.pieces import stepped
from metalit.inner.rule import GradientRule, Numbers, State


@dataclass(frozen=True)
class SGD(GradientRule):
    """Differentiable gradient descent: θ ← θ − lr · v, v ← momentum · v + ∇θ L + weight_decay · θ, from v = 0.

    Without momentum it is θ ← θ − lr · (∇θ L + weight_decay · θ), and has no state. With ``nesterov`` gradient and
    decay are taken at the look-ahead θ − lr · momentum · v (Nesterov 1983), where ``torch.optim.SGD`` has its
    parameters.

    Args:
        lr: the step size α of Finn et al. 2017, eq. 1.
        momentum: from 0 to below 1.
        nesterov: look ahead.
        weight_decay: 0 or more.
        schedule, clip_norm: see :class:`~metalit.inner.rule.GradientRule`.

    Raises:
        InputError: a number outside of its domain, such as an ``lr`` that is not a finite positive number.

    >>> SGD(0.1).update(lambda w: 2 * w, torch.tensor(1.0), {"": {}}, {}, step=0)[0]
    tensor(0.8000)
    """

    domains: ClassVar[dict[str, Domain]] = {"lr": RATE, "momentum": SHARE, "weight_decay": DECAY}
    lr: Number = 0.01
    momentum: Number = 0.0
    nesterov: bool = False
    weight_decay: Number = 0.0

    def begin(self, leaf: Tensor) -> State:
        """The velocity v, if there is momentum."""
        return {} if is_off(self.momentum) else {"velocity": torch.zeros_like(leaf)}

    def ask_at(self, leaf: Tensor, state: State, numbers: Numbers) -> Tensor:
        """At θ, or at the look-ahead."""
        if not self.nesterov or is_off(self.momentum):
            return leaf
        return stepped(leaf, numbers["lr"] * numbers["momentum"], state["velocity"])

    def move(self, leaf: Tensor, gradient: Tensor, state: State, numbers: Numbers) -> tuple[Tensor, State]:
        """Step against the gradient."""
        if not is_off(self.weight_decay):
            gradient = gradient + numbers["weight_decay"] * self.ask_at(leaf, state, numbers)
        if is_off(self.momentum):
            return stepped(leaf, numbers["lr"], gradient), state
        velocity = numbers["momentum"] * state["velocity"] + gradient
        return stepped(leaf, numbers["lr"], velocity), {"velocity": velocity}
