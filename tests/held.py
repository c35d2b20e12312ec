"""What a module holds, to see that an evaluation leaves it as it was."""

import torch
from torch import nn


def everything_of(module):
    """The identities and values of all that a module holds."""
    held = {}
    for path, layer in module.named_modules():
        held[path, "training"] = layer.training
        for table in (layer._parameters, layer._buffers):
            held |= {
                (path, name): (id(value), value.detach().clone()) for name, value in table.items() if value is not None
            }
        if isinstance(layer, nn.RNNBase):
            held[path, "flat"] = [id(weight) for weight in layer._flat_weights]
    return held


def same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert value[0] == after[name][0], name
            assert torch.equal(value[1], after[name][1]), name
        else:
            assert value == after[name], name
