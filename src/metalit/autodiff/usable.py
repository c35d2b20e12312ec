"""Which modules can be evaluated with other parameters than their own."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from metalit.errors import InputError


def check_network(owner: str, network: nn.Module) -> None:
    """Raise an :class:`InputError` for what is no module, or one whose parameters cannot be replaced."""
    if not isinstance(network, nn.Module):
        kind = "a class" if isinstance(network, type) else f"of type {type(network).__name__}"
        raise InputError(f"{owner}={network!r} is {kind}; it must be a torch.nn.Module, such as MLP([1, 40, 1])")
    for path, layer in network.named_modules():
        place = f"{owner}: layer {path!r} ({type(layer).__name__})" if path else f"{owner}: {type(layer).__name__}"
        if isinstance(layer, DataParallel | DistributedDataParallel):
            raise InputError(
                f"{place} shares rows among devices, and cannot be evaluated with other parameters; give what it "
                "wraps, its .module; trainer.devices shares the work"
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise InputError(
                f"{place} cannot be evaluated with other parameters; give the module that it was scripted or traced "
                "from; model.compile compiles the whole step"
            )
        for name, value in layer.named_parameters(recurse=False):
            if is_lazy(value) or value.is_meta:
                raise InputError(
                    f"{place} has no values for {name} yet; initialise it first, for a lazy layer by one call of the "
                    "network on a batch"
                )
