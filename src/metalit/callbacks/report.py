"""The table of errors, beside predictors that learned nothing from other tasks."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from torch import Tensor
from torchmetrics.aggregation import CatMetric

from metalit.callbacks.screen import show, table
from metalit.data.base import Split
from metalit.data.module import TaskDataModule
from metalit.modules.interval import Interval, mean_with_interval
from metalit.modules.meta import MetaLearner
from metalit.problem import Points, Task

_LEARNER = "learner"


class _Judged(NamedTuple):
    """What one predictor did on every test task."""

    name: str
    losses: Tensor  # [tasks, steps]; a baseline has one step
    errors: Tensor | None  # [tasks, steps, outputs], absolute, in the user's units, where there are units

    def rows(self) -> list[tuple[int, list[Interval]]]:
        """By inner step: the loss, then the error of each output, over tasks."""
        found = []
        for step, losses in enumerate(self.losses.unbind(1)):
            errors = () if self.errors is None else self.errors[:, step].unbind(1)
            found.append((step, [mean_with_interval(values) for values in (losses, *errors)]))
        return found


class Report(Callback):
    """Prints the errors after each number of inner steps with 95 % intervals, and writes ``test.csv`` (``val.csv``).

    It does so after ``test`` and ``validate`` of a meta-learner, not for the validations of a fit.

    Where the data has units, each output's mean absolute error in them stands beside the loss. The distribution's
    baselines are judged on the same query points.
    """

    def __init__(self) -> None:
        self._losses: dict[str, CatMetric] = {}
        self._errors: dict[str, CatMetric] = {}

    def on_test_start(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Start afresh."""
        self._losses, self._errors = {}, {}

    def on_validation_start(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Start afresh."""
        self._losses, self._errors = {}, {}

    def on_test_batch_end(self, trainer: Trainer, learner: MetaLearner, outputs: Any, tasks: Task, *_: Any) -> None:
        """Collect what the learner itself does not: baselines, and errors in the user's units."""
        self._judge(trainer, learner, tasks)

    def on_validation_batch_end(
        self, trainer: Trainer, learner: MetaLearner, outputs: Any, tasks: Task, *_: Any
    ) -> None:
        """Collect likewise."""
        if trainer.state.fn == "validate":
            self._judge(trainer, learner, tasks)

    def on_test_end(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Print the table and write the file."""
        self._report(trainer, learner, "test")

    def on_validation_end(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Print likewise."""
        if trainer.state.fn == "validate":
            self._report(trainer, learner, "val")

    def _judge(self, trainer: Trainer, learner: MetaLearner, tasks: Task) -> None:
        data = trainer.datamodule
        if not (isinstance(learner, MetaLearner) and isinstance(data, TaskDataModule)):
            return
        baselines = data.tasks.baselines(tasks)
        for name, prediction in baselines.items():
            _collect(self._losses, name, learner.judge(prediction, tasks).unsqueeze(1))
        if data.tasks.scaling().changes:
            _collect(self._errors, _LEARNER, _absolute_errors(learner, learner.query_predictions(tasks), tasks.query))
            for name, prediction in baselines.items():
                _collect(self._errors, name, _absolute_errors(learner, prediction.unsqueeze(1), tasks.query))

    def _report(self, trainer: Trainer, learner: MetaLearner, split: Split) -> None:
        if not isinstance(learner, MetaLearner):
            return
        # reshaped, because torchmetrics squeezes a single value
        losses = {name: metric.compute().reshape(-1, 1) for name, metric in self._losses.items()}
        losses = {_LEARNER: learner.task_losses, **losses}
        errors = {name: metric.compute().reshape(*losses[name].shape, -1) for name, metric in self._errors.items()}
        judged = [_Judged(name, values, errors.get(name)) for name, values in losses.items()]
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        outputs = data.tasks.columns.y if errors else []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _write(Path(logger.log_dir) / f"{split}.csv", judged, outputs)
        comparisons = [_comparison(judged[0], baseline, outputs) for baseline in judged[1:]]
        show([_protocol(data, learner, split), _table(judged, outputs), *comparisons])


def _collect(metrics: dict[str, CatMetric], name: str, values: Tensor) -> None:
    metrics.setdefault(name, CatMetric(nan_strategy="disable").to(values.device)).update(values)


def _absolute_errors(learner: MetaLearner, predictions: Tensor, query: Points) -> Tensor:
    """Mean absolute errors over the query rows, ``[tasks, steps, outputs]``, in the user's units."""
    truth = query.y.unsqueeze(1).double()
    scale = truth.new_tensor(learner.scaling.y_std)
    errors = (predictions.double() - truth).abs() * scale
    if query.mask is None:
        return errors.mean(2)
    weights = query.mask[:, None, :, None].double()
    return (errors * weights).sum(2) / weights.sum(2)


def _protocol(data: Any, learner: MetaLearner, split: Split) -> str:
    count = len(learner.task_losses)
    if not isinstance(data, TaskDataModule):
        return f"{count} {split} tasks; mean ± 95 % interval over tasks"
    episodes = data.episodes[split]
    queries = "all other rows" if episodes.queries == "all" else f"{episodes.queries} points"
    return (
        f"{count} {split} tasks, adapted to {episodes.shots} points each and judged on {queries}; "
        "mean ± 95 % interval over tasks"
    )


def _table(judged: list[_Judged], outputs: Sequence[str]) -> Table:
    learner, *baselines = judged
    return table(
        ["inner steps", "loss", *(f"|error| in {output}" for output in outputs)],
        [[str(step), *map(str, intervals)] for step, intervals in learner.rows()],
        [[baseline.name, *map(str, intervals)] for baseline in baselines for _, intervals in baseline.rows()],
    )


def _comparison(learner: _Judged, baseline: _Judged, outputs: Sequence[str]) -> str:
    """Both saw the same tasks: task by task, their difference is far surer than the two means are."""
    if baseline.errors is None:
        measure, difference = "loss", baseline.losses[:, -1] - learner.losses[:, -1]
    else:
        measure, difference = f"|error| in {outputs[0]}", (baseline.errors - learner.errors[:, -1:])[:, 0, 0]
    steps = learner.losses.shape[1] - 1
    interval = mean_with_interval(difference)
    return f"{baseline.name}: {measure} less the learner's after {steps} inner steps, task by task: {interval}"


def _write(file: Path, judged: list[_Judged], outputs: Sequence[str]) -> None:
    names = ["loss", *(f"{output}_absolute_error" for output in outputs)]
    values = [f"{name}{end}" for name in names for end in ("", "_ci95")]
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["predictor", "inner_steps", *values, "tasks", "diverged"])
        for predictor in judged:
            for step, intervals in predictor.rows():
                cells = [value for interval in intervals for value in (interval.mean, interval.half_width)]
                shown = step if predictor.name == _LEARNER else ""
                writer.writerow([predictor.name, shown, *cells, intervals[0].count, intervals[0].diverged])
