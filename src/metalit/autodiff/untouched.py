"""Putting back what the evaluation with other parameters leaves in a module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def untouched(module: object) -> Iterator[None]:
    """Leave the recurrent layers of ``module`` as they were; ``torch.func.functional_call`` leaves all others so.

    They keep a list of their weights for cuDNN, in which the last evaluated ones would stay until the next forward.
    """
    layers = (
        [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)] if isinstance(module, nn.Module) else []
    )
    held = [(layer._flat_weights, layer._flat_weight_refs) for layer in layers]
    try:
        yield
    finally:
        for layer, (weights, references) in zip(layers, held, strict=True):
            layer._flat_weights, layer._flat_weight_refs = weights, references
