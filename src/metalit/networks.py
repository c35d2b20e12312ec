"""Small networks that configs name; any other ``torch.nn.Module`` serves as well."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metalit.errors import InputError


class MLP(nn.Sequential):
    """A multi-layer perceptron with layers named ``hidden1``, ``hidden2``, …, ``out``.

    Args:
        sizes: widths from the input to the output, at least two: ``[1, 40, 40, 1]`` is the network of Finn et al. 2017.
            In a configuration, the first and the last may be ``auto``: as many as the data has inputs and outputs.
        activation: the name of an activation module of ``torch.nn``, put after every hidden layer.
        dropout: the rate of dropout after every hidden layer.
        norm: the name of a normalisation module of ``torch.nn`` that is given a width, ``LayerNorm`` or
            ``BatchNorm1d``, put before every activation; layers ``norm1``, ``norm2``, …
        context: how many entries the parameter ``context`` has, that is joined to every input; it starts at 0.

    Raises:
        InputError: fewer than two sizes, an activation that ``torch.nn`` does not have, another ``norm``, a rate out
            of range, or a negative ``context``.

    >>> [name for name, _ in MLP([1, 40, 1]).named_parameters()]
    ['hidden1.weight', 'hidden1.bias', 'out.weight', 'out.bias']
    """

    def __init__(
        self,
        sizes: Sequence[int | Literal["auto"]],
        activation: str = "ReLU",
        dropout: float = 0.0,
        norm: Literal["LayerNorm", "BatchNorm1d"] | None = None,
        context: int = 0,
    ) -> None:
        widths = [size for size in sizes if size != "auto"]
        if len(widths) < len(sizes):
            raise InputError(
                f"MLP: sizes={list(sizes)}: 'auto' is for the first and the last size in a configuration, where the "
                "command line knows the data; give numbers"
            )
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"MLP: sizes={list(sizes)} must hold at least an input and an output width, all positive")
        make_activation = getattr(nn, activation, None)
        try:
            if not (isinstance(make_activation, type) and issubclass(make_activation, nn.Module)):
                raise TypeError(activation)
            make_activation()
        except TypeError:
            raise InputError(f"MLP: activation={activation!r} is no activation of torch.nn; try 'ReLU'") from None
        if not 0 <= dropout <= 1:
            raise InputError(f"MLP: dropout={dropout} must be a rate between 0 and 1")
        if norm not in (None, "LayerNorm", "BatchNorm1d"):
            raise InputError(f"MLP: norm={norm!r} must be 'LayerNorm' or 'BatchNorm1d'; leave it out for none")
        if context < 0:
            raise InputError(f"MLP: context={context} must be a number of entries, 0 or more")
        widths[0] += context
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, len(widths) - 1):
            layers[f"hidden{index}"] = nn.Linear(widths[index - 1], widths[index])
            if norm is not None:
                layers[f"norm{index}"] = getattr(nn, norm)(widths[index])
            layers[f"activation{index}"] = make_activation()
            if dropout:
                layers[f"dropout{index}"] = nn.Dropout(dropout)
        layers["out"] = nn.Linear(widths[-2], widths[-1])
        super().__init__(layers)
        self.context = nn.Parameter(torch.zeros(context)) if context else None

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate, with the context beside ``x``."""
        if self.context is not None:
            x = torch.cat([x, self.context.expand(*x.shape[:-1], -1)], -1)
        return super().forward(x)
