"""Batches of tasks from the user's own loaders, in the forms that are usual."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metalit.errors import InputError
from metalit.keys import fold
from metalit.problem import Points, Task

_NAMES = (("support", "query"), ("train", "test"))
_FORMS = (
    "MetaLearner takes batches of tasks: metalit.problem.Task, or ((x, y), (x, y)) with the support set first, or "
    "a dictionary of 'support' and 'query', or of 'train' and 'test', whose tensors are [tasks, rows, ...]; use "
    "TaskDataModule, or a DataLoader of such"
)


def tasks_of(batch: Any, key: Tensor) -> Task:
    """Bring a batch of tasks to one form; task i gets the key ``fold(key, i)``, unless the batch has keys.

    Raises:
        InputError: it is no batch of tasks.

    >>> x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5, 1)
    >>> tasks_of([[x, y], [x, y]], torch.tensor(0)).key.shape
    torch.Size([2])
    """
    support, query, keys = _parts(batch)
    points = {"support": _points("support", support), "query": _points("query", query)}
    counts = {len(part.x) for part in points.values()}
    if len(counts) > 1:
        raise InputError(f"data: support and query are of different numbers of tasks, {sorted(counts)}")
    if not isinstance(keys, Tensor):
        keys = fold(key, torch.arange(counts.pop(), device=key.device))
    return Task(points["support"], points["query"], keys, batch.classes if isinstance(batch, Task) else None)


def with_classes(tasks: Task) -> Task:
    """Tasks whose number of classes is known; where it is not said, it is that of the largest label, and 1.

    Their targets are read, for which a GPU is waited; call it outside of ``vmap``.

    Args:
        tasks: a batch of tasks.

    Raises:
        InputError: a support set without a row of each class.

    >>> x, y = torch.zeros(1, 3, 2), torch.tensor([[0, 2, 1]])
    >>> with_classes(tasks_of([[x, y], [x, y]], torch.tensor(0))).classes
    tensor([[0, 1, 2]])
    """
    _, y, mask = tasks.support
    if tasks.classes is not None or y.is_floating_point() or y.dim() != 2:
        return tasks
    classes = torch.arange(int(max(part.y.max() for part in tasks[:2])) + 1, device=y.device)
    members = y.unsqueeze(2) == classes
    seen = (members if mask is None else members & mask.unsqueeze(2)).any(1)
    if not bool(seen.all()):
        task, number = (~seen).nonzero()[0].tolist()
        raise InputError(
            f"data: the support set of task {task} of a batch has no row of class {number}, and its classes are 0 to "
            f"{len(classes) - 1}; label the classes of each task from 0 on, and give a row of each"
        )
    return tasks._replace(classes=classes.expand(len(y), -1))


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    if isinstance(batch, Task):
        return batch.support, batch.query, batch.key
    if isinstance(batch, Mapping):
        for first, second in _NAMES:
            if batch.keys() >= {first, second}:
                return batch[first], batch[second], batch.get("key")
        raise InputError(f"data: a batch has the keys {sorted(map(str, batch))}. {_FORMS}")
    if isinstance(batch, list | tuple) and len(batch) == 2 and not isinstance(batch[0], Tensor):
        return *batch, None
    size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    raise InputError(f"data: a batch is a {type(batch).__name__}{size}. {_FORMS}")


def _points(name: str, given: Any) -> Points:
    if not (isinstance(given, list | tuple) and 2 <= len(given) <= 3):
        raise InputError(f"data: the {name} set of a batch is a {type(given).__name__}. {_FORMS}")
    points = Points(*given)
    for part, value in zip(("x", "y"), points[:2], strict=True):
        if not isinstance(value, Tensor) or value.dim() < 2:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"data: {part} of the {name} set is {shape}, and must be a tensor [tasks, rows, ...]")
    if points.x.shape[:2] != points.y.shape[:2]:
        raise InputError(
            f"data: x of the {name} set is {tuple(points.x.shape)} and y {tuple(points.y.shape)}: they must begin with "
            "the same numbers of tasks and rows"
        )
    return points
