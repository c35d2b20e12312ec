"""Objects from the plain values that a checkpoint keeps of a configuration.

A checkpoint is data and never runs anything: of what it names, only classes are used, of the kind that the argument is
declared to be, from metalit, torch.nn, torch.optim or a module that the user has imported. Nothing else is imported,
and no function is called.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from importlib import import_module
from inspect import isclass
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import nn

from metalit.errors import InputError

_TRUSTED = ("torch.nn.", "torch.optim.", "lightning.pytorch.cli.ReduceLROnPlateau")
_NOT_THE_USERS = {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "jsonargparse",
    *sys.stdlib_module_names,
}


def arguments(cls: type, kept: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Build the arguments of a class from plain values.

    Args:
        cls: the class, whose annotations say what each argument may be.
        kept: plain values by name; ``{"class_path": ..., "init_args": {...}}`` stands for an object.
        where: what is built, for messages.

    Raises:
        InputError: a name that is none of a class, or of a class that may not be built here; see the module.
    """
    if not isinstance(kept, Mapping) or not all(isinstance(name, str) for name in kept):
        raise InputError(f"{where} is no table of arguments by name")
    hints = hints_of(cls)
    return {name: _built(value, hints.get(name, Any), f"{where}.{name}") for name, value in kept.items()}


def find_class(path: Any, where: str) -> type:
    """The class of this dotted name, without importing anything but metalit.

    Raises:
        InputError: there is none, or it is not one that a checkpoint may name.
    """
    parts = path.split(".") if isinstance(path, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InputError(f"{where} names {path!r}, which is no class")
    if parts[0] == "metalit":
        _import(parts)
    modules = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in sys.modules]
    found: Any = sys.modules[modules[0]] if modules else None
    for name in parts[modules[0].count(".") + 1 :] if modules else ():
        found = vars(found).get(name) if hasattr(found, "__dict__") else None  # getattr might run code of the module
    if not isclass(found):
        way_out = (
            ""
            if modules and modules[0].count(".") == len(parts) - 2
            else (f"; if you trust it, import the module {'.'.join(parts[:-1])!r} before")
        )
        raise InputError(
            f"{where} names {path}, which is no class of metalit, of torch.nn, of torch.optim or of a module that has "
            f"been imported: a checkpoint is data and runs nothing{way_out}"
        )
    home = f"{found.__module__}.{found.__qualname__}"
    if home.split(".", maxsplit=1)[0] in _NOT_THE_USERS and not home.startswith(_TRUSTED):
        raise InputError(f"{where} names {path}, which a checkpoint may not: it is data and runs nothing")
    return found


def _import(parts: list[str]) -> None:
    for end in range(1, len(parts)):
        try:
            import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            return


def hints_of(cls: type) -> dict[str, Any]:
    """The declared types of the arguments of a class."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # what a subclass hands on as **kwargs is annotated above it
        try:
            hints |= get_type_hints(vars(base)["__init__"]) if "__init__" in vars(base) else {}
        except (NameError, TypeError, AttributeError):
            continue  # names that only a type checker knows
    return hints


def _built(value: Any, hint: Any, where: str) -> Any:
    kinds = list(members(hint))
    if isinstance(value, dict):
        if "class_path" in value:
            return _object(value, kinds, where)
        record = next((kind for kind in kinds if isclass(kind) and is_dataclass(kind)), None)
        if record:
            return _made(record, arguments(record, value, where), where)
        inner = next((get_args(kind)[1] for kind in kinds if _holds(kind, Mapping)), Any)
        return {name: _built(part, inner, f"{where}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        sequence = next((kind for kind in kinds if get_args(kind) and not _holds(kind, Mapping, Callable)), list)
        inner = [part for part in get_args(sequence) if part is not ...] or [Any]
        parts = [_built(part, inner[min(n, len(inner) - 1)], f"{where}[{n}]") for n, part in enumerate(value)]
        return next((kind(parts) for kind in (tuple, set) if _holds(sequence, kind)), type(value)(parts))
    return _named(value, kinds, where) if isinstance(value, str) else value


def _named(value: str, kinds: list[Any], where: str) -> Any:
    """What a string stands for: itself, or by the type that is declared a class, an enum's member or a path."""
    if any(kind in (str, Any, object) or not (isclass(kind) or get_origin(kind)) for kind in kinds):
        return value
    for kind in kinds:
        if get_origin(kind) is type:
            found = find_class(value, where)
            _check(found, [part for part in members(get_args(kind)[0]) if isclass(part)] or [nn.Module], value, where)
            return found
        if isclass(kind) and issubclass(kind, Enum) and value in kind.__members__:
            return kind[value]
        if isclass(kind) and issubclass(kind, PurePath):
            return kind(value)
    if any(
        _holds(kind, Callable) or kind is Callable or (isclass(kind) and hasattr(kind, "forward")) for kind in kinds
    ):
        raise InputError(
            f"{where} names {value!r}, and a checkpoint may name classes alone: it is data and runs nothing"
        )
    return value


def _object(value: dict[str, Any], kinds: list[Any], where: str) -> Any:
    if extra := value.keys() - {"class_path", "init_args", "dict_kwargs"}:
        raise InputError(f"{where} is no class with its arguments: it holds {sorted(map(str, extra))} too")
    path = value["class_path"]
    cls = find_class(path, where)
    factories = [kind for kind in kinds if _holds(kind, Callable)]
    results = [result for kind in factories for result in members(get_args(kind)[1]) if isclass(result)]
    made_later = bool(results) and issubclass(cls, tuple(results))
    if not made_later:
        loose = any(kind in (Any, object, Callable) for kind in kinds) or (factories and not results)
        allowed = [kind for kind in kinds if isclass(kind) and kind not in (Any, object)]
        _check(cls, [*allowed, *results, *([nn.Module] if loose else [])], path, where)
    given: dict[str, Any] = {}
    for part in ("init_args", "dict_kwargs"):
        given |= arguments(cls, value.get(part) or {}, where)
    return partial(cls, **given) if made_later else _made(cls, given, where)


def _check(cls: type, allowed: list[type], path: str, where: str) -> None:
    if not (allowed and issubclass(cls, tuple(allowed))):
        names = " or ".join(dict.fromkeys(kind.__name__ for kind in allowed if kind is not type(None))) or "object"
        raise InputError(f"{where} names {path}, which is no {names}: a checkpoint is data and runs nothing")


def _made(cls: type, given: dict[str, Any], where: str) -> Any:
    try:
        return cls(**given)
    except InputError:
        raise
    except Exception as cause:  # whatever the user's class may raise
        reason = (str(cause).strip().splitlines() or ["no message"])[0]
        raise InputError(f"{where}: {cls.__name__} cannot be built from what the checkpoint keeps: {reason}") from cause


def members(hint: Any) -> Iterator[Any]:
    """The types that a type is a union of."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for part in get_args(hint):
            yield from members(part)
    elif origin is Annotated:
        yield from members(get_args(hint)[0])
    elif isinstance(hint, TypeVar):
        yield from members(hint.__bound__ or Any)
    else:
        yield hint


def _holds(kind: Any, *origins: Any) -> bool:
    """Whether it is a generic type, such as ``list[int]``, of one of these origins."""
    origin = get_origin(kind)
    return isclass(origin) and any(issubclass(origin, each) for each in origins) and bool(get_args(kind))
