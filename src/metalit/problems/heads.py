"""What problems share whose ``init`` is the whole adaptation: it reads the support set, and no step is taken."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metalit.autodiff import call, draws, sees_other_rows
from metalit.autodiff.blame import as_input_error
from metalit.autodiff.usable import check_network
from metalit.errors import InputError
from metalit.judging import real_rows as judged_rows
from metalit.keys import fold
from metalit.losses import mean_of_rows, row_losses
from metalit.problem import FewShotProblem, Points, Task
from metalit.problems.rows import check_size, check_task

SUPPORT_DRAW, QUERY_DRAW = -2, -1  # the keys of dropout in init and in the outer loss; inner step k uses k
_ROUNDING = 10 * torch.finfo(torch.float64).eps


class Head(FewShotProblem):
    """A few-shot problem that is adapted by :meth:`init` alone.

    Real targets are judged by the squared error; classes, where it ``needs_classes``, by the cross-entropy.
    """

    adapts_in_init = True

    def check(self, task: Any) -> None:
        """Check that a task is one, with targets of its kind, and of as many columns as were given.

        Raises:
            InputError: it is not.
        """
        check_task(self, task, Task, "TaskDataModule")
        if self.needs_classes:
            check_classes(self, task)
            return
        for points in task[:2]:
            if not points.y.is_floating_point() or points.y.dim() != 2:
                raise InputError(
                    f"data: {type(self).__name__} predicts real numbers, [rows, outputs], and the targets are "
                    f"{list(points.y.shape)} of {points.y.dtype}; for classes there are FewShot, Prototypes and "
                    "RidgeHead(classes=True)"
                )
            for name, values in (("inputs", points.x), ("outputs", points.y)):
                given = getattr(self, name, None)
                if given is not None:
                    check_size(type(self).__name__, name, given, values.shape[1], f"columns of {name}")

    def judge(self, prediction: Tensor, points: Points) -> Tensor:
        """The mean loss over the real rows."""
        return mean_of_rows(row_losses(None, prediction, points.y), judged_rows(None, points.y, points.mask))

    def called(self, name: str, outer: dict[str, Tensor], x: Tensor, task: Task | None = None, draw: int = 0) -> Tensor:
        """A network of the problem's, by its ``name``, at ``x`` of a task; without one, nothing is drawn by a key."""
        network: nn.Module = getattr(self, name)
        if task is not None:
            check_no_padding(name, network, task.support, task.query)
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in outer.items() if key.startswith(prefix)}
        key = fold(task.key, draw) if task is not None and draws(network) else None
        return _checked(name, call(network, own, x, key=key))


def check_no_padding(name: str, network: nn.Module, *sets: Points) -> None:
    """Raise an :class:`InputError` where rows are padded, and a network's answer to a row depends on others."""
    if sees_other_rows(network) and any(points.mask is not None for points in sets):
        raise InputError(
            f"{name}: BatchNorm would mix the padding of shorter tasks into its statistics; use LayerNorm or "
            "GroupNorm, or give every task the same number of rows"
        )


def check_classes(problem: FewShotProblem, task: Task) -> None:
    """Raise an :class:`InputError` unless the targets are classes, whose number is known."""
    name = type(problem).__name__
    for points in task[:2]:
        if points.y.is_floating_point() or points.y.dim() != 1:
            raise InputError(
                f"data: {name} names classes, [rows] whole numbers, and the targets are {list(points.y.shape)} of "
                f"{points.y.dtype}; for real numbers there are FewShot, RidgeHead and BayesianHead"
            )
    if task.classes is None:
        raise InputError(
            f"data: {name} needs the number of classes of a task, and Task.classes is None; give torch.arange(ways)"
        )


def check_width(owner: str, name: str, value: int | Literal["auto"]) -> int:
    """Return a number of columns; raise an :class:`InputError` unless it is one, and at least 1."""
    if value == "auto":
        raise InputError(f"{owner}: {name}='auto' is for a configuration; give the number of columns")
    if value < 1:
        raise InputError(f"{owner}: {name}={value} must be at least 1")
    return value


