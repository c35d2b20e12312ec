"""Hooks of Lightning's that a callback, a learner or a plugin has of its own."""

from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy


def overrides(owner: Any, base: type, name: str) -> bool:
    """Whether an object has a hook of its own; asked of the object, where LambdaCallback keeps its functions."""
    method = getattr(owner, name)
    return getattr(method, "__func__", method) is not getattr(base, name)


def has_step_hooks(module: LightningModule, base: type) -> bool:
    """Whether anything is called in the optimiser's step: to ask around costs Lightning more than a small step.

    Args:
        module: the learner.
        base: the class whose own hooks do nothing.
    """
    trainer = module.trainer
    hooks: list[tuple[Any, type, str]]
    hooks = [(callback, Callback, "on_before_optimizer_step") for callback in trainer.callbacks]
    hooks += [(module, base, "on_before_optimizer_step"), (module, base, "optimizer_step")]
    hooks += [(trainer.strategy, Strategy, "optimizer_step")]
    hooks += [(trainer.precision_plugin, Precision, "optimizer_step")]
    return any(overrides(*hook) for hook in hooks)
