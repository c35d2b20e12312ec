"""Maxima of windows that do not overlap, and their derivatives, which choose and put back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

Window = tuple[int, int]


def max_of_windows(x: Tensor, window: Window) -> Tensor:
    """The largest value of each window of ``[rows, channels, height, width]``; of equal ones the first, as in torch."""
    found: Tensor = _Max.apply(x, window)[0]
    return found


def _places(x: Tensor, window: Window) -> list[Tensor]:
    """The values at each place of all windows; those past the last whole window are left out."""
    height, width = (size // side * side for size, side in zip(x.shape[2:], window, strict=True))
    return [
        x[:, :, row : height : window[0], column : width : window[1]]
        for row in range(window[0])
        for column in range(window[1])
    ]


class _Max(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        most, *others = _places(x, window)
        chosen = torch.zeros_like(most)  # of the values' type, to whose width the compiler's vectors are cut
        for place, value in enumerate(others, start=1):
            better = (value > most) | value.ne(value)  # isnan, which is compiled to one number at a time
            most = torch.where(better, value, most)
            chosen = torch.where(better, torch.full_like(chosen, place), chosen)
        return most, chosen

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.form = inputs[1], inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        return _PutBack.apply(g, *ctx.saved_tensors, *ctx.form), None


class _Choose(Function):
    """The values at the chosen places."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, chosen: Tensor, window: Window) -> Tensor:
        found, *others = _places(x, window)
        for place, value in enumerate(others, start=1):
            found = torch.where(chosen == place, value, found)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.form = inputs[2], inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _PutBack.apply(g, *ctx.saved_tensors, *ctx.form), None, None


class _PutBack(Function):
    """Images that hold these values at the chosen places, and 0 elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, chosen: Tensor, window: Window, size: torch.Size) -> Tensor:
        places = torch.arange(window[0] * window[1], dtype=chosen.dtype, device=chosen.device)
        at = chosen[:, :, :, None, :, None] == places.reshape(window[0], 1, window[1])
        found = torch.where(at, g[:, :, :, None, :, None], torch.zeros_like(g)[:, :, :, None, :, None])
        found = found.flatten(4, 5).flatten(2, 3)
        down, right = size[0] - found.shape[2], size[1] - found.shape[3]
        return pad(found, (0, right, 0, down)) if down or right else found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.window = inputs[2]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        return _Choose.apply(u, *ctx.saved_tensors, ctx.window), None, None, None
