"""What is not finite: noticed on the device at every outer step, and read when a log or a save is due."""

from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from metalit.errors import NonFiniteError

_KEPT = 64  # so many steps' flags are kept at most, until it is seen whether one is raised


class FiniteWatch:
    """Remembers the first outer step whose loss or gradient was not finite, without waiting for the device.

    >>> watch = FiniteWatch(torch.device("cpu"))
    >>> for flag in (0.0, 0.5, 1.0):  # the mean over the ranks: any but 0 is raised
    ...     watch.add(torch.tensor([flag]))
    >>> watch.look(last_step=12)
    >>> watch.step
    11
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.tensor(-1, device=device)
        self._flags: list[Tensor] = []

    def add(self, flags: Tensor) -> None:
        """Take the flags of the next outer steps, ``[steps]``."""
        self._flags.append(flags)

    @property
    def is_full(self) -> bool:
        """Whether it is time to look."""
        return len(self._flags) >= _KEPT

    def look(self, last_step: int) -> None:
        """Go through the flags that were taken, of which the last one is that of ``last_step``."""
        flags, self._flags = torch.cat(self._flags) != 0, []
        first = last_step - len(flags) + 1
        steps = torch.arange(first, first + len(flags), device=flags.device)
        bad = torch.where(flags, steps, steps[-1] + 1).amin()
        self._first = torch.where((bad <= steps[-1]) & (self._first < 0), bad, self._first)

    @property
    def step(self) -> int:
        """The step, or -1; waits for the device."""
        return int(self._first)

    def raise_if_noticed(self, trainer: Trainer, way_out: str) -> None:
        """Stop the run where a step was noticed.

        Raises:
            NonFiniteError: with the step, the last good checkpoint and the way out.
        """
        if (step := self.step) >= 0:
            raise _stopped(step, trainer, way_out)

    def check(self, parameters: Iterable[Tensor], trainer: Trainer, way_out: str) -> None:
        """Stop likewise where a parameter is not finite after the trainer's last step; this reads them all."""
        self.raise_if_noticed(trainer, way_out)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise _stopped(trainer.global_step, trainer, way_out)


RATES = "Lower the inner or the outer learning rate, or set model.clip_norm, such as 10"


def _stopped(step: int, trainer: Trainer, way_out: str) -> NonFiniteError:
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    saved = [Path(path) for saver in savers if (path := saver.best_model_path)]
    good = max((path for path in saved if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    kept = f"The last good checkpoint is {good}" if good else "No checkpoint had been saved yet"
    return NonFiniteError(
        f"the outer loss or its gradient became NaN or infinite at outer step {step}. {kept}. {way_out}"
    )
