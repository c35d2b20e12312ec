"""Hyperparameters: what a checkpoint keeps of the configuration, and what TensorBoard shows of it."""

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def save_given(module: LightningModule) -> None:
    """Keep the configuration that the command line gave, so that a checkpoint rebuilds its learner.

    What Python code passes instead are live objects, which a checkpoint must not hold: those are left out.
    """
    if _given_hyperparameters.get() is not None:
        module.save_hyperparameters(logger=False)


def log_given(module: LightningModule) -> None:
    """Log those of model and data apart: Lightning merges them, and fails where both have a ``seed``."""
    parts = {"model": module, "data": module.trainer.datamodule}
    given = {
        name: {key: value for key, value in part.hparams.items() if not key.startswith("_")}
        for name, part in parts.items()
        if part is not None and part.hparams
    }
    for logger in module.trainer.loggers if given else []:
        logger.log_hyperparams(given)
