"""Errors that the command line tells in one line, without a traceback."""

import math
from pathlib import Path

_HEAD, _TAIL = 320, 140  # letters that are kept of a message, so that a line of the command line has 500 at most


class InputError(ValueError):
    """Something that the user gave cannot be used; the message names the argument, its value and the way out.

    It is one line; of one that is very long, as where it quotes a long value, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} … {line[-_TAIL:]}")


class NonFiniteError(RuntimeError):
    """Training stopped because the outer loss or its gradient became NaN or infinite."""


class StoppedError(RuntimeError):
    """A signal stopped training, at the end of a step.

    Attributes:
        step: the outer steps that are taken and saved.
        checkpoint: where; None if no step was taken.
        requeue: whether the job is to be put back into the queue.
    """

    def __init__(self, step: int, checkpoint: Path | None, requeue: bool) -> None:
        where = f"after outer step {step}, saved in {checkpoint}" if checkpoint else "before the first outer step"
        super().__init__(f"stopped by a signal {where}")
        self.step = step
        self.checkpoint = checkpoint
        self.requeue = requeue


def check_not_negative(owner: str, name: str, value: float) -> None:
    """Raise an :class:`InputError` unless a number is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{owner}: {name}={value} must be a finite number, 0 or more")
