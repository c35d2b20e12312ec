"""Putting back what the evaluation with other parameters leaves in a module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def untouched(module: object) -> Iterator[None]:
    """Leave ``module`` as it was, where ``torch.func.functional_call`` alone does not.

    A layer that is registered under two names would keep the tensors that it was evaluated with. Recurrent layers keep
    a list of their weights for cuDNN, in which the last evaluated ones would stay until the next forward.
    """
    layers = list(module.modules()) if isinstance(module, nn.Module) else []
    held = [(layer, dict(layer._parameters), dict(layer._buffers)) for layer in layers]
    recurrent = [layer for layer in layers if isinstance(layer, nn.RNNBase)]
    lists = [(layer._flat_weights, layer._flat_weight_refs) for layer in recurrent]
    try:
        yield
    finally:
        for layer, parameters, buffers in held:
            layer._parameters.update(parameters)
            layer._buffers.update(buffers)
        for layer, (weights, references) in zip(recurrent, lists, strict=True):
            layer._flat_weights, layer._flat_weight_refs = weights, references
