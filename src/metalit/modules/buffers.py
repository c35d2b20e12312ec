"""Buffers that a forward pass may replace, and checkpoints of them."""

from typing import Any

import torch
from torch import Tensor, nn

from metalit.private_torch import buffers_of, parameters_of


def buffer_names(module: nn.Module) -> list[str]:
    """The names of the buffers that a state dictionary of ``module`` holds."""
    names = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return [name for name in module.state_dict() if name in names]


def adopt_buffers(module: nn.Module, state: dict[str, Any], names: list[str]) -> None:
    """Make room for buffers of a checkpoint that are new to ``module``, or of another shape than its own.

    Args:
        module: what the checkpoint is to be loaded into.
        state: the checkpoint's state dictionary.
        names: those of its entries that are buffers.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer, value = layers.get(path), state.get(name)
        if layer is None or not isinstance(value, Tensor) or leaf in parameters_of(layer):
            continue
        own = buffers_of(layer).get(leaf)
        if own is None or own.shape != value.shape:
            device = next((part.device for part in module.parameters()), value.device)
            if leaf in buffers_of(layer) or not hasattr(layer, leaf):
                layer.register_buffer(leaf, torch.empty_like(value, device=device))
