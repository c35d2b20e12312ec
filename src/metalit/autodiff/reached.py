"""Finds parameters that a value depends on past the arguments that are differentiated."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metalit.errors import InputError
from metalit.private_torch import bottom, memory


class Bypass:
    """Finds values that reach parameters by another way than the arguments, so that part of the gradient is lost.

    Attributes:
        parameters: what is to be handed over in place of the given ones, with the same values and derivatives.

    Args:
        parameters: what is differentiated by, by name.
        others: tensors that stand for the same parameters elsewhere, by the same names.
    """

    def __init__(self, parameters: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None) -> None:
        with torch.enable_grad():
            self.parameters = {name: value.view_as(value) for name, value in parameters.items()}
        self._ways = {node for value in self.parameters.values() if (node := bottom(value).grad_fn) is not None}
        named = [*parameters.items(), *(others or {}).items()]
        self._names = {_memory(value): name for name, value in named if value.layout is torch.strided}

    def check(self, value: Tensor, owner: str) -> None:
        """Raise an :class:`InputError` where ``value`` depends on a parameter by another way."""
        node = bottom(value).grad_fn
        waiting, visited = [node] if node is not None else [], set(self._ways)
        while waiting:
            node = waiting.pop()
            if node in visited:
                continue
            visited.add(node)
            leaf: Any = getattr(node, "variable", None)
            if leaf is not None and (name := self._names.get(_memory(leaf))) is not None:
                raise InputError(
                    f"{owner}: it reaches {name!r} by another way than its arguments, and would lose that part of the "
                    "gradient; use the parameters and the network that it is given, or .detach() what counts as a "
                    "constant"
                )
            waiting += [below for below, _ in node.next_functions if below is not None]


def _memory(value: Tensor) -> int:
    return memory(bottom(value))
