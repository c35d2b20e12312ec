"""All names that Lightning calls private, one small function each; ``tests/private/`` holds what they mean.

Overridden where they belong, and held by the same tests: ``ModelCheckpoint._save_checkpoint``
(:mod:`metalit.callbacks.checkpoints`), ``RichProgressBar._get_train_description`` (:mod:`metalit.callbacks.progress`),
``LightningCLI._parse_ckpt_path`` (:mod:`metalit.cli.command_line`).
"""

import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters, _given_hyperparameters_context
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.core.saving import _default_map_location as default_map_location
from lightning.pytorch.core.saving import _load_state as load_state
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod as restricted_classmethod

if TYPE_CHECKING:  # it is slow to import
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

__all__ = [
    "default_map_location",  # where a checkpoint's tensors go if nothing else is asked for
    "load_state",  # builds an object, and gives it weights and hooks of a checkpoint as Lightning does
    "restricted_classmethod",  # says that a class is to be asked, not an object
]

# keys that the command line adds to what a checkpoint keeps of the configuration
CLASS_PATH = "_class_path"
INSTANTIATOR = "_instantiator"


# ---- trainer


def trainer_of(module: LightningModule) -> Trainer | None:
    """The module's trainer, None if it has none, where ``module.trainer`` raises."""
    return module._trainer


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """What starts the processes; a strategy of one device does not hand it out."""
    return trainer._accelerator_connector.cluster_environment


def started_processes(strategy: Strategy) -> list[subprocess.Popen[bytes]]:
    """The processes of other ranks that Lightning has started with this command."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def data_source(loop: Any) -> Any:
    """Where a loop's batches come from (``instance``, ``name``, ``is_defined()``), before any loader is made."""
    return loop._data_source


def validation_interval_by_clock(trainer: Trainer) -> float | None:
    """The seconds between two validations, where ``val_check_interval`` is a time."""
    return vars(trainer)["_val_check_time_interval"]


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows this batch, as Lightning decides it: by epochs, steps, shares, and what there is."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def add_batches_that_stepped(trainer: Trainer, count: int) -> None:
    """Count further outer steps of a batch, by which Lightning draws what callbacks log."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += count


def returned_metrics(loop: Any) -> list[dict[str, float]]:
    """The dictionaries, one for each loader, that ``trainer.validate`` and ``trainer.test`` are about to return."""
    return loop._logged_outputs


def before_step(optimizer: LightningOptimizer) -> None:
    """Tell the loop that an optimiser is about to step: the first half of ``LightningOptimizer.step``."""
    optimizer._on_before_step()


def after_step(optimizer: LightningOptimizer) -> None:
    """Tell the loop that an optimiser has stepped, which makes one ``global_step``: the second half."""
    optimizer._on_after_step()


def synchronises_batch_norm(strategy: Strategy) -> bool:
    """Whether ``Trainer(sync_batchnorm=True)`` was asked for."""
    return getattr(strategy, "_layer_sync", None) is not None


def process_group_timeout(strategy: Strategy) -> timedelta | None:
    """How long ranks wait for each other, if there are several."""
    return getattr(strategy, "_timeout", None)


def rank_of_process() -> int | None:
    """The number of this process among those of a run, from the environment alone."""
    return _get_rank()


# ---- callbacks: what they were made with


def every_n_epochs(saver: ModelCheckpoint) -> int:
    """Its argument ``every_n_epochs``, or what it stands for."""
    return saver._every_n_epochs


def every_n_train_steps(saver: ModelCheckpoint) -> int:
    """Its argument ``every_n_train_steps``, or what it stands for."""
    return saver._every_n_train_steps


def train_time_interval(saver: ModelCheckpoint) -> timedelta | None:
    """Its argument ``train_time_interval``."""
    return saver._train_time_interval


def checks_at_epoch_end(callback: EarlyStopping) -> bool | None:
    """Its argument ``check_on_train_epoch_end``."""
    return callback._check_on_train_epoch_end


def timer_interval(callback: Timer) -> str:
    """Its argument ``interval``, as a string."""
    return callback._interval


def average_start(callback: StochasticWeightAveraging) -> int | float:
    """Its argument ``swa_epoch_start``: an epoch, or a share of them."""
    return callback._swa_epoch_start


def save_unless_saved(saver: ModelCheckpoint, trainer: Trainer) -> None:
    """Save now, where a ModelCheckpoint without a metric has not saved this step; it has no public way to."""
    if not saver._should_skip_saving_checkpoint(trainer):
        saver._save_none_monitor_checkpoint(trainer, saver._monitor_candidates(trainer))


def forget_saved_step(saver: ModelCheckpoint) -> None:
    """Let a ModelCheckpoint save again after the same step."""
    saver._last_global_step_saved = 0


# ---- configuration


def has_given_hyperparameters() -> bool:
    """Whether an object is being built by the command line, or by ``load_from_checkpoint``, from a configuration."""
    return _given_hyperparameters.get() is not None


def given_hyperparameters(values: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Let what is built within keep these as its configuration, as under the command line."""
    return _given_hyperparameters_context(dict(values), "lightning.pytorch.cli.instantiate_module")


def fill_config_dump(cli: "LightningCLI") -> None:
    """Write the configuration as plain values to ``cli.config_dump``; Lightning does so later by itself."""
    cli._dump_config()


def parser_of(cli: "LightningCLI", subcommand: str) -> "LightningArgumentParser":
    """The parser of a subcommand, which knows the callbacks that it is to build."""
    return cli._parser(subcommand)


def subcommand_parsers(cli: "LightningCLI") -> "dict[str, LightningArgumentParser]":
    """All of them by name; empty until they are made."""
    return cli._subcommand_parsers
