"""What an error that came out of a network means, in one line: which layer raised it, and what can be done."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from metalit.autodiff.functional import evaluated
from metalit.errors import InputError, NonFiniteError, StoppedError
from metalit.private_torch import parameters_of

_ABOUT_SHAPES = re.compile(r"shape|size|dimension|channels", re.IGNORECASE)
_NO_SECOND = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented|once_differentiable")


@contextmanager
def as_input_error(owner: str, module: nn.Module, x: Tensor | None = None) -> Iterator[None]:
    """Raise what goes wrong within as an :class:`InputError` of one line, with the arguments of :func:`refused`."""
    try:
        yield
    except (InputError, NonFiniteError, StoppedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever code of the user's may raise
        raise InputError(refused(owner, module, error, x)) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def culprit(error: BaseException, module: nn.Module) -> str:
    """The layer of ``module`` in whose forward pass an error was raised, such as ``layer 'out' (Linear)``.

    The empty string where it is not clear, as in the derivative of a layer.
    """
    names = {id(layer): name for name, layer in module.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        layer = trace.tb_frame.f_locals.get("self")
        if isinstance(layer, nn.Module) and names.get(id(layer)):
            found = f"layer {names[id(layer)]!r} ({type(layer).__name__})"
        trace = trace.tb_next
    return found


def without_second_derivative(error: BaseException) -> str:
    """The operation whose second derivative torch lacks, if that is what an error says, else the empty string.

    >>> without_second_derivative(NotImplementedError("the derivative for '_cdist_backward' is not implemented."))
    'cdist'
    """
    found = _NO_SECOND.search(str(error))
    return (found[1] or "a function of your own").strip("_").removesuffix("_backward") if found else ""


def refused(owner: str, module: nn.Module, error: BaseException, x: Tensor | None = None) -> str:
    """Say in one line what a network cannot do.

    Args:
        owner: what the network is called.
        module: the network.
        error: what came out of it.
        x: the inputs, ``[rows, ...]``, that it was tried on, if they are known.
    """
    line = first_line(error)
    if _in_the_loss(error):
        return (
            f"loss: it fails on what the network predicts with {type(error).__name__}: {line}; classes 0 … C − 1 need "
            "C outputs, real targets as many as they have columns"
        )
    if x is not None and _ABOUT_SHAPES.search(line) and not _gets_through_a_layer(module, x):
        what = {2: "column(s) of x", 4: "channel(s)"}.get(x.dim())
        columns = f", {x.shape[1]} {what}" if what else ""
        return f"{owner} cannot take inputs of shape {tuple(x.shape)}{columns}: {line}"
    place = culprit(error, module)
    if line.startswith("Expected more than 1"):
        return (
            f"{owner}: {place or 'a layer'} has no statistics of a single value: {line}; give more rows, or use "
            "GroupNorm or LayerNorm"
        )
    types = _of_types(module, x) if x is not None and ("type" in line or "scalar" in line) else ""
    return f"{owner}{': ' + place if place else ''} fails with {type(error).__name__}: {line}{types}"


def _in_the_loss(error: BaseException) -> bool:
    trace, found = error.__traceback__, False
    while trace is not None:
        found = found or trace.tb_frame.f_code.co_name == "row_losses"
        trace = trace.tb_next
    return found


def _of_types(module: nn.Module, x: Tensor) -> str:
    kinds = sorted({str(value.dtype) for value in module.parameters()})
    way_out = " (trainer.precision=64-true makes all double, network.float() single)" if x.is_floating_point() else ""
    return f"; x is of {x.dtype}, the network's parameters of {', '.join(kinds)}: convert one{way_out}"


def _gets_through_a_layer(module: nn.Module, x: Tensor) -> bool:
    """Whether at least one layer with parameters of its own takes what it is given."""
    passed: list[str] = []
    network = getattr(module, "network", module)

    def note(layer: nn.Module, given: object, found: object) -> None:
        passed.extend(parameters_of(layer))

    hook = register_module_forward_hook(note)
    try:
        with torch.no_grad():
            evaluated(network, {}, (x,))
    except Exception:  # the very error that is being explained
        pass
    finally:
        hook.remove()
    return bool(passed)
