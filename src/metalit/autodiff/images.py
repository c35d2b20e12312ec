"""Layers of images by formulas that a compiler for CPUs makes fast programs of."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metalit.autodiff.convolution import Form, convolution
from metalit.autodiff.pooling import max_of_windows
from metalit.autodiff.standardised import standardised

_MOST = 9  # places of a window; a larger one would be long code


def sees_images(layers: Iterable[nn.Module]) -> bool:
    """Whether one of these layers is a convolution of images."""
    return any(isinstance(layer, nn.Conv2d) for layer in layers)


class ChannelsLast(TorchFunctionMode):
    """Evaluates convolutions, BatchNorm and max pools of images by formulas with channels last, to any derivative.

    What torch's compiler makes of its own formulas moves images from one layout to the other and back, gathers and
    scatters one value at a time, and is compiled for minutes. Images are ``[rows, channels, height, width]`` as ever;
    all else is left to torch: BatchNorm with running statistics, pools that overlap, paddings by name.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or the formula in its place."""
        formula = _FORMULAS.get(func)
        found = formula(*args, **(kwargs or {})) if formula is not None else None
        return func(*args, **(kwargs or {})) if found is None else found


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if input.dim() != 4 or isinstance(padding, str):
        return None
    form = Form(_pair(stride), _pair(padding), _pair(dilation), groups)
    found = convolution(input, weight, form)
    return found if bias is None else found + bias[:, None, None]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if input.dim() != 4 or not training or running_mean is not None or input.numel() == input.shape[1]:
        return None
    last = input.permute(0, 2, 3, 1)
    found = standardised(last.flatten(0, 2), eps)
    found = found if weight is None else found * weight
    found = found if bias is None else found + bias
    return found.unflatten(0, last.shape[:3]).permute(0, 3, 1, 2)


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    window = _pair(kernel_size)
    fits = input.dim() == 4 and all(size >= side for size, side in zip(input.shape[2:], window, strict=True))
    apart = (stride is None or _pair(stride) == window) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1)
    if not (fits and apart and window[0] * window[1] <= _MOST) or ceil_mode or return_indices:
        return None
    return max_of_windows(input, window)


_FORMULAS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv2d: _conv2d,
    functional.batch_norm: _batch_norm,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
}


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, list | tuple) else (value,)
    return first, rest[0] if rest else first
