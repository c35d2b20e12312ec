"""Parameters by their names: chosen by shell patterns, and held to those of a module."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import Tensor, nn

from metalit.errors import InputError


def matching(
    available: Iterable[str],
    patterns: str | Sequence[str],
    owner: str = "names",
    what: str = "trainable parameter",
) -> list[str]:
    """The names that match at least one of the patterns, in their own order.

    Args:
        available: the names there are.
        patterns: shell patterns, as of :func:`fnmatch.fnmatchcase`; one may be given as it is.
        owner: the argument that gives the patterns, for messages.
        what: what the names are of, for messages.

    Raises:
        InputError: no pattern, or one that matches nothing.

    >>> matching(["hidden1.weight", "hidden1.bias", "out.weight"], ["*.weight"])
    ['hidden1.weight', 'out.weight']
    """
    return list(_matching(tuple(available), (patterns,) if isinstance(patterns, str) else tuple(patterns), owner, what))


@lru_cache  # asked in every inner step, of the same names
def _matching(names: tuple[str, ...], patterns: tuple[str, ...], owner: str, what: str) -> tuple[str, ...]:
    for pattern in patterns or (None,):
        if pattern is None or not any(fnmatchcase(name, pattern) for name in names):
            wrong = "no pattern is given, which" if pattern is None else f"the pattern {pattern!r}"
            raise InputError(f"{owner}: {wrong} matches no {what}; there are {list(names)}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def of_module(module: nn.Module, values: Mapping[str, Tensor], owner: str = "parameters") -> dict[str, Tensor]:
    """``values`` by the names of ``module.named_parameters()``, whichever of its names a tied weight goes by.

    Raises:
        InputError: a name that is no parameter, a tied weight given twice, or a tensor of another shape; the message
            begins with ``owner``.

    >>> import torch
    >>> of_module(nn.Linear(2, 1), {"bias": torch.zeros(1)})
    {'bias': tensor([0.])}
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name not in parameters:
            raise InputError(f"{owner}: {name!r} is no parameter of {type(module).__name__}; it has {list(parameters)}")
        if not isinstance(value, Tensor) or value.shape != parameters[name].shape:
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise InputError(f"{owner}: {name!r} has shape {shape}, but needs {list(parameters[name].shape)}")
        name_of_all = first[id(parameters[name])]
        if name_of_all in found:
            raise InputError(f"{owner}: {name!r} and {name_of_all!r} are one tied weight; give one of them")
        found[name_of_all] = value
    return found
