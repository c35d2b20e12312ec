"""The table of errors, beside predictors that learned nothing from other tasks."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics.aggregation import CatMetric

from metalit.callbacks.drawing import Sketching, pixels, save_picture
from metalit.callbacks.errors import draw_errors
from metalit.callbacks.screen import show, table
from metalit.callbacks.tensorboard import tensorboards, write_table
from metalit.data.base import Split
from metalit.data.module import TaskDataModule
from metalit.evaluation.interval import mean_with_interval
from metalit.evaluation.judged import LEARNER, LOSS, Judged, Measure, draws_of, means_frame, tasks_frame
from metalit.modules.meta import MetaLearner
from metalit.problem import Points, Task
from metalit.runs import run_folder


class Report(Callback):
    """Prints the errors after each number of inner steps with 95 % intervals, and writes ``test.csv`` (``val.csv``).

    It does so after ``test`` and ``validate`` of a meta-learner, not for the validations of a fit. ``test_tasks.csv``
    (``val_tasks.csv``) has the errors task by task.

    Where the data has units, each output's mean absolute error in them stands beside the loss, for classes the
    accuracy. The distribution's baselines are judged on the same query points.
    """

    def __init__(self) -> None:
        self._losses: dict[str, CatMetric] = {}
        self._errors: dict[str, CatMetric] = {}
        self._sketching = Sketching("the picture of the errors")

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
        if data.tasks.scaling().changes and tasks.query.y.is_floating_point():
            _collect(self._errors, LEARNER, _absolute_errors(learner, learner.query_predictions(tasks), tasks.query))
            for name, prediction in baselines.items():
                _collect(self._errors, name, _absolute_errors(learner, prediction.unsqueeze(1), tasks.query))

    def _report(self, trainer: Trainer, learner: MetaLearner, split: Split) -> None:
        if not isinstance(learner, MetaLearner):
            return
        data, found = trainer.datamodule, learner.evaluation
        outputs = data.tasks.columns.y if self._errors else []
        measures = {LEARNER: {_MEASURES[name]: values for name, values in found.measures().items()}}
        # reshaped, because torchmetrics squeezes a single value
        measures |= {name: {LOSS: metric.compute().reshape(-1, 1)} for name, metric in self._losses.items()}
        for name, metric in self._errors.items():
            errors = metric.compute().reshape(*measures[name][LOSS].shape, -1)
            measures[name] |= {_absolute(output): errors[..., place] for place, output in enumerate(outputs)}
        judged = [Judged(name, values, found.tasks) for name, values in measures.items()]
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        if folder:
            means_frame(judged).to_csv(folder / f"{split}.csv", index=False)
            source = data.tasks if isinstance(data, TaskDataModule) else None
            tasks_frame(judged, source, split).to_csv(folder / f"{split}_tasks.csv", index=False)
        lines = [_protocol(data, found.tasks, split), *(_comparison(judged[0], baseline) for baseline in judged[1:])]
        headings, *rows = _cells(judged)
        with self._sketching():
            picture = pixels(draw_errors(judged))
            if folder:
                save_picture(picture, folder / "figures" / f"{split}_errors.png")
            for logger in tensorboards(trainer):
                logger.experiment.add_image(f"pictures/errors_{split}", picture, learner.outer_step, dataformats="HWC")
                write_table(logger, f"errors/{split}", headings, [*rows[0], *rows[1]], learner.outer_step, lines)
        show([lines[0], table(headings, *rows), *lines[1:]])


_MEASURES = {"loss": LOSS, "accuracy": Measure("accuracy", "accuracy")}


def _absolute(output: str) -> Measure:
    return Measure(f"{output}_absolute_error", f"|error| in {output}")


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


def _protocol(data: Any, tasks: Tensor, split: Split) -> str:
    count, draws = draws_of(tasks)
    over = "over tasks, of which each counts once" if draws else "over tasks"
    sizes = ""
    if isinstance(data, TaskDataModule):
        episodes = data.episodes[split]
        queries = "all other rows" if episodes.queries == "all" else f"{episodes.queries} points"
        sizes = f", adapted to {episodes.shots} points each and judged on {queries}"
    return f"{count} {split} tasks{draws}{sizes}; mean ± 95 % interval {over}"


def _cells(judged: Sequence[Judged]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Of the table: its headings, the learner's rows, the baselines' rows."""
    learner, *baselines = (
        [[predictor.label(step), *map(str, intervals)] for step, intervals in enumerate(predictor.means())]
        for predictor in judged
    )
    headings = [measure.heading for measure in judged[0].values]
    return ["inner steps", *headings], learner, [row for rows in baselines for row in rows]


def _comparison(learner: Judged, baseline: Judged) -> str:
    """Both saw the same tasks: task by task, their difference is far surer than the two means are."""
    measure = next((measure for measure in baseline.values if measure != LOSS), LOSS)
    difference = baseline.values[measure][:, -1] - learner.values[measure][:, -1]
    steps = learner.values[LOSS].shape[1] - 1
    interval = mean_with_interval(difference, learner.tasks)
    return f"{baseline.name}: {measure.heading} less the learner's after {steps} inner steps, task by task: {interval}"
