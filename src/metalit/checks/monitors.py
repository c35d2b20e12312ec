"""Metrics that callbacks and schedulers wait for: whether there are such, and which of their values is best."""

import re
from collections.abc import Iterator
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from metalit.errors import InputError

Mode = Literal["min", "max"]
_BEST_IF_LARGE = {
    *("acc", "accuracy", "ap", "auc", "auprc", "auroc", "bleu", "dice", "elbo", "f1", "iou", "jaccard", "kappa", "map"),
    *("mcc", "miou", "precision", "psnr", "r2", "recall", "rouge", "sensitivity", "specificity", "ssim"),
}
_BEST_IF_SMALL = {
    *("brier", "cer", "crps", "deviation", "ece", "err", "error", "errors", "excess", "fid", "loss", "mae", "mape"),
    *("mse", "nll", "nrmse", "perplexity", "regret", "residual", "rmse", "wer"),
}


def mode_of(monitor: str, mode: Mode | None, owner: str) -> Mode:
    """Whether the lowest or the highest value of a metric is its best one, by its name unless it is given.

    >>> mode_of("val/loss_step_1", None, "best_checkpoint"), mode_of("val/accuracy", None, "best_checkpoint")
    ('min', 'max')

    Raises:
        InputError: the name does not tell.
    """
    if mode in ("min", "max"):
        return mode
    if mode is not None:
        raise InputError(f"{owner}.mode={mode!r} must be 'min' or 'max'")
    words = {*re.findall("[a-z0-9]+", monitor.lower())}
    large, small = bool(words & _BEST_IF_LARGE), bool(words & _BEST_IF_SMALL)
    if large == small:
        raise InputError(
            f"{owner}.monitor={monitor!r}: the name does not tell which value is best; set {owner}.mode: max, or min"
        )
    return "max" if large else "min"


def check_monitors(module: LightningModule, metrics: dict[str, float]) -> None:
    """Check, when the first metrics come, that those which are waited for are among them.

    In the sanity check before training those of validation are; those of training may not be there yet.

    Raises:
        InputError: one is not, and so would never come.
    """
    trainer = module.trainer
    # one of the user's own may log more after ours
    if trainer.state.fn != "fit" or not type(module).on_validation_epoch_end.__module__.startswith("metalit."):
        return
    known = {*metrics, *trainer.callback_metrics, "epoch", "step"}
    for owner, monitor in _monitors(module):
        if monitor not in known and (monitor.startswith("val") or not trainer.sanity_checking):
            there = ", ".join(sorted(known - {"epoch", "step"}))
            raise InputError(f"{owner}.monitor={monitor!r}: there is no such metric; there are {there}")


def _monitors(module: LightningModule) -> Iterator[tuple[str, str]]:
    for callback in module.trainer.callbacks:
        waits = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        if waits and callback.monitor is not None:
            yield type(callback).__name__, callback.monitor
    scheduler = module.lr_schedulers()
    if isinstance(scheduler, ReduceLROnPlateau):
        yield "model.scheduler", scheduler.monitor
