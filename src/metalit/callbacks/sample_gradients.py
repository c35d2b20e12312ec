"""Per-sample gradient norms, which tell wrong labels from right ones."""

from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from metalit.callbacks.drawing import Sketching
from metalit.errors import InputError


@runtime_checkable
class _HasRows(Protocol):
    """A learner that fits rows."""

    outer_step: int

    def sample_gradient_norms(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The norm of the gradient of each training row, and which rows are corrupted."""

    def write_scalars(self, scalars: dict[str, Any]) -> None:
        """Send scalars to the loggers."""


class SampleGradientNorms(Callback):
    """Logs the norm of each training row's own loss gradient at every validation, as a histogram in TensorBoard.

    A row that the learner contradicts has a large gradient. Where it is known which labels were corrupted, corrupted
    and clean rows get a histogram each, and ``sample_gradients/auroc`` says how well the norm tells them apart: the
    chance that a corrupted row's is larger than a clean one's.

    Raises:
        InputError: the learner has no rows.
    """

    def __init__(self) -> None:
        self._sketching = Sketching("histograms of per-sample gradients")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other learners."""
        if not isinstance(pl_module, _HasRows):
            raise InputError(f"SampleGradientNorms: {type(pl_module).__name__} has no rows; leave the callback out")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the gradient of each row; in the sanity check too, so that a failure comes early."""
        if trainer.state.fn != "fit":
            return
        learner, loader = cast(_HasRows, pl_module), trainer.val_dataloaders
        norms, corrupted = learner.sample_gradient_norms(next(iter(loader or ())))
        if trainer.sanity_checking:
            return
        groups = {"all": norms}
        if bool(corrupted.any()):
            groups = {"clean": norms[~corrupted], "corrupted": norms[corrupted]}
            # scaled to at most 1: torchmetrics would put larger values through a sigmoid, which makes ties
            shares = norms / norms.max().clamp(min=torch.finfo(norms.dtype).tiny)
            learner.write_scalars({"sample_gradients/auroc": binary_auroc(shares, corrupted.long())})
        with self._sketching():
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    for name, values in groups.items():
                        logger.experiment.add_histogram(f"sample_gradients/{name}", values, learner.outer_step)
