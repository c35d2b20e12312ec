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

    Several columns are scores of as many classes. One column answers 0 or 1, whichever the criterion finds the smaller
    loss for: a logit by its sign, a probability by whether it is above one half.

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
    if _is_one_column(prediction):
        answers, target, classes = _of_two(loss, prediction, target), target.flatten(), 2
        if answers is None or len(target) != len(answers):
            return None
    else:
        places, classes = (prediction.shape[0], *prediction.shape[2:]), prediction.shape[1]
        if target.shape not in (places, (*places, 1)):
            return None
        answers, target = prediction.argmax(1), target.reshape(places)
    skipped = torch.zeros_like(target, dtype=torch.bool) if skipped is None else skipped.reshape(target.shape)
    valid = skipped | ((target >= 0) & (target < classes))
    if not bool(valid.all()):
        return None
    right = (
        ((answers == target) & ~skipped).flatten(1) if target.dim() > 1 else ((answers == target) & ~skipped)[:, None]
    )
    count = (~skipped).reshape(right.shape).sum(1).clamp(min=1)
    return right.sum(1) / count


def chosen(loss: nn.Module | None, prediction: Tensor, target: Tensor) -> Tensor | None:
    """The class that each row of ``[rows, classes]``, or of one column, answers, ``[rows]``; None where unknown.

    Args:
        loss, prediction, target: as for :func:`right_rows`; of the target the shape and the type count alone.

    >>> chosen(None, torch.tensor([[1.0, 3.0], [2.0, 1.0]]), torch.tensor([0, 0]))
    tensor([1, 0])
    """
    return _of_two(loss, prediction, target) if _is_one_column(prediction) else prediction.argmax(1)


def probabilities(loss: nn.Module | None, prediction: Tensor) -> Tensor | None:
    """The probability of each class, ``[rows, classes]``; None where the criterion is not known to give any.

    Args:
        loss: the criterion; the cross-entropy if None. Log-probabilities of fewer classes than were trained count
            among themselves.
        prediction: ``[rows, classes]``, or one column of logits, of the second of two classes.

    >>> probabilities(nn.BCEWithLogitsLoss(), torch.tensor([[0.0]]))
    tensor([[0.5000, 0.5000]])
    """
    if isinstance(loss, nn.BCEWithLogitsLoss) and _is_one_column(prediction):
        second = prediction.reshape(-1, 1).sigmoid()
        return torch.cat([1 - second, second], 1)
    return prediction.softmax(1) if loss is None or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else None


def _is_one_column(prediction: Tensor) -> bool:
    return prediction.dim() == 1 or prediction.shape[1:].numel() == 1


def _of_two(loss: nn.Module | None, prediction: Tensor, target: Tensor) -> Tensor | None:
    """The class with the smaller loss in each row, ``[rows]``; None where the criterion does not say."""
    if loss is None:
        return None
    for like in (target, prediction):  # criteria of real numbers want targets of the predictions' shape and type
        try:
            zero, one = (loss(prediction, torch.full_like(like, number)) for number in (0, 1))
        except (IndexError, RuntimeError, ValueError):
            continue
        if zero.dim() and len(zero) == len(target):
            zero, one = (values.reshape(len(target), -1).mean(1) for values in (zero, one))
            return (one < zero).long()
    return None
