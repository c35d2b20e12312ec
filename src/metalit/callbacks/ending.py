"""Why training ended; and a run that has ended does not start again by itself."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


class Ending(Callback):
    """Knows what ended training, for the line that says so.

    By itself, Lightning would train on from a checkpoint of a run that EarlyStopping ended, until the next validation
    and with the patience of the checkpoint. Here such a run stays ended, unless the configured patience lets it go on.
    """

    def __init__(self) -> None:
        self._patience: dict[EarlyStopping, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep what is configured, before a checkpoint is loaded."""
        self._patience = {callback: callback.patience for callback in _all(trainer, EarlyStopping)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where a checkpoint was loaded that was stopped."""
        for callback, patience in self._patience.items():
            callback.patience = patience
            if _still_stops(callback):
                trainer.should_stop = True
            else:
                callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED
                callback.stopping_reason_message = None

    def reason(self, trainer: Trainer) -> tuple[str, str]:
        """What ended training, and what would let it go on."""
        if 0 < trainer.max_steps <= trainer.global_step:
            return f"trainer.max_steps is {trainer.max_steps}", "give more steps"
        for timer in _all(trainer, Timer):
            if (left := timer.time_remaining()) is not None and left <= 0:
                used = timedelta(seconds=round(timer.time_elapsed()))
                given = timedelta(seconds=round(timer.time_elapsed() + left))
                return (
                    f"the {given} of trainer.max_time are used up ({used} in all, with earlier parts of the run)",
                    "give more time",
                )
        for callback in _all(trainer, EarlyStopping):
            if callback.stopping_reason_message:
                told = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.").rstrip(".")
                return f"EarlyStopping ended it: {told}", "raise its patience or change its threshold, or leave it out"
        if 0 < (trainer.max_epochs or 0) <= trainer.fit_loop.epoch_progress.current.processed:  # type: ignore[attr-defined]
            return f"trainer.max_epochs is {trainer.max_epochs}", "give more epochs"
        return "a callback ended it (trainer.should_stop)", "leave that callback out"


def _all(trainer: Trainer, kind: type) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def _still_stops(callback: EarlyStopping) -> bool:
    told = callback.stopping_reason_message or ""
    match callback.stopping_reason:
        case EarlyStoppingReason.PATIENCE_EXHAUSTED:
            return callback.wait_count >= callback.patience
        case EarlyStoppingReason.STOPPING_THRESHOLD:
            return f" {callback.stopping_threshold}. " in told
        case EarlyStoppingReason.DIVERGENCE_THRESHOLD:
            return f" {callback.divergence_threshold}. " in told
        case EarlyStoppingReason.NON_FINITE_METRIC:
            return callback.check_finite
    return False
