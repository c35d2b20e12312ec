"""The scale of losses in 16-mixed precision: that of the gradient scaler in Lightning's plugin."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class LossScale:
    """What gradients are multiplied by where they are found; the plugin divides by it before the optimiser's step.

    (Micikevicius et al. 2018, section 3.2.) Outside of a fit, where nothing would notice that it is too large, it is
    the last one of training.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._found: float | None = None

    @staticmethod
    def scaler(trainer: Trainer | None) -> torch.amp.GradScaler | None:
        """The scaler of a trainer in 16-mixed precision; of another, none."""
        scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def value(self, trainer: Trainer | None, device: torch.device) -> Tensor | None:
        """The present scale, or none; always the same tensor, brought up to date."""
        scaler = self.scaler(trainer)
        if trainer is None or scaler is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            one = torch.ones((), device=device)
            if self._value is None or self._value.device != one.device:
                self._value = one.clone()
            found = self._found if trainer.state.fn != "fit" else None
            return self._value.copy_(scaler.scale(one) if found is None else one * found)

    def lower(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Make the scale smaller, as after a step that overflowed; the gradients of the optimiser must be infinite."""
        # not by scaler.step: an optimiser that unscales by itself would be called, and begin its state
        if (scaler := self.scaler(trainer)) is not None:
            scaler.unscale_(optimizer)
            scaler.update()

    def keep(self, trainer: Trainer) -> None:
        """Remember the scale that training ended with."""
        scaler = self.scaler(trainer)
        self._found = None if scaler is None else scaler.get_scale()

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Remember the scale that a checkpoint's training had found."""
        self._found = checkpoint.get("MixedPrecision", {}).get("scale")
