"""The step of the outer optimiser."""

from traceback import walk_tb
from typing import Any

import torch

from metalit.errors import InputError
from metalit.training.counters import count_steps
from metalit.training.optimizers import first_line


def take_step(optimizer: Any, has_hooks: bool) -> None:
    """Let an optimiser take a step with the gradient that is written.

    Args:
        optimizer: as Lightning wraps it.
        has_hooks: whether to step by Lightning, which calls what callbacks have to do then.

    Raises:
        InputError: it cannot, such as one for graphics cards alone.
    """
    try:
        if has_hooks:
            optimizer.step()
        else:
            optimizer.optimizer.step(_nothing)
            count_steps(optimizer, 1)
    except Exception as error:  # whatever an optimiser of the user's may raise
        if not isinstance(error, InputError | torch.OutOfMemoryError) and _is_of(optimizer.optimizer, error):
            name = type(optimizer.optimizer).__name__
            raise InputError(f"model.optimizer: {name} cannot step: {first_line(error)}") from error
        raise


def _nothing() -> None:
    """The closure that Lightning gives to optimisers too."""


def _is_of(optimizer: torch.optim.Optimizer, error: Exception) -> bool:
    """Whether an error is of an optimiser's own, and of no hook that Lightning calls within its step."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    own = [number for number, frame in enumerate(frames) if frame.f_locals.get("self") is optimizer]
    return bool(own) and not any("lightning" in frame.f_globals.get("__name__", "") for frame in frames[own[-1] :])
