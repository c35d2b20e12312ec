"""What an evaluation of a meta-learner finds, draw by draw of its tasks, over all ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from metalit.data.base import Split
from metalit.data.module import TaskDataModule
from metalit.data.stream import EvalStream
from metalit.evaluation.interval import Interval, mean_with_interval
from metalit.judging import real_rows, right_rows
from metalit.problem import Points


class TaskScores(nn.Module):
    """Collects the query losses, for classes the accuracies too, of every draw, and says which task each draw is of.

    Attributes:
        tasks: the number of the task that each draw of the last evaluation was of, ``[draws]``.
        losses: after each number of inner steps, ``[draws, steps + 1]``.
        accuracies: likewise; None where the targets are no classes.

    Args:
        steps: the inner steps that are taken.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._rows = CatMetric(nan_strategy="disable")
        self.tasks = torch.empty(0, dtype=torch.long)
        self.losses = torch.empty(0, steps + 1)
        self.accuracies: Tensor | None = None

    def start(self) -> None:
        """Collect in double precision, which torchmetrics forgets whenever a module moves."""
        self._rows.set_dtype(torch.float64)

    def add(self, index: Tensor | None, losses: Tensor, accuracies: Tensor | None) -> None:
        """Take a batch of draws, and their global indices, where these are known."""
        places = losses.new_full((len(losses),), -1) if index is None else index.to(losses.device)
        parts = [places.double().unsqueeze(1), losses.double()]
        self._rows.update(torch.cat(parts if accuracies is None else [*parts, accuracies.double()], 1))

    def finish(self, data: Any, split: Split) -> dict[str, list[Interval]]:
        """Gather all ranks' draws; returns the means over tasks after each number of inner steps, by measure."""
        steps = self.losses.shape[1]
        index, self.losses, right = self._rows.compute().tensor_split([1, 1 + steps], dim=1)
        self._rows.reset()
        self.accuracies = right if right.shape[1] else None
        index = index[:, 0].long()
        if isinstance(data, TaskDataModule) and bool((index >= 0).all()):
            self.tasks = data.tasks.which(split, index)
        else:
            self.tasks = torch.arange(len(index), device=index.device)
        return {name: self.means(values) for name, values in self.measures().items()}

    def measures(self) -> dict[str, Tensor]:
        """``loss``, and for classes ``accuracy``: ``[draws, steps + 1]``."""
        return {"loss": self.losses} | ({} if self.accuracies is None else {"accuracy": self.accuracies})

    def means(self, values: Tensor) -> list[Interval]:
        """Over the tasks, for each column of ``[draws, columns]``."""
        return [mean_with_interval(column, self.tasks) for column in values.unbind(1)]


def indices(loader: Any, batch: int) -> Tensor | None:
    """The global indices of the draws of a batch, where the loader is one of ours."""
    return loader.chunks[batch] if isinstance(loader, EvalStream) else None


def accuracies(loss: nn.Module | None, predictions: Tensor, query: Points) -> Tensor | None:
    """The share of right answers, ``[tasks, steps]``, of ``[tasks, steps, rows, classes]`` predictions.

    None where it is not known how a prediction answers; see :func:`~metalit.judging.right_rows`.
    """
    y, mask = query.y.flatten(0, 1), None if query.mask is None else query.mask.flatten()
    right = [right_rows(loss, prediction.flatten(0, 1), y) for prediction in predictions.unbind(1)]
    if any(values is None for values in right):
        return None
    counts = real_rows(loss, y, mask)
    weights = torch.ones_like(right[0]) if counts is None else counts.to(right[0].dtype)
    weights = weights.reshape(len(query.y), -1)
    return torch.stack([(values.view_as(weights) * weights).sum(1) / weights.sum(1) for values in right], 1)
