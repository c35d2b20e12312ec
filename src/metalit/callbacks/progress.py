"""The progress bar."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

_SECONDS = 0.1  # a person sees no more; drawing at every step costs more than the step


class Progress(RichProgressBar):
    """Shows steps, rate, time left, the present errors and the best one so far."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1, leave=True, theme=RichProgressBarTheme(metrics_text_delimiter="  "))
        self._drawn_at = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when it is time, and at the end."""
        now = time.monotonic()
        if now - self._drawn_at >= _SECONDS or trainer.global_step >= trainer.max_steps:
            self._drawn_at = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    @property
    def total_train_batches(self) -> int | float:
        """Outer steps, of which one call of the Trainer may take several."""
        steps = self.trainer.max_steps
        return steps if steps > 0 else super().total_train_batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The errors, without the number of the version, which is no error."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        scores = [getattr(callback, "best_model_score", None) for callback in trainer.checkpoint_callbacks]
        best = next((score for score in scores if score is not None), None)
        if best is not None:
            metrics["best"] = float(best)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # there is one endless epoch, and "Epoch 0/-2" tells nobody anything
