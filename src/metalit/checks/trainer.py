"""What of the Trainer's options and of Lightning's callbacks works here; what does not is refused before training."""

from collections.abc import Iterator
from typing import Any

from lightning.fabric.plugins.precision.bitsandbytes import BitsandbytesPrecision
from lightning.fabric.plugins.precision.transformer_engine import TransformerEnginePrecision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)

from metalit.checks.epochs import check_endless, is_endless
from metalit.data.stream import fused_steps
from metalit.errors import InputError
from metalit.notices import warn
from metalit.private_lightning import (
    average_start,
    every_n_train_steps,
    synchronises_batch_norm,
    train_time_interval,
    validation_interval_by_clock,
)
from metalit.training.hooks import overrides

_CHUNKS = "model.tasks_per_chunk (SupervisedLearner: model.rows_per_chunk) saves memory and changes no result"
_REFUSED = {
    GradientAccumulationScheduler: f"an outer step takes all its tasks at once; {_CHUNKS}",
    BatchSizeFinder: f"how many tasks or rows an outer step takes is part of what is learned; {_CHUNKS}",
    LearningRateFinder: "it needs Lightning's automatic optimisation; try rates in short runs, by model.optimizer",
    ModelPruning: "it replaces the parameters that are being learned; prune the network when it is trained",
    SpikeDetection: "it reads a loss for each batch, and outer steps log theirs only when it is due; see train/loss",
}
_COUNTS_CALLS = {
    WeightAveraging: "would average after each of these calls alone",
    LearningRateMonitor: "would log over these calls; train/lr is logged without it",
    ThroughputMonitor: "would count these calls",
    DeviceStatsMonitor: "would log over these calls",
}
# gradients are not found by Lightning's backward, and are overwritten, never zeroed
_NEVER = ("on_before_backward", "on_after_backward", "on_before_zero_grad")
_NEVER_OF_MODULE = (*_NEVER, "backward", "configure_gradient_clipping", "lr_scheduler_step", "optimizer_zero_grad")


def check_trainer(module: LightningModule) -> None:
    """Check what a learner's Trainer was told; before anything is set up, so that nothing is left behind.

    Raises:
        InputError: an option or a callback that would do nothing, or something else than it says.
    """
    trainer = module.trainer
    _check_precision(trainer)
    if trainer.state.fn != "fit":
        return
    _check_options(trainer)
    _check_hooks(trainer, module)
    if is_endless(trainer):
        check_endless(trainer)
    for callback in trainer.callbacks:
        _check_callback(callback)
        _check_waits(callback, trainer)
        _check_average(callback, module)
        if (fused := fused_steps(trainer)) > 1:
            _check_counter(callback, fused)


def _check_precision(trainer: Trainer) -> None:
    if isinstance(trainer.precision_plugin, TransformerEnginePrecision | BitsandbytesPrecision):
        raise InputError(
            f"trainer.precision={trainer.precision!r} replaces layers by ones without second derivatives; use "
            "bf16-mixed, 16-mixed, bf16-true, 32-true or 64-true"
        )


def _check_options(trainer: Trainer) -> None:
    if trainer.precision == "16-true":
        raise InputError(
            "trainer.precision='16-true' keeps weights and optimiser in half precision, where small steps and "
            "Adam's ε are 0; use 16-mixed, bf16-mixed or bf16-true"
        )
    if validation_interval_by_clock(trainer) is not None:
        raise InputError(
            "trainer.val_check_interval: a validation by the clock comes at another step in every run, so give a "
            "number of steps, or a share of trainer.max_steps"
        )
    if trainer.val_check_interval == 0:
        raise InputError("trainer.val_check_interval=0 must be a number of steps, or a share of trainer.max_steps")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise InputError(
            f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch} must be at least 1; "
            "trainer.limit_val_batches=0 validates nothing"
        )
    if trainer.log_every_n_steps < 0:
        raise InputError(
            f"trainer.log_every_n_steps={trainer.log_every_n_steps} must be a number of steps, or 0 to log none"
        )
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: gradients are accumulated within an "
            "outer step; set model.tasks_per_chunk (SupervisedLearner: model.rows_per_chunk)"
        )
    if trainer.gradient_clip_val or trainer.gradient_clip_algorithm is not None:
        name = "gradient_clip_val" if trainer.gradient_clip_val else "gradient_clip_algorithm"
        value = getattr(getattr(trainer, name), "value", trainer.gradient_clip_val)
        raise InputError(f"trainer.{name}={value}: outer gradients are clipped by model.clip_norm, to a norm")
    if trainer.limit_train_batches == 0:
        raise InputError("trainer.limit_train_batches=0 trains nothing; leave it out, or validate without a fit")
    if trainer.world_size > 1 and synchronises_batch_norm(trainer.strategy):
        raise InputError(
            "trainer.sync_batchnorm=True: BatchNorm sees the rows of one task, or of one process, alone; leave it out"
        )


# ---- callbacks