def check_positive(owner: str, name: str, value: float, usual: float) -> None:
    """Raise an :class:`InputError` unless a number is finite and positive."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{owner}: {name}={value} must be a finite positive number, such as {usual}")


def feature_count(network: nn.Module, inputs: int) -> int:
    """How many features a network has; raise an :class:`InputError` where it cannot take so many inputs."""
    check_network("network", network)
    like = next(network.parameters(), torch.zeros(()))
    x = torch.zeros(2, inputs, dtype=like.dtype, device=like.device)
    with as_input_error("network", network, x), torch.no_grad():
        return _checked("network", call(network, {}, x, key=torch.tensor(0))).shape[1]


# ---- classes


def one_hot(points: Points, task: Task) -> Tensor:
    """Whether each row is of each class, ``[rows, ways]``; padding and what the criterion ignores is of none."""
    if task.classes is None:
        raise InputError("data: Task.classes is None, so the number of classes is not known; give torch.arange(ways)")
    found = points.y.unsqueeze(1) == torch.arange(task.classes.shape[-1], device=points.y.device)
    return found if points.mask is None else found & points.mask.unsqueeze(1)


def class_means(features: Tensor, points: Points, task: Task) -> Tensor:
    """The mean of each class over its rows, ``[ways, features]``; each class must have one."""
    members = one_hot(points, task)
    return product(members.mT, features) / members.sum(0).clamp(min=1).unsqueeze(1)


def single(features: Tensor) -> Tensor:
    """Features of half precision in single precision, in which their differences keep their digits."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


# ---- rows and matrices, in double precision


def real_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Rows in double precision, with zeros for padding."""
    return values.double() if mask is None else values.double().where(mask.unsqueeze(1), 0.0)


def product(features: Tensor, matrix: Tensor) -> Tensor:
    """``features @ matrix``, summed in double precision: large entries of a solution cancel, and autocast would halve
    their digits.
    """
    return (features.double() @ matrix.double()).to(matrix.dtype)


def row_count(points: Points) -> Tensor | int:
    """How many rows are real; 1 where none is."""
    return len(points.x) if points.mask is None else points.mask.sum().clamp(min=1)


def joined(task: Task) -> Points:
    """Support and query set as one."""
    support, query = task.support, task.query
    x, y = torch.cat([support.x, query.x]), torch.cat([support.y, query.y])
    if support.mask is None and query.mask is None:
        return Points(x, y)
    masks = [torch.ones_like(part.x[:, 0], dtype=torch.bool) if part.mask is None else part.mask for part in task[:2]]
    return Points(x, y, torch.cat(masks))


def shifted(gram: Tensor, shift: Tensor) -> Tensor:
    """``gram + shift · I`` of a Gram matrix ``[n, n]``, in double precision; never singular to rounding.

    Elimination and Cholesky's decomposition are sure of a matrix whose smallest eigenvalue is more than their rounding
    errors (Higham 2002, theorem 10.7). So ``shift`` counts as ``10 n ε trace(gram)`` at least, 10⁻¹⁴ of the trace for
    five rows: a penalty that is learned may fall to nothing, and the solution is still a number.
    """
    size = gram.shape[0]
    least = size * _ROUNDING * gram.detach().diagonal().sum() + torch.finfo(gram.dtype).tiny
    # not maximum, whose derivative writes to tensors: a program would be traced twice
    return gram + torch.where(shift < least, least, shift) * torch.eye(size, dtype=gram.dtype, device=gram.device)


def _checked(name: str, features: Tensor) -> Tensor:
    """Return ``[rows, features]``; raise an :class:`InputError` for a tensor of another shape."""
    if not isinstance(features, Tensor) or features.dim() != 2:
        got = f"shape {list(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise InputError(f"{name}: it returned {got}; it must return the features of each row, [rows, features]")
    return features
