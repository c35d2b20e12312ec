"""What an evaluation of a meta-learner finds, draw by draw of its tasks, over all ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from metalit.data.base import Split
from metalit.data.module import TaskDataModule
from metalit.data.stream import EvalStream
from metalit.evaluation.judged import INSIDE, LEARNER, LOSS, NLL, SQUARED, Z95, Judged, Measure
from metalit.judging import real_rows, right_rows
from metalit.problem import Points


class TaskScores(nn.Module):
    """Collects what the learner and baselines did on every draw, and which task each draw is of.

    Attributes:
        judged: what each did in the last evaluation, the learner first.
        tasks: the number of the task that each draw was of, ``[draws]``.

    Args:
        steps: the inner steps that are taken.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._rows = CatMetric(nan_strategy="disable")
        self._columns: list[tuple[str, Measure, int]] = []  # of a row: whose, of what, in how many steps
        self.tasks = torch.empty(0, dtype=torch.long)
        self.judged = [Judged(LEARNER, {LOSS: torch.empty(0, steps + 1)}, self.tasks)]

    def start(self) -> None:
        """Collect in double precision, which torchmetrics forgets whenever a module moves."""
        self._rows.set_dtype(torch.float64)

    def add(self, index: Tensor | None, found: Mapping[str, Mapping[Measure, Tensor]]) -> None:
        """Take a batch of draws.

        Args:
            index: their global indices, ``[draws]``, where these are known.
            found: by predictor, the learner first, then by measure: ``[draws, steps]``.
        """
        parts = [(name, measure, values) for name, measures in found.items() for measure, values in measures.items()]
        self._columns = [(name, measure, values.shape[1]) for name, measure, values in parts]
        losses = parts[0][2]
        places = losses.new_full((len(losses),), -1) if index is None else index.to(losses.device)
        columns = [places.unsqueeze(1), *(values for _, _, values in parts)]
        self._rows.update(torch.cat([values.double() for values in columns], 1))

    def finish(self, data: Any, split: Split) -> Judged:
        """Gather all ranks' draws; returns what the learner did."""
        widths = [width for _, _, width in self._columns]
        index, *parts = self._rows.compute().split([1, *widths], dim=1)
        self._rows.reset()
        index = index[:, 0].long()
        if isinstance(data, TaskDataModule) and bool((index >= 0).all()):
            self.tasks = data.tasks.which(split, index)
        else:
            self.tasks = torch.arange(len(index), device=index.device)
        found: dict[str, dict[Measure, Tensor]] = {}
        for (name, measure, _), values in zip(self._columns, parts, strict=True):
            found.setdefault(name, {})[measure] = values
        self.judged = [Judged(name, measures, self.tasks) for name, measures in found.items()]
        return self.judged[0]

    @property
    def losses(self) -> Tensor:
        """The learner's, ``[draws, steps + 1]``."""
        return self.judged[0].values[LOSS]


def indices(loader: Any, batch: int) -> Tensor | None:
    """The global indices of the draws of a batch, where the loader is one of ours."""
    return loader.chunks[batch] if isinstance(loader, EvalStream) else None


def accuracies(loss: nn.Module | None, predictions: Tensor, query: Points) -> Tensor | None:
    """The share of right answers, ``[tasks, steps]``, of ``[tasks, steps, rows, classes]`` predictions.

    None where it is not known how a prediction answers; see :func:`~metalit.judging.right_rows`.
    """
    y, mask = query.y.flatten(0, 1), None if query.mask is None else query.mask.flatten()
    answers = [right_rows(loss, prediction.flatten(0, 1), y) for prediction in predictions.unbind(1)]
    right = [values for values in answers if values is not None]
    if len(right) < len(answers):
        return None
    counts = real_rows(loss, y, mask)
    weights = torch.ones_like(right[0]) if counts is None else counts.to(right[0].dtype)
    weights = weights.reshape(len(query.y), -1)
    return torch.stack([(values.view_as(weights) * weights).sum(1) / weights.sum(1) for values in right], 1)


def absolute_errors(
    query: Points, outputs: Sequence[str], deviations: Sequence[float], predictions: Tensor
) -> dict[Measure, Tensor]:
    """The mean absolute error of each output over the query rows, in the user's units, ``[tasks, steps]``.

    Args:
        query: what is true.
        outputs: the names of the outputs.
        deviations: their standard deviations, by which they were normalised.
        predictions: ``[tasks, steps, rows, outputs]``, normalised.
    """
    truth = query.y.unsqueeze(1).double()
    errors = (predictions.double() - truth).abs() * truth.new_tensor(deviations)
    measures = [Measure(f"{output}_absolute_error", f"|error| in {output}", logged=False) for output in outputs]
    return dict(zip(measures, _over_rows(errors, query.mask).unbind(2), strict=True))


def likelihoods(query: Points, predictions: Tensor, deviations: Tensor) -> dict[Measure, Tensor]:
    """How well predictions with a standard deviation fit the query rows, ``[tasks, steps]``, over rows and outputs.

    Args:
        query: what is true.
        predictions, deviations: ``[tasks, steps, rows, outputs]``, normalised.
    """
    errors, std = predictions.double() - query.y.unsqueeze(1).double(), deviations.double()
    scores = {
        SQUARED: errors.square(),
        NLL: 0.5 * (errors / std).square() + std.log() + 0.5 * math.log(2 * math.pi),
        INSIDE: (errors.abs() <= Z95 * std).double(),
    }
    return {measure: _over_rows(values, query.mask).mean(2) for measure, values in scores.items()}


def _over_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """The means of ``[tasks, steps, rows, outputs]`` over the real rows."""
    if mask is None:
        return values.mean(2)
    weights = mask[:, None, :, None].double()
    return (values * weights).sum(2) / weights.sum(2)
