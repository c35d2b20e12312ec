"""Functions that a config names for arguments that are factories, such as an optimiser's."""

from collections.abc import Callable
from importlib import import_module
from inspect import isclass
from typing import Any, get_args, get_origin, get_type_hints

from metalit.checkpoints.classes import hints_of, members
from metalit.errors import InputError


def check_factories(config: Any, where: str, hint: Any = Any) -> None:
    """Check every function in a configuration that is to be a factory, such as an optimiser's.

    Args:
        config: parsed values, as nested dictionaries and lists.
        where: what they are of, for messages.
        hint: what the argument is declared to be.

    Raises:
        InputError: one that does not say, by its annotation, that it returns what makes the object.
    """
    if isinstance(config, list | tuple):
        for number, value in enumerate(config):
            check_factories(value, f"{where}[{number}]")
        return
    if not isinstance(config, dict):
        return
    path = config.get("class_path")
    if not isinstance(path, str):
        for name, value in config.items():
            check_factories(value, f"{where}.{name}")
        return
    target, wanted = _named(path), tuple(_results(hint))
    if wanted and not isclass(target):
        made = _results(get_type_hints(target).get("return", Any)) if callable(target) else []
        if not (made and all(issubclass(result, wanted) for result in made)):
            kinds = " or ".join(dict.fromkeys(kind.__name__ for kind in wanted))
            raise InputError(
                f"{where}={path} is a function that does not say that it returns what makes an object of {kinds}; name "
                f"a class, or annotate the function (-> Callable[..., {wanted[0].__name__}])"
            )
    hints = hints_of(target) if isclass(target) else {}
    for name, value in {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})}.items():
        check_factories(value, f"{where}.{name}", hints.get(name, Any))


def _results(hint: Any) -> list[type]:
    """The classes that the wanted function may return."""
    wanted = [kind for kind in members(hint) if get_origin(kind) is Callable and get_args(kind)]
    return [result for kind in wanted for result in members(get_args(kind)[1]) if isclass(result)]


def _named(path: str) -> Any:
    """The object that the parser has found by this name."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None
