"""Which rows count, and which of them are answered right."""

import torch
from torch import Tensor, nn


def ignored(loss: nn.Module | None, target: Tensor) -> Tensor | None:
    """Which classes the criterion skips (its ``ignore_index``), shaped like ``target``; None for real numbers.

    Without a criterion it is that of :func:`torch.nn.functional.cross_entropy`, −100.
    """
    index = -100 if loss is None else getattr(loss, "ignore_index", None)
    return None if index is None or target.is_floating_point() else target == index


def real_rows(loss: nn.Module | None, target: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which rows count, ``[rows]``: no padding, nor one whose classes are all ignored; None if all do by their kind.

    Args:
        loss: the criterion; see :func:`ignored`.
        target: ``[rows, ...]``.
        mask: ``[rows]``, true for real rows, or None.

    >>> real_rows(None, torch.tensor([1, -100, 2]), torch.tensor([True, True, False]))
    tensor([ True, False, False])
    """
    skipped = ignored(loss, target)
    if skipped is None:
        return mask
    real = ~skipped.flatten(1).all(1) if skipped.dim() > 1 else ~skipped
    return real if mask is None else real & mask


def right_rows(loss: nn.Module | None, prediction: Tensor, target: Tensor) -> Tensor | None:
    """The share of right answers in each row, ``[rows]``; None where it is not known how a prediction answers.

    Several columns are scores of as many classes. One column is the logit of class 1 under ``BCEWithLogitsLoss``, and
    its probability under ``BCELoss``.

    Args:
        loss: the criterion.
        prediction: ``[rows, classes]``, or ``[rows, classes, ...]`` for a class at each place.
        target: classes, ``[rows]`` or ``[rows, 1]``, or ``[rows, ...]``.

    >>> right_rows(None, torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([1, 0]))
    tensor([1., 0.])
    """
    if target.is_floating_point() or target.is_complex() or prediction.dim() == 0 or len(prediction) != len(target):
        return None
    skipped = ignored(loss, target)
    if prediction.dim() == 1 or prediction.shape[1:].numel() == 1:
        edges = {nn.BCEWithLogitsLoss: 0.0, nn.BCELoss: 0.5}
        edge = next((edge for kind, edge in edges.items() if isinstance(loss, kind)), None)
        if edge is None or target.numel() != len(target):
            return None
        answers, target, classes = (prediction.flatten() > edge).long(), target.flatten(), 2
    else:
        places, classes = (prediction.shape[0], *prediction.shape[2:]), prediction.shape[1]
        if target.shape not in (places, (*places, 1)):
            return None
        answers, target = prediction.argmax(1), target.reshape(places)
    skipped = torch.zeros_like(target, dtype=torch.bool) if skipped is None else skipped.reshape(target.shape)
    known = skipped | ((target >= 0) & (target < classes))
    if not bool(known.all()):
        return None
    right = (
        ((answers == target) & ~skipped).flatten(1) if target.dim() > 1 else ((answers == target) & ~skipped)[:, None]
    )
    count = (~skipped).reshape(right.shape).sum(1).clamp(min=1)
    return right.sum(1) / count
