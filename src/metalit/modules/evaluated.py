"""What all learners share in validation and test: one batch after the other, then metrics by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from metalit.checks.data import check_one_loader
from metalit.checks.monitors import check_monitors
from metalit.data.base import Split
from metalit.errors import InputError
from metalit.evaluation.handed_back import HandedBack
from metalit.evaluation.report import Report
from metalit.modules.hyperparameters import best_so_far


class EvaluatedLearner(LightningModule, ABC):
    """A learner that is judged: it collects in :meth:`evaluate`, and returns metrics in :meth:`evaluated`."""

    shown: ClassVar[Sequence[str]] = ("loss",)  # the metrics of a validation that the progress bar shows

    def __init__(self) -> None:
        super().__init__()
        self._handed_back = HandedBack()

    @property
    @abstractmethod
    def outer_step(self) -> int:
        """How many outer steps these parameters have been trained for."""

    @abstractmethod
    def start_evaluation(self) -> None:
        """Forget what was collected."""

    @abstractmethod
    def evaluate(self, batch: Any, batch_idx: int, split: Split) -> None:
        """Collect what is found on a batch."""

    @abstractmethod
    def evaluated(self, split: Split) -> dict[str, float]:
        """The metrics of all that was collected on all ranks, by name, without the name of the split."""

    def report(self, split: Split) -> Report | None:
        """What the last evaluation found, as a table; None where there is nothing to tell."""
        return None

    def final_report(self) -> Report | None:
        """What training left, as a table: called at its end, or after a validation of what it left."""
        return None

    def histograms(self) -> dict[str, Tensor]:
        """What each validation of a fit shows as histograms, by name."""
        return {}

    # ---- the Trainer's hooks

    def on_validation_start(self) -> None:
        """Check that what is validated comes from one loader.

        Raises:
            InputError: there are several.
        """
        check_one_loader(self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Check that what is tested comes from one loader.

        Raises:
            InputError: there are several.
        """
        check_one_loader(self.trainer.num_test_batches)

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        self.start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Start afresh."""
        self.start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect."""
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect."""
        self.evaluate(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log what was found, and let a scheduler know that waits for it."""
        metrics = self._finish("val", self.shown)
        if not self.trainer.sanity_checking:
            self.write_scalars(metrics, in_hparams=True)
            self.step_plateau(metrics)

    def on_test_epoch_end(self) -> None:
        """Log what was found."""
        self.write_scalars(self._finish("test"))

    def on_validation_end(self) -> None:
        """Hand the metrics back to who called ``trainer.validate``."""
        self._handed_back.give()

    def on_test_end(self) -> None:
        """Hand the metrics back to who called ``trainer.test``."""
        self._handed_back.give()

    def _finish(self, split: Split, shown: Sequence[str] = ()) -> dict[str, float]:
        """Log for callbacks, for the progress bar and for who called the Trainer.

        Raises:
            InputError: a callback or the scheduler waits for a metric that there is not.
        """
        metrics = {f"{split}/{name}": value for name, value in self.evaluated(split).items()}
        check_monitors(self, metrics)
        bar = {f"{split}/{name}" for name in shown}
        for name, value in metrics.items():
            # the loggers get theirs by write_scalars, over the outer step
            self.log(name, value, logger=False, prog_bar=name in bar, sync_dist=True, batch_size=1)
        self._handed_back.keep(self.trainer, metrics)
        return metrics

    # ---- helpers

    def val_batches(self) -> Iterator[Any]:
        """The batches of a validation, once more."""
        most, loader = self.trainer.num_val_batches[0], cast(Iterable[Any], self.trainer.val_dataloaders)
        return islice(loader, None if most == math.inf else int(most))

    def write_scalars(self, scalars: dict[str, Any], in_hparams: bool = False) -> None:
        """Send scalars to the loggers, on the one x-axis of all: the outer step.

        Args:
            scalars: values by name.
            in_hparams: show the best of what is validated in TensorBoard's HPARAMS tab too, beside what the run was.
        """
        values = {name: float(value) for name, value in scalars.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.outer_step)
            if in_hparams and isinstance(logger, TensorBoardLogger) and (best := best_so_far(self.trainer, values)):
                logger.log_hyperparams(dict(logger.hparams), best, step=self.outer_step)

    def step_plateau(self, metrics: dict[str, float]) -> None:
        """Step a scheduler that waits for a metric; called at the end of a validation, before its checkpoint is saved.

        Raises:
            InputError: there is no such metric.
        """
        scheduler = self.lr_schedulers() if self.trainer.state.fn == "fit" else None
        if isinstance(scheduler, ReduceLROnPlateau):
            there: dict[str, Any] = {**self.trainer.callback_metrics, **metrics}
            if scheduler.monitor not in there:
                raise InputError(f"model.scheduler.monitor={scheduler.monitor!r} is none of {sorted(there)}")
            scheduler.step(float(there[scheduler.monitor]))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Be in evaluation mode, and then have every module in the mode that it was in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
