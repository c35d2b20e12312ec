"""The Trainer's counters, where several outer steps are taken on each of its calls."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from metalit.errors import InputError
from metalit.private_lightning import add_batches_that_stepped, after_step, before_step


class FusedCounters(Callback):
    """Lets the Trainer, which counts its calls, count outer steps.

    Args:
        steps: the outer steps of each call.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._asked_interval: int | float = 1.0

    @classmethod
    def attach(cls, trainer: Trainer, steps: int) -> None:
        """Put counters into a trainer, in the place of those of an earlier learner; called while it is set up."""
        counters = cls(steps)
        others = [callback for callback in trainer.callbacks if not isinstance(callback, cls)]
        trainer.callbacks = [counters, *others]  # first: savers must stay last
        counters._asked_interval = trainer.val_check_interval
        if trainer.state.fn == "fit" and steps > 1 and isinstance(trainer.val_check_interval, int):
            # the loop reads it between this and on_train_start
            trainer.val_check_interval //= steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the interval back, which is the user's to read."""
        trainer.val_check_interval = self._asked_interval

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Count the further steps of the call, by which Lightning draws what callbacks log."""
        add_batches_that_stepped(trainer, self.steps - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the number: other counts in the checkpoint are of calls."""
        checkpoint["fused_steps"] = self.steps

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that training goes on as it began.

        Raises:
            InputError: with another number of steps in each call.
        """
        began = checkpoint.get("fused_steps", 1)
        if trainer.state.fn == "fit" and began != self.steps:
            raise InputError(
                f"model.fused_steps={self.steps}: the checkpoint is of a run with {began}, and what the Trainer counts "
                f"are calls of so many steps; go on with model.fused_steps: {began}, or load the weights into a new run"
            )


def count_steps(optimizer: Any, steps: int) -> None:
    """Count steps of a LightningOptimizer that Lightning did not see: ``global_step`` is the number of outer steps."""
    for _ in range(steps):
        before_step(optimizer)
        after_step(optimizer)
