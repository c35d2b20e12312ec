"""Small networks that configs name; any other ``torch.nn.Module`` serves as well."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from metalit.errors import InputError


class MLP(nn.Sequential):
    """A multi-layer perceptron with layers named ``hidden1``, ``hidden2``, …, ``out``.

    Args:
        sizes: widths from the input to the output, at least two: ``[1, 40, 40, 1]`` is the network of Finn et al. 2017.
            In a configuration, the first and the last may be ``auto``: as many as the data has inputs and outputs.
        activation: the name of an activation module of ``torch.nn``, put after every hidden layer.
        dropout: the rate of dropout after every hidden layer.

    Raises:
        InputError: fewer than two sizes, an activation that ``torch.nn`` does not have, or a rate out of range.

    >>> [name for name, _ in MLP([1, 40, 1]).named_parameters()]
    ['hidden1.weight', 'hidden1.bias', 'out.weight', 'out.bias']
    """

    def __init__(self, sizes: Sequence[int | Literal["auto"]], activation: str = "ReLU", dropout: float = 0.0) -> None:
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
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, len(widths) - 1):
            layers[f"hidden{index}"] = nn.Linear(widths[index - 1], widths[index])
            layers[f"activation{index}"] = make_activation()
            if dropout:
                layers[f"dropout{index}"] = nn.Dropout(dropout)
        layers["out"] = nn.Linear(widths[-2], widths[-1])
        super().__init__(layers)
