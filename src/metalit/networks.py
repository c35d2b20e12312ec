"""Small networks that configs name; any other ``torch.nn.Module`` serves as well."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metalit.errors import InputError

_BLOCKS = 4


class MLP(nn.Sequential):
    """A multi-layer perceptron with layers named ``hidden1``, ``hidden2``, …, ``out``.

    Args:
        sizes: widths from the input to the output, at least two: ``[1, 40, 40, 1]`` is the network of Finn et al. 2017.
            In a configuration, the first and the last may be ``auto``: as many as the data has inputs and outputs, or
            its tasks have classes. Images are flattened to as many inputs as they have pixels and channels.
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
        inputs, widths[0] = widths[0], widths[0] + context
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
        self.inputs = inputs
        self.context = nn.Parameter(torch.zeros(context)) if context else None

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate, with the context beside ``x``; images ``[rows, channels, height, width]`` are flattened."""
        if x.dim() == 4 and x.shape[-1] != self.inputs:
            x = x.flatten(1)
        if self.context is not None:
            x = torch.cat([x, self.context.expand(*x.shape[:-1], -1)], -1)
        return super().forward(x)


class Conv4(nn.Sequential):
    """Four blocks of a 3×3 convolution, a norm, ReLU and a 2×2 max pool (Vinyals et al. 2016), and perhaps a head.

    Layers ``conv1``, ``norm1``, ``relu1``, ``pool1``, …, ``flatten`` and, with ``ways``, ``out``. A pool halves height
    and width, rounding down, so 4 of them need images of 16×16 at least: 28×28 ends in 1×1, 84×84 in 5×5. Smaller
    images need fewer ``pools``: 8×8 takes 3, or 2 to end in 2×2.

    Args:
        channels: of the images. In a configuration ``auto``, as the data has them; ``size`` and ``ways`` likewise.
        size: ``[height, width]`` of the images, or one number for both.
        width: the filters of each convolution.
        ways: the outputs of the linear head ``out``, one for each class. Without one, the flattened features are what
            it returns, ``[rows, features]``, as ``Prototypes``, ``Matching``, ``ProtoMAML`` and ``RidgeHead`` take.
        norm: ``BatchNorm2d`` with the statistics of the set before it, ``GroupNorm`` in groups of 8 filters (one group
            where these do not divide the width), or none.
        pools: how many blocks, from the first, have a pool.

    Raises:
        InputError: numbers that are not positive, ``pools`` beyond 4 or more than the size allows, another ``norm``.

    >>> Conv4(channels=1, size=28, ways=5)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        channels: int | Literal["auto"],
        size: int | Sequence[int] | Literal["auto"],
        width: int = 64,
        ways: int | Literal["auto"] | None = None,
        norm: Literal["BatchNorm2d", "GroupNorm"] | None = "BatchNorm2d",
        pools: int = 4,
    ) -> None:
        sides = [_number("size", side) for side in (size if isinstance(size, Sequence) and size != "auto" else [size])]
        if len(sides) > 2:
            raise InputError(f"Conv4: size={sides} must be one number, or [height, width]")
        channels, width = _number("channels", channels), _number("width", width)
        if norm not in (None, "BatchNorm2d", "GroupNorm"):
            raise InputError(f"Conv4: norm={norm!r} must be 'BatchNorm2d' or 'GroupNorm'; leave it out for none")
        if not 0 <= pools <= _BLOCKS:
            raise InputError(f"Conv4: pools={pools} must be from 0 to {_BLOCKS}: a block has one at most")
        height, length = (side // 2**pools for side in (sides[0], sides[-1]))
        if min(height, length) < 1:
            raise InputError(
                f"Conv4: size={size} is too small for pools={pools}, which need {2**pools}×{2**pools} pixels at "
                f"least; give pools={int(math.log2(min(sides)))} or fewer"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, _BLOCKS + 1):
            # BatchNorm takes a bias away again: its gradient would be rounding, which Adam makes steps of
            bias = norm != "BatchNorm2d"
            layers[f"conv{block}"] = nn.Conv2d(channels if block == 1 else width, width, 3, padding=1, bias=bias)
            if norm == "BatchNorm2d":
                layers[f"norm{block}"] = nn.BatchNorm2d(width, track_running_stats=False)
            elif norm == "GroupNorm":
                layers[f"norm{block}"] = nn.GroupNorm(1 if width % 8 else width // 8, width)
            layers[f"relu{block}"] = nn.ReLU()
            if block <= pools:
                layers[f"pool{block}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        if ways is not None:
            layers["out"] = nn.Linear(width * height * length, _number("ways", ways))
        super().__init__(layers)


def _number(name: str, value: object) -> int:
    if value == "auto":
        raise InputError(
            f"Conv4: {name}='auto' is for a configuration, where the command line knows the data; give a number"
        )
    if not isinstance(value, int) or value < 1:
        raise InputError(f"Conv4: {name}={value!r} must be a whole number, at least 1")
    return value
