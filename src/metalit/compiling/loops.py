"""Loops that a compiled program keeps as loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metalit.compiling.compiler import while_loop
from metalit.private_torch import tree_flatten, tree_unflatten


def repeated(step: Callable[..., Any], count: Tensor, carry: Any, context: Any) -> Any:
    """``carry = step(k, carry, context)`` for k = 0 … ``count`` − 1, in a program as one loop, which is compiled once.

    Args:
        step: a pure function of these alone: what it takes from around it, a program takes for constant. It returns
            new tensors, of the shapes and types of ``carry``.
        count: how often, at least once; a tensor of no dimensions, so that it is no part of the program's form.
        carry: a tree, of which only the tensors change.
        context: a tree.

    >>> repeated(lambda k, x, a: a * x + k, torch.tensor(3), torch.tensor(1.0), torch.tensor(2.0))
    tensor(12.)
    """
    (carried, spec), (beside, form) = tree_flatten(carry), tree_flatten(context)
    # copies: torch's loop refuses tensors that share memory, such as slices of one
    moving, fixed = ([leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (carried, beside))

    # torch's loop takes tensors alone, in one flat row: [k, moving …] change from step to step, [count, fixed …] do
    # not. Leaves that are no tensors are the same in each step, and stay outside of the row.
    def body(number: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
        before, known = row[: len(moving)], row[len(moving) + 1 :]
        after = step(number, _filled(carried, before, spec), _filled(beside, known, form))
        found = [leaf for leaf in tree_flatten(after)[0] if isinstance(leaf, Tensor)]
        return number + 1, *[_with_strides_of(was, leaf) for was, leaf in zip(before, found, strict=True)]

    def goes_on(number: Tensor, *row: Tensor) -> Tensor:
        return number < row[len(moving)]

    _, *end = while_loop(goes_on, body, (torch.zeros_like(count), *moving), (count, *fixed))
    return _filled(carried, end, spec)


def _with_strides_of(before: Tensor, after: Tensor) -> Tensor:
    """``after`` in the layout that torch's loop asks for, also along dimensions of size 1, where it says nothing."""
    return after if after.stride() == before.stride() else after.clone(memory_format=torch.contiguous_format)


def _filled(leaves: list[Any], tensors: Any, spec: Any) -> Any:
    """The tree of these leaves, with other tensors in the places of its own."""
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
