"""Checkpoints: the best learner by validation, and the last one, saved at validations and every minute."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from metalit.callbacks.atomic import AtomicCheckpointIO
from metalit.callbacks.learner import learner_of
from metalit.checkpoints import CheckedCheckpointIO
from metalit.checks.monitors import Mode, mode_of
from metalit.data.module import TaskDataModule
from metalit.errors import InputError
from metalit.private_lightning import forget_saved_step, save_unless_saved, validation_is_due

_LOSS, _ACCURACY = "val/loss", "val/accuracy"


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the learner with the best value of a validation metric.

    Of equal values the first one stays.

    Args:
        monitor: the metric; if neither it nor ``mode`` is given, ``val/accuracy`` where the data is of few-shot tasks
            of classes; else ``val/loss``.
        mode: whether its lowest or its highest value is the best one; if not given, its name tells: the lowest loss or
            error, the highest accuracy, R², F1 or AUROC.

    Raises:
        InputError: a metric whose name does not tell, without a ``mode``.
    """

    def __init__(self, monitor: str | None = None, mode: Mode | None = None) -> None:
        self._by_data = monitor is None and mode is None
        super().__init__(
            filename="best",
            monitor=monitor or _LOSS,
            mode=mode_of(monitor or _LOSS, mode, "best_checkpoint"),
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the metric by the data, where none was given."""
        data = trainer.datamodule
        if self._by_data and isinstance(data, TaskDataModule):
            monitor = _ACCURACY if data.tasks.of_classes else _LOSS
            if monitor != self.monitor:
                self.monitor, self.mode = monitor, mode_of(monitor, None, "best_checkpoint")
                self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Recall the best score, also where the folder of the run was moved in the meantime.

        ModelCheckpoint forgets it then, and would replace a better checkpoint by the next one.
        """
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.exists() and state_dict["best_model_score"] is not None:
            score = state_dict["best_model_score"]
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(here),
                "kth_best_model_path": str(here),
                "best_k_models": {str(here): score},
            }
        super().load_state_dict(state_dict)


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: the learner at the last validation, or later, by the clock of rank 0.

    It is saved when ``seconds`` have passed since the last save: after the next batch, of ``fused_steps`` outer steps,
    or after the validation that is due then. So it is at most ``seconds``, a batch and a validation old.

    With :class:`~metalit.callbacks.StopOnSignal` it also saves where the run is told to stop.

    Args:
        seconds: the time after which it is saved though no validation comes.

    Raises:
        InputError: negative seconds; when training starts: a :class:`BestCheckpoint` that comes after it, whose score
            would be missing in what is saved.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__(filename="last", enable_version_counter=False, save_on_train_epoch_end=False)
        if not seconds >= 0:
            raise InputError(f"last_checkpoint.seconds={seconds} must not be negative")
        self.seconds = seconds
        self._saved_at = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save whole files, which hold the best score."""
        if stage == "fit":
            savers = trainer.checkpoint_callbacks
            if any(isinstance(saver, BestCheckpoint) for saver in savers[savers.index(self) :]):
                raise InputError(
                    "callbacks: LastCheckpoint keeps the score of BestCheckpoint, and so must come after it: "
                    "[BestCheckpoint(), LastCheckpoint()]"
                )
            if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, CheckedCheckpointIO):
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            if not any(isinstance(callback, _SaveFirst) for callback in trainer.callbacks):
                trainer.callbacks = [_SaveFirst(self), *trainer.callbacks]
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._saved_at = time.monotonic()
        agreement = learner_of(pl_module, self).agreement
        agreement.request("save", lambda: trainer.is_global_zero and self._is_late())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; ModelCheckpoint's own interval does not work under manual optimisation.

        Where a validation is due, it waits for it: a resumed run needs its outcome.
        """
        agreement = learner_of(pl_module, self).agreement
        asked = any(agreement.any_rank(name) for name in ("save", "stop"))
        if asked and not validation_is_due(trainer):
            self.save_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, also over what was saved after the same step, before the validation."""
        if not trainer.sanity_checking:
            forget_saved_step(self)
        super().on_validation_end(trainer, pl_module)

    def save_now(self, trainer: Trainer) -> None:
        """Save, unless this step is saved already."""
        save_unless_saved(self, trainer)

    def _is_late(self) -> bool:
        return time.monotonic() - self._saved_at >= self.seconds

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()


class _SaveFirst(Callback):
    """At the end of training, saves what was trained after the last validation before other callbacks touch it.

    WeightAveraging puts averages in place of the weights then, from which a resumed run would go on.
    """

    def __init__(self, saver: LastCheckpoint) -> None:
        self._saver = saver

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._saver.save_now(trainer)
