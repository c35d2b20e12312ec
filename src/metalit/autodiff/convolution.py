"""Convolutions and their derivatives, which are convolutions again, with channels last in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

_FEW = 16  # up to so many numbers in a window, a matrix product is faster on a CPU than oneDNN's convolution


class Form(NamedTuple):
    """How the windows lie, in each of the two directions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolution(x: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Convolve images ``[rows, channels, height, width]``, as ``torch.nn.functional.conv2d`` without a bias.

    The three maps convolution (of x, w), its gradient by x (of g, w) and by w (of g, x) are linear in both arguments,
    and the derivatives of each are the other two. So no derivative of any order needs another kernel.
    """
    found: Tensor = _Convolution.apply(x, weight, form)
    return found


def channels_last(x: Tensor) -> Tensor:
    """The same images, with their channels side by side in memory."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def few_in_a_window(weight: Tensor, form: Form) -> bool:
    """Whether a convolution is faster as a product of all its windows, ``windows.flatten(1).T @ matrix_of(weight)``."""
    return form.groups == 1 and weight[0].numel() <= _FEW


def windows_of(x: Tensor, weight: Tensor, form: Form) -> Tensor:
    """All windows, ``[numbers in one, rows, height, width]``; of what does not change, such as images, made once."""
    (height, width), (down, right) = weight.shape[2:], form.padding
    padded = pad(x.transpose(0, 1), (right, right, down, down))
    starts = [(row * form.dilation[0], column * form.dilation[1]) for row in range(height) for column in range(width)]
    ends = (padded.shape[2] - starts[-1][0], padded.shape[3] - starts[-1][1])
    each = [
        padded[:, :, row : row + ends[0] : form.stride[0], column : column + ends[1] : form.stride[1]]
        for row, column in starts
    ]
    return torch.stack(each, 1).flatten(0, 1)


def matrix_of(weight: Tensor) -> Tensor:
    """The weight as a factor of windows; by rows, as the gradient by one by columns takes torch five times as long."""
    return weight.flatten(1).T.contiguous()


def _backward(g: Tensor, x: Tensor, weight: Tensor, form: Form, by_x: bool) -> Tensor:
    found = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        form.stride,
        form.padding,
        form.dilation,
        False,
        [0, 0],
        form.groups,
        [by_x, not by_x, False],
    )
    gradient: Tensor = found[0 if by_x else 1]
    return gradient


def _without_values(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of which torch asks the shape alone."""
    first, channels, height, width = shape
    return like.new_empty(first, height, width, channels).permute(0, 3, 1, 2)


class _Convolution(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, form: Form) -> Tensor:
        found: Tensor = torch.ops.aten.convolution(
            channels_last(x),
            channels_last(weight),
            None,
            form.stride,
            form.padding,
            form.dilation,
            False,
            [0, 0],
            form.groups,
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.form = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_x = _ByInput.apply(g, weight, x.shape, ctx.form) if ctx.needs_input_grad[0] else None
        return by_x, _ByWeight.apply(g, x, weight.shape, ctx.form) if ctx.needs_input_grad[1] else None, None


class _Gradient(Function):
    """What the gradients by images and by weights share: both are of g, the other factor, the shape and the form."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.form = inputs[3]


class _ByInput(_Gradient):
    """The gradient of a convolution by its images, of those by its values g, and the weight."""

    @staticmethod
    def forward(g: Tensor, weight: Tensor, shape: tuple[int, ...], form: Form) -> Tensor:
        return _backward(channels_last(g), _without_values(g, shape), channels_last(weight), form, True)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        g, weight = ctx.saved_tensors
        by_g = _Convolution.apply(u, weight, ctx.form) if ctx.needs_input_grad[0] else None
        by_weight = _ByWeight.apply(g, u, weight.shape, ctx.form) if ctx.needs_input_grad[1] else None
        return by_g, by_weight, None, None


class _ByWeight(_Gradient):
    """The gradient of a convolution by its weight, of those by its values g, and the images."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, shape: tuple[int, ...], form: Form) -> Tensor:
        return _backward(channels_last(g), channels_last(x), _without_values(g, shape), form, False)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x = ctx.saved_tensors
        by_g = _Convolution.apply(x, v, ctx.form) if ctx.needs_input_grad[0] else None
        return by_g, _ByInput.apply(g, v, x.shape, ctx.form) if ctx.needs_input_grad[1] else None, None, None