def _check_callback(callback: Callback) -> None:
    for kind, reason in _REFUSED.items():
        if isinstance(callback, kind):
            raise InputError(f"callbacks: {type(callback).__name__} cannot work here: {reason}")
    if isinstance(callback, ModelCheckpoint) and train_time_interval(callback) is not None:
        raise InputError(
            f"callbacks: {type(callback).__name__}.train_time_interval={train_time_interval(callback)} does not count "
            "under manual optimisation; use metalit.callbacks.LastCheckpoint(seconds=…)"
        )


def _check_waits(callback: Callback, trainer: Trainer) -> None:
    if not isinstance(callback, EarlyStopping):
        return
    if callback.monitor.startswith("val") and trainer.limit_val_batches == 0:
        raise InputError(
            f"callbacks: {type(callback).__name__} would never see monitor={callback.monitor!r}, as "
            "trainer.limit_val_batches=0 validates nothing; leave one of them out"
        )


def _check_average(callback: Callback, module: LightningModule) -> None:
    if not isinstance(callback, StochasticWeightAveraging):
        return
    name, way_out = f"callbacks: {type(callback).__name__}", "use WeightAveraging or EMAWeightAveraging"
    if callback.pl_module_contains_batch_norm(module):
        raise InputError(f"{name} passes once more over the data for BatchNorm, by Lightning's own steps; {way_out}")
    if module.trainer.fit_loop.max_epochs == -1 and isinstance(average_start(callback), float):
        share = average_start(callback)
        raise InputError(
            f"{name}.swa_epoch_start={share} is a share of trainer.max_epochs; give that, or an epoch, or {way_out}"
        )


def _check_counter(callback: Callback, steps: int) -> None:
    for kind, reason in _COUNTS_CALLS.items():
        if isinstance(callback, kind):
            raise InputError(
                f"callbacks: {type(callback).__name__} hears one call of the Trainer for model.fused_steps={steps} "
                f"outer steps, and {reason}; set model.fused_steps: 1"
            )


def check_counts(trainer: Trainer, fused: int) -> None:
    """Check what counts steps, where so many are taken on each call of the Trainer.

    Raises:
        InputError: a number of steps that is no multiple, or a limit of calls.
    """
    names = ("max_steps", "log_every_n_steps", "val_check_interval")
    numbers = [(f"trainer.{name}", getattr(trainer, name)) for name in names]
    numbers += [
        (f"{type(saver).__name__}.every_n_train_steps", every_n_train_steps(saver))
        for saver in trainer.checkpoint_callbacks
        if isinstance(saver, ModelCheckpoint)
    ]
    for name, number in numbers:
        if isinstance(number, int) and number > 0 and number % fused:
            raise InputError(
                f"{name}={number} must be a multiple of model.fused_steps={fused}: what happens between outer steps "
                "happens after that many; model.fused_steps: 1 leaves it free"
            )
    limit = trainer.limit_train_batches
    if limit > 0 and (isinstance(limit, int) or limit < 1):
        raise InputError(
            f"trainer.limit_train_batches={limit} (or overfit_batches) counts calls of model.fused_steps={fused} outer "
            "steps each; give the number of outer steps as trainer.max_steps, or set model.fused_steps to 1"
        )


def _check_hooks(trainer: Trainer, module: LightningModule) -> None:
    never: list[tuple[Any, type, str]]
    never = [(callback, Callback, name) for callback in trainer.callbacks for name in _NEVER]
    never += [(module, LightningModule, name) for name in _NEVER_OF_MODULE]
    for owner, base, name in never:
        if overrides(owner, base, name):
            raise InputError(
                f"{type(owner).__name__}.{name} would never be called: outer gradients are not found by Lightning's "
                "backward; use on_before_optimizer_step, where they are in .grad, or on_train_batch_end"
            )


def warn_of_rare_calls(module: LightningModule) -> None:
    """Say which hooks of the user's own are called less often than their names say."""
    trainer = module.trainer
    fused = fused_steps(trainer)
    endless = is_endless(trainer)
    for owner in (*trainer.callbacks, module):
        if fused > 1 and (name := next(_own(owner, "on_train_batch_start", "on_train_batch_end"), None)):
            warn(
                f"{type(owner).__name__}.{name} is called once for model.fused_steps={fused} outer steps; "
                "model.fused_steps: 1 calls it for each"
            )
        if endless and (name := next(_own(owner, "on_train_epoch_start", "on_train_epoch_end"), None)):
            warn(
                f"{type(owner).__name__}.{name} is called once in all: the training data has no end, and so no "
                "epochs; on_validation_end is called after each validation"
            )


def _own(owner: Callback | LightningModule, *names: str) -> Iterator[str]:
    base = Callback if isinstance(owner, Callback) else LightningModule
    for name in names:
        written_in = getattr(getattr(owner, name), "__module__", None) or ""
        if overrides(owner, base, name) and not written_in.startswith(("lightning.", "metalit.")):
            yield name
