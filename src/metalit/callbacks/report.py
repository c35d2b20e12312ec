"""The table of test errors, beside predictors that learned nothing from other tasks."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.aggregation import CatMetric

from metalit.data.module import TaskDataModule
from metalit.modules.interval import Interval, mean_with_interval
from metalit.modules.meta import MetaLearner
from metalit.problem import Points, Task


class TestReport(Callback):
    """Prints the test errors after each number of inner steps with 95 % intervals, and writes ``test.csv``.

    Where the data has units, each output's mean absolute error in them stands beside the loss. The distribution's
    baselines are judged on the same query points.
    """

    __test__ = False  # pytest: this is no test

    def __init__(self) -> None:
        self._baseline_losses: dict[str, CatMetric] = {}
        self._errors: dict[str, CatMetric] = {}

    def on_test_start(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Start afresh."""
        self._baseline_losses, self._errors = {}, {}

    def on_test_batch_end(self, trainer: Trainer, learner: MetaLearner, outputs: Any, tasks: Task, *_: Any) -> None:
        """Collect what the learner itself does not: baselines, and errors in the user's units."""
        data = trainer.datamodule
        if not isinstance(data, TaskDataModule):
            return
        baselines = data.tasks.baselines(tasks)
        for name, prediction in baselines.items():
            self._add(self._baseline_losses, name, learner.judge(prediction, tasks))
        if data.tasks.scaling().changes:
            self._add(self._errors, "learner", _absolute_errors(learner, learner.query_predictions(tasks), tasks.query))
            for name, prediction in baselines.items():
                self._add(self._errors, name, _absolute_errors(learner, prediction.unsqueeze(1), tasks.query))

    def on_test_end(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Print the table and write the file."""
        data = trainer.datamodule
        losses = {"learner": [mean_with_interval(values) for values in learner.task_losses.unbind(1)]}
        losses |= {name: [mean_with_interval(metric.compute())] for name, metric in self._baseline_losses.items()}
        collected = {name: metric.compute() for name, metric in self._errors.items()}
        errors = {
            name: [[mean_with_interval(output) for output in step.unbind(1)] for step in values.unbind(1)]
            for name, values in collected.items()
        }
        if errors:
            measure, compared = f"|error| in {data.tasks.columns.y[0]}", {n: v[:, :, 0] for n, v in collected.items()}
        else:
            measure = "loss"
            compared = {name: metric.compute().unsqueeze(1) for name, metric in self._baseline_losses.items()}
        compared_learner = compared.pop("learner", learner.task_losses)[:, -1]
        if not trainer.is_global_zero:
            return
        outputs = data.tasks.columns.y if errors else []
        rows = [
            (name, step, loss, errors[name][step] if errors else [])
            for name, intervals in losses.items()
            for step, loss in enumerate(intervals)
        ]
        console = Console()
        console.print(_protocol(data, learner), soft_wrap=True)
        console.print(_table(rows, outputs))
        # both saw the same tasks: task by task, their difference is far surer than the two means
        for name, values in compared.items():
            less = f"{measure} less the learner's after {learner.eval_steps} inner steps, task by task"
            console.print(f"{name}: {less}: {mean_with_interval(values[:, 0] - compared_learner)}", soft_wrap=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _write(Path(logger.log_dir) / "test.csv", rows, outputs)

    @staticmethod
    def _add(metrics: dict[str, CatMetric], name: str, values: Tensor) -> None:
        metrics.setdefault(name, CatMetric(nan_strategy="disable").to(values.device)).update(values)


_Row = tuple[str, int, Interval, list[Interval]]


def _absolute_errors(learner: MetaLearner, predictions: Tensor, query: Points) -> Tensor:
    """Mean absolute errors over the query rows, ``[tasks, steps, outputs]``, in the user's units."""
    truth = query.y.unsqueeze(1).double()
    scale = truth.new_tensor(learner.scaling.y_std)
    errors = (predictions.double() - truth).abs() * scale
    if query.mask is None:
        return errors.mean(2)
    weights = query.mask[:, None, :, None].double()
    return (errors * weights).sum(2) / weights.sum(2)


def _protocol(data: Any, learner: MetaLearner) -> str:
    count = len(learner.task_losses)
    if not isinstance(data, TaskDataModule):
        return f"{count} test tasks"
    episodes = data.episodes["test"]
    queries = "all other rows" if episodes.queries == "all" else f"{episodes.queries} points"
    return (
        f"{count} test tasks, adapted to {episodes.shots} points each and judged on {queries}; "
        "mean ± 95 % interval over tasks"
    )


def _table(rows: list[_Row], outputs: Sequence[str]) -> Table:
    table = Table()
    table.add_column("inner steps")
    table.add_column("loss", justify="right")
    for output in outputs:
        table.add_column(f"|error| in {output}", justify="right")
    for position, (name, step, loss, errors) in enumerate(rows):
        ends_section = name == "learner" and position + 1 < len(rows) and rows[position + 1][0] != name
        label = str(step) if name == "learner" else name
        table.add_row(label, str(loss), *map(str, errors), end_section=ends_section)
    return table


def _write(file: Path, rows: list[_Row], outputs: Sequence[str]) -> None:
    names = ["loss", *(f"{output}_absolute_error" for output in outputs)]
    header = [
        "predictor",
        "inner_steps",
        *(f"{name}{end}" for name in names for end in ("", "_ci95")),
        "tasks",
        "diverged",
    ]
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        for name, step, loss, errors in rows:
            cells = [value for interval in (loss, *errors) for value in (interval.mean, interval.half_width)]
            writer.writerow([name, step if name == "learner" else "", *cells, loss.count, loss.diverged])
