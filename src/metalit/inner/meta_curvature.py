"""Gradient descent with a learned curvature: each parameter's gradient is multiplied by a matrix for each dimension."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from metalit.inner.rule import Numbers
from metalit.inner.sgd import SGD
from metalit.tree import Tree, leaves, tree_map


@dataclass(frozen=True)
class MetaCurvature(SGD):
    """Meta-Curvature: θ ← θ − lr · MC(∇θ L), MC(G) = G ×₃ M_f ×₂ M_i ×₁ M_o (Park, Oliva 2019, eqs. 6 and 9, "MC2").

    The matrices are outer parameters, and start from the identity, where it is :class:`SGD`. A weight ``[out, in]`` has
    M_o ``[out, out]`` and M_i ``[in, in]``, and MC(G) = M_o G M_iᵀ; further dimensions, as of a filter, count as one; a
    vector has one matrix. A dimension of n entries has n² of them, so layers should be narrow.

    Args:
        lr, momentum, nesterov, weight_decay, schedule, clip_norm: see :class:`SGD`; the curvature comes after clipping.

    Raises:
        InputError: see :class:`SGD`.
    """

    @property
    def learns(self) -> bool:
        """It always does."""
        return True

    def outer(self, inner: Tree, steps: int) -> dict[str, Tree]:
        """Those of SGD, and ``curvature``: the matrices of each parameter, by the number of the dimension."""
        return {**super().outer(inner, steps), "curvature": _identities(inner)}

    def seen(self, gradient: Tree, numbers: dict[str, Numbers], outer: dict[str, Tree]) -> Tree:
        """The gradient, clipped and curved."""
        matrices = (matrix for _, matrix in leaves(outer["curvature"]))  # leaf by leaf, dimension by dimension
        first = next((leaf for _, leaf in leaves(gradient)), None)
        # mixed precision is of the losses; a gradient stays as it is, and torch's batched product takes but one type
        with nullcontext() if first is None else torch.autocast(first.device.type, enabled=False):
            return tree_map(lambda leaf: _curved(leaf, matrices), super().seen(gradient, numbers, outer))


def _sizes(leaf: Tensor) -> list[int]:
    return [*leaf.shape[:2], *([prod(leaf.shape[2:])] if leaf.dim() > 2 else [])] or [1]


def _identities(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {key: _identities(branch) for key, branch in tree.items()}
    return {str(axis): torch.eye(size, dtype=tree.dtype, device=tree.device) for axis, size in enumerate(_sizes(tree))}


def _curved(leaf: Tensor, matrices: Iterator[Tensor]) -> Tensor:
    """The mode products of a leaf with the next matrices."""
    value = leaf.reshape(_sizes(leaf))
    for axis in range(value.dim()):
        value = torch.tensordot(next(matrices), value, dims=([1], [axis])).movedim(0, axis)
    return value.reshape(leaf.shape)
