"""Standardising channels by their own mean and variance, with derivatives of few passes over memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def standardised(x: Tensor, eps: float) -> Tensor:
    """``(x − mean) / √(variance + eps)`` of each channel of ``[rows, channels, …]``, as BatchNorm has it.

    With h for that, r for 1/√(variance + eps), and ⟨·⟩ for the mean of a channel: the derivative along v is
    P(v) = r (v − ⟨v⟩ − h ⟨hv⟩), which is symmetric. And the gradient of Σ u P(g) by x is
    −r² ((⟨ug⟩ − ⟨u⟩⟨g⟩ − ab) h) − r (b P(u) + a P(g)), with a = ⟨uh⟩ and b = ⟨gh⟩: five means, then one sum.
    """
    found: Tensor = _Standardised.apply(x, eps)[0]
    return found


def standardised_product(
    columns: Tensor, matrix: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """``columns.T @ matrix``, standardised by columns, scaled and shifted: another product, no pass over the first.

    With C for the covariance of ``columns``, the variance of the product by w, a column of ``matrix``, is wᵀCw. It is
    summed in double precision, since its terms may cancel each other.
    """
    centred = columns - columns.mean(1, keepdim=True)
    exact, by = centred.double(), matrix.double()
    variance = (by * (exact @ exact.T @ by)).sum(0) / columns.shape[1]
    factor = (variance + eps).rsqrt().to(matrix.dtype)
    shift = torch.zeros_like(factor) if shift is None else shift
    # the shift is the factor of a column of ones: its gradient, a sum over all rows, then comes with the product
    by_all = torch.cat([matrix * (factor if scale is None else factor * scale), shift[None]])
    return torch.cat([centred, torch.ones_like(centred[:1])]).T @ by_all


class _Standardised(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        centred = x - _mean(x)
        scale = (_mean(centred.square()) + eps).rsqrt()
        return centred * scale, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, by_scale: Tensor | None) -> Any:
        x, h, scale = ctx.saved_tensors
        parts = []
        if g is not None:
            parts.append(_Along.apply(x, g, h, scale))
        if by_scale is not None:  # derivatives of third order
            parts.append(-(scale.square() * by_scale * x.shape[1] / x.numel()) * h)
        return sum(parts) if parts else None, None


class _Along(Function):
    """P(g); it depends on x through h and scale too, which are known already, and whose share is that of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, g: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        return scale * (g - _mean(g) - h * _mean(g * h))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        _, g, h, scale = ctx.saved_tensors
        mean_u, mean_g, a, b, both = (_mean(value) for value in (u, g, u * h, g * h, u * g))
        rest = both - mean_u * mean_g - 3 * a * b
        by_x = scale.square() * (b * mean_u + a * mean_g - b * u - a * g - rest * h)
        return by_x, scale * (u - mean_u - h * a), None, None


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, *range(2, x.dim())), keepdim=True)
