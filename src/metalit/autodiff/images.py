"""Layers of images by formulas that a compiler for CPUs makes fast programs of."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metalit.autodiff.convolution import Form, convolution, few_in_a_window, matrix_of, windows_of
from metalit.autodiff.pooling import max_of_windows
from metalit.autodiff.standardised import standardised, standardised_product

_MOST = 9  # places of a window; a larger one would be long code


def sees_images(layers: Iterable[nn.Module]) -> bool:
    """Whether one of these layers is a convolution of images."""
    return any(isinstance(layer, nn.Conv2d) for layer in layers)


class ChannelsLast(TorchFunctionMode):
    """Evaluates convolutions, BatchNorm and max pools of images by formulas with channels last, to any derivative.

    What torch's compiler makes of its own formulas moves images from one layout to the other and back, gathers and
    scatters one value at a time, and is compiled for minutes. Images are ``[rows, channels, height, width]`` as ever;
    all else is left to torch: BatchNorm with running statistics, pools that overlap, paddings by name.

    Two layers one after the other may have a formula of fewer passes over memory: BatchNorm of a convolution that is a
    product is another product, and a pool of ReLU is ReLU of a pool, of fewer numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: _Layer | None = None  # None again as soon as anything else is called: it may write into it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or the formula in its place."""
        if func is Tensor.dim:  # which BatchNorm asks of what it is given
            return func(*args, **(kwargs or {}))
        last, self._last = self._last, None
        formula = _FORMULAS.get(func)
        if formula is not None:
            source = last.source if last is not None and args and args[0] is last.found else None
            self._last = formula(source, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if self._last is None else self._last.found


class _Product(NamedTuple):
    """The convolution whose product this is."""

    windows: Tensor
    matrix: Tensor


class _ReLU(NamedTuple):
    """What ReLU was taken of."""

    input: Tensor


class _Layer(NamedTuple):
    """What a layer has found, and of what, if the next one may care."""

    found: Tensor
    source: _Product | _ReLU | None = None


def _conv2d(
    source: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Layer | None:
    if input.dim() != 4 or isinstance(padding, str):
        return None
    form, product = Form(_pair(stride), _pair(padding), _pair(dilation), groups), None
    if few_in_a_window(weight, form):
        product = _Product(windows_of(input, weight, form), matrix_of(weight))
        found = _as_images(product.windows.flatten(1).T @ product.matrix, product.windows)
    else:
        found = convolution(input, weight, form)
    return _Layer(found if bias is None else found + bias[:, None, None], product)


def _batch_norm(
    source: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Layer | None:
    if input.dim() != 4 or not training or running_mean is not None or input.numel() == input.shape[1]:
        return None
    if isinstance(source, _Product):  # whose bias the norm takes away again
        found = standardised_product(source.windows.flatten(1), source.matrix, weight, bias, eps)
        return _Layer(_as_images(found, source.windows))
    found = standardised(input, eps)
    found = found if weight is None else found * weight[:, None, None]
    return _Layer(found if bias is None else found + bias[:, None, None])


def _relu(source: Any, input: Tensor, inplace: bool = False) -> _Layer | None:
    return None if inplace else _Layer(input.relu(), _ReLU(input))


def _max_pool2d(
    source: Any,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Layer | None:
    window = _pair(kernel_size)
    fits = input.dim() == 4 and all(size >= side for size, side in zip(input.shape[2:], window, strict=True))
    apart = (stride is None or _pair(stride) == window) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1)
    if not (fits and apart and window[0] * window[1] <= _MOST) or ceil_mode or return_indices:
        return None
    if isinstance(source, _ReLU):
        return _Layer(max_of_windows(source.input, window).relu())
    return _Layer(max_of_windows(input, window))


_FORMULAS: dict[Callable[..., Any], Callable[..., _Layer | None]] = {
    torch.conv2d: _conv2d,
    functional.batch_norm: _batch_norm,
    functional.relu: _relu,
    torch.relu: _relu,
    functional.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
}


def _as_images(rows: Tensor, windows: Tensor) -> Tensor:
    """What was found of each window as images, with the channels last in memory."""
    return rows.unflatten(0, windows.shape[1:]).permute(0, 3, 1, 2)


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, list | tuple) else (value,)
    return first, rest[0] if rest else first
