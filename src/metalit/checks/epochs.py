"""Epochs, which our own training data has not: what counts them would never happen, and is refused."""

import math
from collections.abc import Iterator

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

from metalit.errors import InputError
from metalit.private_lightning import checks_at_epoch_end, data_source, every_n_epochs, timer_interval


def is_endless(trainer: Trainer) -> bool:
    """Whether all training is one epoch, as far as it is known before the loader is made."""
    if trainer.fast_dev_run:
        return False
    source = data_source(trainer.fit_loop).instance
    if not isinstance(source, LightningModule | LightningDataModule):
        return source is not None and not isinstance(source, list | tuple | dict) and not hasattr(source, "__len__")
    if not type(source).train_dataloader.__module__.startswith("metalit."):
        return False
    # our own streams are as long as the run, unless they are cut
    limit = trainer.limit_train_batches
    steps = trainer.max_steps // getattr(trainer.lightning_module, "fused_steps", 1)
    return limit >= steps if isinstance(limit, int) else limit == 1.0


def check_endless(trainer: Trainer) -> None:
    """Check that nothing counts epochs, where there is one alone.

    Raises:
        InputError: something does, and so would never happen.
    """
    if trainer.min_steps and trainer.fit_loop.min_epochs == 1:
        trainer.fit_loop.min_epochs = 0  # Lightning asks for an epoch with any min_steps, and so would not stop early
    options = {
        "max_epochs": (trainer.fit_loop.max_epochs, -1, "give the number of outer steps, trainer.max_steps, alone"),
        "min_epochs": (trainer.fit_loop.min_epochs or 0, 0, "give trainer.min_steps"),
        "check_val_every_n_epoch": (trainer.check_val_every_n_epoch or 1, 1, "give steps, trainer.val_check_interval"),
    }
    if trainer.max_steps < 0:  # the only end there is
        options.pop("max_epochs")
    found = [(f"trainer.{name}={value}", way_out) for name, (value, none, way_out) in options.items() if value != none]
    for callback in trainer.callbacks:
        found += [
            (f"{type(callback).__name__}: {what}", way_out) for what, way_out in _counts_epochs(callback, trainer)
        ]
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > trainer.max_steps > 0 and trainer.limit_val_batches:
        raise InputError(
            f"trainer.val_check_interval={interval} is more than trainer.max_steps={trainer.max_steps}, so that "
            "nothing would be validated; give fewer steps, or trainer.limit_val_batches=0 to validate nothing"
        )
    for what, way_out in found:
        raise InputError(
            f"{what} counts epochs, and there is one alone, as the training data has no end; {way_out}"
            " (trainer.limit_train_batches cuts epochs of so many batches)"
        )


def _counts_epochs(callback: Callback, trainer: Trainer) -> Iterator[tuple[str, str]]:
    steps = "give a number of steps, or a share of them, as trainer.val_check_interval"
    if isinstance(callback, ModelCheckpoint) and every_n_epochs(callback) > 1:
        yield (
            f"every_n_epochs={every_n_epochs(callback)}",
            "leave it out to save at validations, or every_n_train_steps",
        )
    if isinstance(callback, EarlyStopping):
        at_end, whole = checks_at_epoch_end(callback), trainer.val_check_interval == 1.0
        if at_end is None and whole and trainer.check_val_every_n_epoch == 1:
            yield "with trainer.val_check_interval=1.0 it", steps
        elif at_end:
            yield "check_on_train_epoch_end=True", f"set it to False, and {steps}"
    if isinstance(callback, Timer) and timer_interval(callback) == "epoch":
        yield "interval='epoch'", "set interval: step"
    if isinstance(callback, LearningRateMonitor) and callback.logging_interval == "epoch":
        yield "logging_interval='epoch'", "set logging_interval: step"
    if isinstance(callback, EMAWeightAveraging) and callback.update_starting_at_epoch is not None:
        yield f"update_starting_at_epoch={callback.update_starting_at_epoch}", "give update_starting_at_step"
    if isinstance(callback, StochasticWeightAveraging):
        yield "it", "use WeightAveraging or EMAWeightAveraging"
    if isinstance(callback, BaseFinetuning):
        yield "it", "unfreeze at a step, in a callback's on_train_batch_start"


def check_epochs_of_loader(trainer: Trainer) -> None:
    """Check likewise when the loader is made, which alone knows whether it has an end.

    Raises:
        InputError: what :func:`check_endless` raises; a StochasticWeightAveraging whose last epoch never comes.
    """
    if trainer.num_training_batches == math.inf:
        check_endless(trainer)
        return
    epochs = trainer.fit_loop.max_epochs or -1
    needed = epochs * trainer.num_training_batches
    averages = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)
    if averages and 0 < trainer.max_steps < needed:
        raise InputError(
            f"trainer.max_steps={trainer.max_steps} ends before StochasticWeightAveraging does, after "
            f"trainer.max_epochs={epochs} of {trainer.num_training_batches} batches; give at least "
            f"trainer.max_steps={needed}"
        )
