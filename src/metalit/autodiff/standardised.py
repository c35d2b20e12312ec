"""Standardising columns by their own mean and variance, with derivatives of few passes over memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def standardised(x: Tensor, eps: float) -> Tensor:
    """``(x − mean) / √(variance + eps)`` of each column of ``[rows, columns]``, as BatchNorm does (biased variance).

    With h for that, r for 1/√(variance + eps), and ⟨·⟩ for the mean of a column: the derivative along v is
    P(v) = r (v − ⟨v⟩ − h ⟨hv⟩), which is symmetric. And the gradient of Σ u P(g) by x is
    −r² ((⟨ug⟩ − ⟨u⟩⟨g⟩ − ab) h) − r (b P(u) + a P(g)), with a = ⟨uh⟩ and b = ⟨gh⟩: five means, then one sum.
    """
    found: Tensor = _Standardised.apply(x, eps)[0]
    return found


def standardised_product(
    rows: Tensor, matrix: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """``standardised(rows @ matrix, eps) * scale + shift``, which is another product: no pass goes over the first one.

    With C for the covariance of the columns of ``rows``, the variance of the product by a column w is wᵀCw. It is
    summed in double precision, since its terms may cancel each other.
    """
    centred = rows - rows.mean(0)
    exact, column = centred.double(), matrix.double()
    variance = (column * (exact.T @ exact @ column)).sum(0) / len(rows)
    by = (variance + eps).rsqrt().to(matrix.dtype)
    shift = torch.zeros_like(by) if shift is None else shift
    # the shift is a row for a column of ones: its gradient, a sum over all rows, then comes with the product
    factors = torch.cat([matrix * (by if scale is None else by * scale), shift[None]])
    return torch.cat([centred, torch.ones_like(centred[:, :1])], 1) @ factors


class _Standardised(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(0)
        scale = (centred.square().mean(0) + eps).rsqrt()
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
            parts.append(-(scale.square() * by_scale / len(x)) * h)
        return sum(parts) if parts else None, None


class _Along(Function):
    """P(g); it depends on x through h and scale too, which are known already, and whose share is that of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, g: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        return scale * (g - g.mean(0) - h * (g * h).mean(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        _, g, h, scale = ctx.saved_tensors
        mean_u, mean_g, a, b, both = (value.mean(0) for value in (u, g, u * h, g * h, u * g))
        rest = both - mean_u * mean_g - 3 * a * b
        by_x = scale.square() * (b * mean_u + a * mean_g - b * u - a * g - rest * h)
        return by_x, scale * (u - mean_u - h * a), None, None
