"""Finds out what else an evaluation of a module does, by watching one: what it writes to, whether it draws."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metalit.private_torch import TorchDispatchMode, bottom, memory, written_arguments


class ModuleFacts:
    """One fact for each module, as long as its layers and their modes are the same."""

    def __init__(self) -> None:
        self.facts: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()

    def get(self, layers: list[nn.Module]) -> bool | None:
        """The fact of the module with these layers, itself first; None if there is none yet."""
        facts = self.facts.get(layers[0])
        return None if facts is None else facts.get(_modes(layers))

    def set(self, layers: list[nn.Module], fact: bool) -> None:
        """Keep a fact of the module with these layers."""
        self.facts.setdefault(layers[0], {})[_modes(layers)] = fact


def _modes(layers: list[nn.Module]) -> tuple[Any, ...]:
    return tuple([(layer.__class__, layer.training) for layer in layers])


class Writes(TorchDispatchMode):
    """Notes which memory is written to, also by ``.data`` and under ``no_grad``, where no version counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and note what it may have written to."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        for argument in written_arguments(func, args, kwargs):
            self._note(argument)
        return found

    def of_any(self, values: Iterable[Any]) -> bool:
        """Whether the memory of one of the tensors among the values was, or may have been, written to."""
        tensors = [bottom(value) for value in values if isinstance(value, Tensor)]
        return any(tensor.layout is not torch.strided or memory(tensor) in self.written for tensor in tensors)

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            self.written.add(memory(value))
        elif isinstance(value, list | tuple):
            for part in value:
                self._note(part)
