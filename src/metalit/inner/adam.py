"""Adam and AdamW, whose moments are differentiated too."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalit.inner.learned import DECAY, POSITIVE, RATE, SHARE, Domain, Number, is_off
from metalit.inner.pieces import mixed, root, stepped
from metalit.inner.rule import GradientRule, Numbers, State


@dataclass(frozen=True)
class Adam(GradientRule):
    """Adam (Kingma, Ba 2015, algorithm 1): θ ← θ − lr · m̂ / (√v̂ + eps), with g = ∇θ L + weight_decay · θ.

    m ← beta1 · m + (1 − beta1) · g, m̂ = m / (1 − beta1ᵗ), and v, v̂ likewise of g² with beta2; t counts the steps, and
    is part of the state. The step from zero moments is −lr · g / (|g| + eps), with derivative −lr · eps / (|g| + eps)²:
    finite where g is 0, as everywhere. The values are those of ``torch.optim.Adam``.

    Args:
        lr, beta1, beta2, eps, weight_decay: those of ``torch.optim.Adam``.
        schedule, clip_norm: see :class:`~metalit.inner.rule.GradientRule`.

    Raises:
        InputError: a number outside of its domain; ``eps`` must be positive.
    """

    domains: ClassVar[dict[str, Domain]] = {
        "lr": RATE, "beta1": SHARE, "beta2": SHARE, "eps": POSITIVE, "weight_decay": DECAY,
    }  # fmt: skip
    decoupled: ClassVar[bool] = False
    lr: Number = 0.01
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8
    weight_decay: Number = 0.0

    def begin(self, leaf: Tensor) -> State:
        """Zero moments, after no step."""
        steps = torch.zeros((), dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
        return {"first": torch.zeros_like(leaf), "second": torch.zeros_like(leaf), "steps": steps}

    def move(self, leaf: Tensor, gradient: Tensor, state: State, numbers: Numbers) -> tuple[Tensor, State]:
        """Step along the first moment, in units of the root of the second."""
        lr, decays = numbers["lr"], not is_off(self.weight_decay)
        if decays and not self.decoupled:
            gradient = gradient + numbers["weight_decay"] * leaf
        if decays and self.decoupled:
            leaf = (1 - lr * numbers["weight_decay"]) * leaf
        first = mixed(numbers["beta1"], state["first"], gradient)
        second = mixed(numbers["beta2"], state["second"], gradient * gradient)
        steps = state["steps"].detach() + 1
        share1, share2 = ((1 - numbers[beta] ** steps).to(leaf.dtype) for beta in ("beta1", "beta2"))
        size = root(second / share2) + numbers["eps"]
        after = {"first": first, "second": second, "steps": steps}
        return stepped(leaf, lr, first / share1 / size), after


@dataclass(frozen=True)
class AdamW(Adam):
    """:class:`Adam` with θ ← (1 − lr · weight_decay) · θ apart from the gradient (Loshchilov, Hutter 2019).

    Args:
        lr, beta1, beta2, eps, weight_decay, schedule, clip_norm: see :class:`Adam`; values as of ``torch.optim.AdamW``.

    Raises:
        InputError: see :class:`Adam`.
    """

    decoupled: ClassVar[bool] = True
    weight_decay: Number = 0.01
