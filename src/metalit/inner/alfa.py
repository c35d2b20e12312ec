"""Gradient descent whose rates and decays a small network finds anew at each step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalit.inner.base import GradFn
from metalit.inner.learned import Number
from metalit.inner.rule import State
from metalit.inner.sgd import SGD
from metalit.tree import Tree, leaves, tree_map


@dataclass(frozen=True)
class ALFA(SGD):
    """ALFA: θ ← (1 − lr · weight_decay · bⱼ) · θ − lr · aⱼ · ∇θ L for each parameter j (Baik et al. 2020, section 3).

    (a, b) = W₂ ReLU(W₁τ + c₁) + c₂, where τ holds the means of all n parameters, and of their gradients: 2n numbers of
    2n, of one task at one step. The network is an outer parameter. W₂ starts from 0 and c₂ from 1: as gradient descent
    with weight decay.

    Args:
        lr, weight_decay: what a and b multiply; ``Learned(start, "parameter and step")`` is as in the paper.
        seed: of the values that W₁ starts from.
        momentum, nesterov, schedule, clip_norm: see :class:`SGD`.

    Raises:
        InputError: see :class:`SGD`.
    """

    weight_decay: Number = 0.0005
    seed: int = 0

    @property
    def learns(self) -> bool:
        """It always does."""
        return True

    def outer(self, inner: Tree, steps: int) -> dict[str, Tree]:
        """Those of SGD, and the ``network``."""
        found, (first, *_) = super().outer(inner, steps), [*(leaf for _, leaf in leaves(inner)), None]
        if first is None:
            return found
        size = 2 * len(list(leaves(inner)))
        drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        network = {
            "hidden": {"weight": first.new_tensor((drawn / math.sqrt(size)).tolist()), "bias": first.new_zeros(size)},
            "out": {"weight": first.new_zeros(size, size), "bias": first.new_ones(size)},
        }
        return {**found, "network": network}

    def update(
        self, grad_fn: GradFn, inner: Tree, state: dict[str, State], outer: dict[str, Any], step: int
    ) -> tuple[Tree, dict[str, State]]:
        """Take one step with rates and decays of its own."""
        numbers = self.numbers(inner, outer, step)
        gradient = self.seen(grad_fn(self.asked(inner, state, numbers)), numbers, outer)
        if not numbers:
            return inner, state
        dtype = outer["network"]["hidden"]["bias"].dtype
        means = torch.stack([leaf.mean().to(dtype) for tree in (inner, gradient) for _, leaf in leaves(tree)])
        each = iter(_of_network(outer["network"], means).unbind())  # a, then b
        gradient = tree_map(lambda leaf: next(each).to(leaf.dtype) * leaf, gradient)
        for name, leaf in leaves(inner):
            decay = numbers[name]["weight_decay"] * next(each).to(leaf.dtype)
            numbers[name] = {**numbers[name], "weight_decay": decay}
        return self.moved(inner, gradient, state, numbers)


def _of_network(layers: dict[str, Any], means: Tensor) -> Tensor:
    hidden, out = layers["hidden"], layers["out"]
    return out["weight"] @ (hidden["weight"] @ means + hidden["bias"]).relu() + out["bias"]
