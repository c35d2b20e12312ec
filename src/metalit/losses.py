"""Losses with one value for each row, and what must hold for them: nothing is ever broadcast."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from metalit.errors import InputError
from metalit.judging import ignored


def row_losses(loss: nn.Module | None, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each row, ``[rows]``; trailing dimensions are averaged, where they are not ignored.

    Args:
        loss: a criterion with ``reduction="none"``; if none is given, the cross-entropy for classes (integers), and
            the squared error for real numbers.
        prediction: ``[rows, outputs]``.
        target: ``[rows, outputs]`` real numbers, or ``[rows]`` classes.

    Raises:
        InputError: real targets of another shape than the predictions, or a loss without a value for each row.

    >>> import torch
    >>> row_losses(None, torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    if not isinstance(prediction, Tensor):
        raise InputError(
            f"network: it returned a {type(prediction).__name__}; it must return one tensor [rows, outputs], so wrap "
            "it in a module that does"
        )
    # a criterion would broadcast [rows, 1] against [rows] to [rows, rows] without a word
    if target.is_floating_point() and prediction.shape != target.shape:
        raise InputError(
            f"network: its predictions have shape {tuple(prediction.shape)} and the targets "
            f"{tuple(target.shape)}; they must be equal: as many outputs as the targets have columns, and targets "
            "with a column even if there is but one"
        )
    if loss is None:
        measure = F.mse_loss if target.is_floating_point() else F.cross_entropy
        values = measure(prediction, target, reduction="none")
    else:
        values = loss(prediction, target)
    if not isinstance(values, Tensor):
        raise InputError(f"loss: {loss} returned a {type(values).__name__}; it must return a tensor [rows]")
    if values.shape not in (target.shape, target.shape[:1]):
        raise InputError(
            f"loss: {loss} returned shape {tuple(values.shape)} for targets of shape {tuple(target.shape)}; "
            'it must return one value for each row, so set reduction="none"'
        )
    return _means(values, ignored(loss, target)) if values.dim() > 1 else values


def _means(values: Tensor, skipped: Tensor | None) -> Tensor:
    if skipped is None or skipped.shape != values.shape:
        return values.flatten(1).mean(1)
    count = (~skipped).flatten(1).sum(1).clamp(min=1)
    return values.masked_fill(skipped, 0.0).flatten(1).sum(1) / count


def mean_of_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``[rows]`` values over the real rows, of which a mask says which they are.

    >>> import torch
    >>> mean_of_rows(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    return rows.mean() if mask is None else rows.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def gaussian_nll(mean: Tensor, std: Tensor, target: Tensor) -> Tensor:
    """−log N(target; mean, std²) of each row, ``[rows]``: the mean over its outputs; all are ``[rows, outputs]``.

    Raises:
        InputError: shapes that differ.

    >>> import torch
    >>> gaussian_nll(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    tensor([0.9189])
    """
    squares = row_losses(nn.MSELoss(reduction="none"), mean / std, target / std)
    return 0.5 * squares + std.log().mean(1) + 0.5 * math.log(2 * math.pi)


def check_loss(loss: nn.Module | None) -> None:
    """Raise an :class:`InputError` for a loss that is no module, or has parameters of its own to train."""
    if loss is not None and not isinstance(loss, nn.Module):
        name = getattr(loss, "__name__", repr(loss))
        raise InputError(
            f"loss={name} is of type {type(loss).__name__}; give a module with a value for each row, such as "
            'torch.nn.MSELoss(reduction="none"), or wrap a function in one'
        )
    if loss is not None and any(parameter.requires_grad for parameter in loss.parameters()):
        raise InputError(f"loss: {loss} has trainable parameters; only the network's are learned, so freeze them")
