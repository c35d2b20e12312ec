"""What an evaluation may leave in a module, and how it is put back."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metalit.private_torch import MODULE_TABLES, RECURRENT_LISTS, buffers_of, children_of, memory, parameters_of

# types whose values cannot change, or that are handled elsewhere
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type, FunctionType, MethodType, ModuleType})
_PLAIN |= {BuiltinFunctionType, torch.dtype, torch.device, torch.Size, nn.Parameter}
_DICTS = (OrderedDict, dict)
_HOLD = frozenset({*_DICTS, list, deque})


class Kept:
    """The state of a module: the attributes of all its layers, and what their lists, dictionaries and objects hold.

    Args:
        module: any module; another object has no state.
        values: keep the values of its buffers and other tensors too, parameters aside.
    """

    def __init__(self, module: object, values: bool = False) -> None:
        self.layers: list[nn.Module] = []
        self._parameters: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._empty: list[Any] = []
        self._others: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Callable[[Any, Tensor], None], Any, Tensor]] = []
        self._tuples: list[tuple[Callable[[Any, Any], None], Any, tuple[Any, ...]]] = []
        self._seen: set[int] = set()
        if isinstance(module, nn.Module):
            self._keep_layers(module)
        self._values = [(tensor, tensor.clone()) for tensor in self._distinct()] if values else []

    def restore(self) -> None:
        """Put back all that was kept."""
        for now, content in self._dicts:
            now.update(content)
            if len(now) > len(content):
                for name in now.keys() - content.keys():
                    del now[name]
        for value in self._empty:
            if value:
                value.clear()
        for value, content in self._others:
            _put_back(value, content)
        for tensor, value in self._values:
            # tensors that share memory cannot be written to; they have not been, then
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    def lend_clones(self) -> dict[int, Tensor]:
        """Let the module hold clones of its tensors, but for parameters, until :meth:`restore`; by the id of each."""
        clones = _clones(self._distinct())
        for put, key, tensor in self._tensors:
            put(key, clones[id(tensor)])
        for put, key, parts in self._tuples:
            new = [clones.get(id(part), part) for part in parts]
            put(key, parts._make(new) if hasattr(parts, "_make") else tuple(new))
        return clones

    def restore_parameters(self) -> None:
        """Put back the parameters alone, also those that recurrent layers have in a list for cuDNN."""
        for layer, parameters, lists in self._parameters:
            parameters_of(layer).update(parameters)
            layer.__dict__.update(lists)

    def cut(self) -> None:
        """Cut the tensors that the layers hold now, also in lists and dictionaries, off their graphs."""
        for layer in self.layers:
            _cut(layer.__dict__)
            _cut(buffers_of(layer))

    def _distinct(self) -> list[Tensor]:
        return list({id(tensor): tensor for _, _, tensor in self._tensors}.values())

    def _keep_layers(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self.layers.append(module)
        state = module.__dict__
        lists = {name: state[name] for name in RECURRENT_LISTS} if isinstance(module, nn.RNNBase) else {}
        self._parameters.append((module, parameters_of(module).copy(), lists))
        self._dicts.append((state, state.copy()))
        for name in MODULE_TABLES:
            if table := state[name]:
                self._dicts.append((table, table.copy()))
            else:
                self._empty.append(table)
        buffers = buffers_of(module)
        for name, value in buffers.items():
            if value is not None:
                self._tensors.append((buffers.__setitem__, name, value))
        others = [pair for pair in state.items() if type(pair[1]) not in _PLAIN and pair[0] not in MODULE_TABLES]
        for name, value in others:
            if type(value) in _DICTS and not value:
                self._empty.append(value)
            else:
                self._keep(state.__setitem__, name, value)
        for child in children_of(module).values():
            if child is not None:
                self._keep_layers(child)

    def _keep(self, put: Callable[[Any, Any], None] | None, key: Any, value: Any) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensors.append((put or _nowhere, key, value))
        elif isinstance(value, nn.Module):
            self._keep_layers(value)  # one that is not registered
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            if isinstance(value, tuple) and put is not None:
                self._tuples.append((put, key, value))
            self._keep_inside(value)

    def _keep_inside(self, value: Any) -> None:
        if isinstance(value, dict | list | deque | set) and not value:
            self._empty.append(value)
        elif isinstance(value, dict):
            self._dicts.append((value, value.copy()))
            self._keep_each(value.__setitem__, value.items())
        elif isinstance(value, list | deque):
            self._others.append((value, value.copy()))
            self._keep_each(value.__setitem__, enumerate(value))
        elif isinstance(value, set):
            self._others.append((value, value.copy()))
        elif isinstance(value, tuple):
            self._keep_each(None, enumerate(value))
        elif isinstance(value, torch.Generator):
            self._others.append((value, value.get_state()))
        elif hasattr(value, "__array_interface__"):
            self._others.append((value, value.copy()))
        elif slots := _slots(value):
            self._others.append((value, {name: getattr(value, name) for name in slots}))
        elif not isinstance(value, type) and type(state := getattr(value, "__dict__", None)) is dict:
            # an object of the user's: its attributes, but not what they hold
            self._dicts.append((state, state.copy()))
            for name, part in state.items():
                if type(part) is Tensor:
                    self._tensors.append((state.__setitem__, name, part))

    def _keep_each(self, put: Callable[[Any, Any], None] | None, items: Any) -> None:
        for key, value in items:
            if type(value) not in _PLAIN:
                self._keep(put, key, value)


def _cut(held: Any, depth: int = 2) -> None:
    for key, value in held.items() if isinstance(held, dict) else enumerate(held):
        if isinstance(value, Tensor):
            if not value.is_leaf:
                held[key] = value.detach()
        elif depth and type(value) in _HOLD and value and key not in MODULE_TABLES:
            _cut(value, depth - 1)


def _nowhere(key: Any, value: Any) -> None:
    """For a place in a tuple: the tuple is replaced as a whole."""


def _clones(tensors: list[Tensor]) -> dict[int, Tensor]:
    """A clone of each by its id; those that share memory share it then too."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        place = memory(tensor) if tensor.layout is torch.strided else id(tensor)
        groups.setdefault((place, tensor.dtype), []).append(tensor)
    found: dict[int, Tensor] = {}
    for first, *others in groups.values():
        if not others:
            found[id(first)] = first.clone()
            continue
        whole = first.new_empty(0).set_(first.untyped_storage()).clone()
        for part in (first, *others):
            found[id(part)] = whole.as_strided(part.size(), part.stride(), part.storage_offset())
    return found


def _put_back(value: Any, content: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(content)
    elif hasattr(value, "__array_interface__"):
        value[...] = content
    elif isinstance(content, dict):  # of an object without a dictionary
        for name, part in content.items():
            setattr(value, name, part)
    else:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(content)


def _slots(value: Any) -> list[str]:
    """The attributes of an object that has no dictionary of them."""
    kinds = [] if isinstance(value, type) or hasattr(value, "__dict__") else type(value).__mro__
    names = [name for kind in kinds for name in vars(kind).get("__slots__", ())]
    return [name for name in names if hasattr(value, name)]


@contextmanager
def untouched(module: object) -> Iterator[Kept]:
    """Leave ``module`` as it was: its parameters, buffers, attributes and hooks, but for values changed in place.

    So a layer that is registered under two names keeps no tensor that it was evaluated with, nor do recurrent layers
    in their lists of weights for cuDNN, nor does any layer keep an activation.
    """
    kept = Kept(module)
    try:
        yield kept
    finally:
        kept.restore()
