"""Faults that only other rows show: a loss that is no mean of them, and an inner level that sees the query rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalit.checking.differences import unit_direction
from metalit.checking.faults import pieces, same
from metalit.checking.subject import Subject
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Points, Splits, Task
from metalit.tree import axpy


class Found(NamedTuple):
    """What is wrong, and what could not be asked, or is as it is on purpose."""

    problems: list[str]
    remarks: list[str]


_LEVELS = {Task: ("support", ("query",)), Splits: ("train", ("val", "test"))}


def faults_of_rows(subject: Subject) -> Found:
    """Ask both, where a task has rows of which the level is known."""
    task = subject.one()
    if type(task) not in _LEVELS:
        return Found([], [f"rows: not checked, since a {type(task).__name__} has none of an inner and an outer level"])
    was_training = {module: module.training for module in subject.problem.modules()}
    subject.problem.eval()  # dropout would hide what is asked
    try:
        with torch.no_grad():
            leaks = _leaks(subject, task)
            found = _no_mean(subject, task)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return Found([*leaks, *found.problems], found.remarks)


def _leaks(subject: Subject, task: Any) -> list[str]:
    """Whether ``init`` or the inner loss changes with rows that are there to judge it."""
    _, others = _LEVELS[type(task)]
    begin = _beside(subject, task)
    before = {name: call() for name, call in pieces(subject, task, begin).items()}
    name, found = type(subject.problem).__name__, []
    for part in others:
        after = pieces(subject, task._replace(**{part: _other(getattr(task, part))}), begin)
        found += [
            f"{name}.{piece} reads task.{part}, by which the inner variable is judged: a leak; let it read "
            f"task.{_LEVELS[type(task)][0]} alone"
            for piece in ("init", "inner_loss")
            if piece in before and not same(before[piece], after[piece]())
        ]
    return found


def _beside(subject: Subject, task: Any) -> Any:
    """An inner variable where nothing is zero or alike by chance, as predictions at init may be."""
    begin = subject.problem.init(subject.outer["problem"], task)
    return axpy(0.1, unit_direction(begin, 0), begin) if tree_leaves(begin) else begin


def _other(points: Points) -> Points:
    """Other rows of the same shape."""

    def changed(value: Tensor) -> Tensor:
        return value + 1.0 if value.is_floating_point() else value.roll(1, 0)

    return points._replace(x=changed(points.x), y=changed(points.y))


def _no_mean(subject: Subject, task: Any) -> Found:
    """Whether a loss stays as it is where each row is there twice, as that of a mean does."""
    inner_part, others = _LEVELS[type(task)]
    name, problems, remarks = type(subject.problem).__name__, [], []
    begin = _beside(subject, task)
    for piece, part in (("inner_loss", inner_part), ("outer_loss", others[0])):

        def loss(given: Any, piece: str = piece) -> Tensor | None:
            call: Callable[[], Tensor] | None = pieces(subject, given, begin).get(piece)
            return None if call is None else call()

        value = loss(task)
        if value is None:
            continue
        if _follows_key(task, loss, value):
            remarks.append(f"{name}.{piece}: not checked for being a mean, since it draws rows by the task's key")
            continue
        try:
            twice, thrice = (loss(task._replace(**{part: _repeated(getattr(task, part), n)})) for n in (2, 3))
        except Exception:  # what has a weight of each row, such as Cleaning, takes no others
            remarks.append(f"{name}.{piece}: not checked for being a mean, since it takes these rows alone")
            continue
        assert twice is not None
        assert thrice is not None
        near = torch.finfo(value.dtype).eps ** 0.5 * (1e-6 + value.abs())
        if bool((twice - value).abs() <= near):
            continue
        is_sum = bool(((thrice - twice) - (twice - value)).abs() <= near)
        told = f"{name}.{piece} changes from {float(value):.4g} to {float(twice):.4g} where each row is there twice"
        if is_sum or not subject.problem.adapts_in_init:
            what = "a sum over rows, so the step size would depend on their number" if is_sum else "no mean over rows"
            problems.append(f"{told}: it is {what}; divide by the number of rows")
        else:
            joint = (
                f"{name}: its losses are no means over rows, which is right where a prior is weighed against all rows"
            )
            remarks += [joint] if joint not in remarks else []
    return Found(problems, remarks)


def _repeated(points: Points, times: int) -> Points:
    return pytree_map(lambda leaf: None if leaf is None else leaf.repeat_interleave(times, 0), points)


def _follows_key(task: Any, loss: Callable[[Any], Tensor | None], value: Tensor) -> bool:
    return not same(value, loss(task._replace(key=task.key + 1)))
