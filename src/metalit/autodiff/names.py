"""Parameters by their names: chosen by shell patterns, and held to those of a module."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from metalit.errors import InputError


def matching(available: Iterable[str], patterns: str | Sequence[str]) -> list[str]:
    """The names that match at least one of the patterns, in their own order.

    Args:
        available: the names there are.
        patterns: shell patterns, as of :func:`fnmatch.fnmatchcase`; one may be given as it is.

    Raises:
        InputError: a pattern that matches nothing.

    >>> matching(["hidden1.weight", "hidden1.bias", "out.weight"], ["*.weight"])
    ['hidden1.weight', 'out.weight']
    """
    available = list(available)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns or [""]:
        if not any(fnmatchcase(name, pattern) for name in available):
            raise InputError(f"names: {pattern!r} matches no trainable parameter; there are {available}")
    return [name for name in available if any(fnmatchcase(name, pattern) for pattern in patterns)]


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
