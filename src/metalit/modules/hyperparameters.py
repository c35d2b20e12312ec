"""Hyperparameters: what TensorBoard and other loggers show of a configuration, and of the best score."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from metalit.inner import Learned
from metalit.inner.none import NoSteps
from metalit.training.optimizers import optimizer_of

Shown = dict[str, str | float]


def log_given(module: LightningModule) -> None:
    """Log what matters to TensorBoard, and to other loggers all that the command line gave, of model and data apart.

    Lightning merges both, and fails where both have a ``seed``.
    """
    parts = {"model": module, "data": module.trainer.datamodule}
    given = {
        name: {key: value for key, value in part.hparams.items() if not key.startswith("_")}
        for name, part in parts.items()
        if part is not None and part.hparams
    }
    for logger in module.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(what_matters(module))
        elif given:
            logger.log_hyperparams(given)


def what_matters(module: LightningModule) -> Shown:
    """The hyperparameters that people compare runs by, under flat names.

    TensorBoard sorts them by name and shows the first five: inner step size and steps, outer step size, network,
    optimiser.
    """
    optimizer = optimizer_of(module)
    rates = {
        f"lr {group.get('name', '')}".strip(): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups
    }
    scheduler = module.lr_schedulers()
    parts = [getattr(module, name, None) for name in ("problem", "inner_optimizer", "hypergradient", "perturbation")]
    parts = [None if isinstance(part, NoSteps) else part for part in parts]
    network = getattr(module, "network", None) or getattr(parts[0], "network", None)
    hypergradient, data = parts[2], module.trainer.datamodule
    train = getattr(data, "episodes", {}).get("train")
    source = getattr(data, "tasks", None) or getattr(data, "rows", None) or data
    shown = {
        "inner lr": _start_of(getattr(parts[1], "lr", None)),
        "inner steps": getattr(hypergradient, "steps", None),
        **{name: float(rate) for name, rate in rates.items()},
        "network": None if network is None else described(network),
        "optimizer": type(optimizer).__name__,
        "outer steps": module.trainer.max_steps,
        "problem": ", ".join(type(part).__name__ for part in parts if part is not None) or None,
        "queries": getattr(train, "queries", None),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "seed": getattr(data, "seed", None),
        "shots": getattr(train, "shots", None),
        "source": None if source is None else type(source).__name__,
        "tasks": getattr(train, "tasks", None) or getattr(data, "number", None),
    }
    return {name: value for name, value in shown.items() if isinstance(value, str | int | float)}


def _start_of(number: Any) -> Any:
    """A number, or where one that is learned starts."""
    return number.start if isinstance(number, Learned) else number


def described(network: nn.Module) -> str:
    """Its class and its size.

    >>> described(nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 2)))
    'Sequential 1-40-2'
    >>> described(nn.Conv1d(2, 3, 5))
    'Conv1d, 33 parameters'
    """
    own = [part for part in network.modules() if next(part.parameters(recurse=False), None) is not None]
    if own and all(type(part) is nn.Linear for part in own):
        sizes = [own[0].in_features, *(part.out_features for part in own)]
        return f"{type(network).__name__} {'-'.join(map(str, sizes))}"
    return f"{type(network).__name__}, {sum(value.numel() for value in network.parameters())} parameters"


def best_so_far(trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
    """The best value of what checkpoints are chosen by, this validation included, as ``<metric>_best``."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor is not None and saver.monitor in values:
            before = [] if saver.best_model_score is None else [float(saver.best_model_score)]
            finite = [value for value in (*before, values[saver.monitor]) if math.isfinite(value)]
            best = min if saver.mode == "min" else max
            return {f"{saver.monitor}_best": best(finite)} if finite else {}
    return {}
