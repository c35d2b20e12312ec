"""The meta-learner: learns, over tasks, an outer variable from which a few inner steps fit a new task."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from metalit.adapt import Outer, iterates
from metalit.data.base import Split
from metalit.data.given import tasks_of, with_classes
from metalit.data.module import TaskDataModule
from metalit.data.scaling import known
from metalit.data.stream import Fused
from metalit.errors import InputError
from metalit.evaluation.confusion import Confusion, Confusions
from metalit.evaluation.judged import ACCURACY, LEARNER, LOSS, SQUARED, Measure
from metalit.evaluation.report import Report
from metalit.evaluation.task_report import task_report
from metalit.evaluation.task_scores import TaskScores, absolute_errors, accuracies, indices, likelihoods
from metalit.hypergradients.base import Hypergradient
from metalit.hypergradients.direct import Direct
from metalit.hypergradients.tasks import for_each_task
from metalit.inner.base import InnerOptimizer
from metalit.inner.none import NoSteps
from metalit.keys import fold
from metalit.modules.adapting import AdaptingLearner
from metalit.modules.first_task import first_of
from metalit.problem import FewShotProblem, Task

_Asked = Callable[[FewShotProblem, Any, Any, Task], Tensor]  # of the problem, the inner and outer variable, the task


class MetaLearner(AdaptingLearner):
    """Learns to learn: each outer step draws a batch of tasks and descends the mean hypergradient over them.

    φ ← outer optimiser(φ, 1/T Σ_tasks d outer_loss(θ_k(φ)) / dφ)

    Validation and test adapt to every task and log ``loss_step_k``, the mean query loss after k inner steps, for every
    k from 0 (``init`` alone) to ``eval_steps``, for classes ``accuracy_step_k`` too; ``val/loss`` and ``val/accuracy``
    are those after as many steps as are trained. Where predictions have a standard deviation, ``squared_error_step_k``,
    ``nll_step_k`` and ``inside_95_step_k`` follow, the share of points in the 95 % interval. Where a task is drawn
    several times, its mean over the draws counts once.

    Attributes:
        evaluation: what the last evaluation found (:class:`~metalit.evaluation.task_scores.TaskScores`).

    Args:
        problem: what is learned: a few-shot problem, that adapts to a :class:`~metalit.problem.Task`.
        inner_optimizer: how a task is adapted to; none where no inner step is taken, because ``problem.init`` is the
            whole adaptation.
        hypergradient: how the outer variable learns from it, and in how many inner steps; if not given,
            :class:`~metalit.hypergradients.direct.Direct` where ``init`` is the adaptation.
        eval_steps: the inner steps taken in validation, test and prediction; may exceed the trained ones. ``auto`` is
            10, or the trained ones where these are more, or ``init`` is the adaptation.
        compile, fused_steps, tasks_per_chunk, compile_seconds: see
            :class:`~metalit.modules.two_level.TwoLevelLearner`.
        optimizer, scheduler, lr_by_name, clip_norm: see :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: negative ``eval_steps``, or fewer than are trained; inner steps without an inner optimiser; no
            hypergradient for a problem that inner steps adapt.
    """

    shown = ("loss", "accuracy")
    takes = "a TaskDataModule, or loaders of batches of metalit.problem.Task"

    def __init__(
        self,
        problem: FewShotProblem,
        inner_optimizer: InnerOptimizer | None = None,
        hypergradient: Hypergradient | None = None,
        eval_steps: int | Literal["auto"] = "auto",
        compile: bool = False,
        fused_steps: int = 1,
        tasks_per_chunk: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        lr_by_name: dict[str, float] | None = None,
        clip_norm: float | None = None,
        compile_seconds: float = 300.0,
    ) -> None:
        in_init = getattr(problem, "adapts_in_init", False)
        if hypergradient is None:
            if not in_init:
                raise InputError(
                    f"model.hypergradient: {type(problem).__name__} learns through inner steps; name how, such as "
                    "Unrolled"
                )
            hypergradient = Direct()
        super().__init__(
            problem,
            NoSteps() if inner_optimizer is None else inner_optimizer,
            hypergradient,
            compile,
            fused_steps,
            tasks_per_chunk,
            optimizer=optimizer,
            scheduler=scheduler,
            lr_by_name=lr_by_name,
            clip_norm=clip_norm,
            compile_seconds=compile_seconds,
        )
        if eval_steps == "auto":
            eval_steps = hypergradient.steps if in_init or hypergradient.steps > 10 else 10
        if eval_steps < hypergradient.steps:
            raise InputError(
                f"model.eval_steps={eval_steps} must be at least the {hypergradient.steps} inner step(s) that are "
                "trained: val/loss is the loss after those"
            )
        if inner_optimizer is None and (eval_steps or hypergradient.steps):
            raise InputError(
                f"model.inner_optimizer: {hypergradient.steps} inner step(s) are trained and {eval_steps} evaluated; "
                "name what takes them, such as SGD"
            )
        self.save_given()
        self.eval_steps = eval_steps
        self.evaluation = TaskScores(eval_steps)
        self._confusions: Confusions | None = None  # in a test of classes that have names
        self._confusion: Confusion | None = None

    # ---- training

    def training_step(self, tasks: Task | Fused, batch_idx: int) -> None:
        """Take one outer step, or as many as are fused."""
        self.steps_on(self.cast(tasks if isinstance(tasks, Fused) else self._tasks_of(tasks, self.global_step)))

    def on_fit_start(self) -> None:
        """Try the network on a task, before anything is trained.

        Raises:
            InputError: it cannot take the inputs; also what the problem and :class:`OuterLearner` raise.
        """
        super().on_fit_start()
        data = self.trainer.datamodule
        if isinstance(data, TaskDataModule):
            tasks = self.cast(data.loaded("train", torch.arange(2)))
            # in the precision of training, of which an estimator may not be valid
            with self.trainer.precision_plugin.train_step_context():
                with self.told(tasks):
                    self.problem.check(first_of(tasks))
                    self.query_losses(tasks)
                self.check_first_task(tasks)

    def told(self, tasks: Task) -> AbstractContextManager[None]:
        """Tell in one line what is wrong with the user's network, which is tried on tasks."""
        return self.told_at(tasks.support.x[0])

    # ---- evaluation

    def start_evaluation(self) -> None:
        """Collect anew."""
        self.evaluation.start()
        names = None if self.trainer.state.fn == "fit" else self._class_names("test" if self.trainer.testing else "val")
        steps = min(self.prediction_steps, self.eval_steps)
        self._confusions = None if names is None else Confusions(names, steps, self.device)

    def evaluate(self, batch: Any, batch_idx: int, split: Split) -> None:
        """Adapt, and collect what is measured; beside baselines only where it is none of the validations of a fit.

        Beside baselines, where the data has units, each output's mean absolute error in them is collected too.
        """
        loader = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        tasks, data = self._tasks_of(batch, batch_idx), self.trainer.datamodule
        found = {LEARNER: self.measures(tasks)}
        if isinstance(data, TaskDataModule) and self.trainer.state.fn != "fit":
            scaling = known(self.scaling)
            has_units = tasks.query.y.is_floating_point() and scaling.changes
            errors = partial(absolute_errors, tasks.query, data.tasks.columns.y, scaling.y_std)
            if has_units:
                found[LEARNER] |= errors(self.query_predictions(tasks))
            for name, prediction in data.tasks.baselines(tasks).items():
                if tasks.classes is not None:
                    right = accuracies(None, prediction.unsqueeze(1), tasks.query)
                    found |= {} if right is None else {name: {ACCURACY: right}}
                    continue
                judged = SQUARED if self.problem.has_spread else LOSS
                found[name] = {judged: self.judge(prediction, tasks).unsqueeze(1)}
                found[name] |= errors(prediction.unsqueeze(1)) if has_units else {}
        self.evaluation.add(indices(loader, batch_idx), found)

    def measures(self, tasks: Task) -> dict[Measure, Tensor]:
        """What is measured on a batch of tasks, ``[tasks, eval_steps + 1]``: the loss; for classes the accuracy; of
        predictions with a standard deviation the squared error, the likelihood and the share in the 95 % interval.
        """
        classes, spread = not tasks.query.y.is_floating_point(), self.problem.has_spread
        asked = [_loss, *([_prediction] if classes or spread else []), *([_deviation] if spread else [])]
        losses, *answers = self._after_each_step(tasks, *asked)
        found = {LOSS: losses}
        if spread:
            predictions, deviations = answers
            found |= likelihoods(tasks.query, predictions, deviations)
        if classes:
            criterion, outputs = getattr(self.problem, "loss", None), answers[0]
            if tasks.classes is not None:
                # a head may have more outputs than the task has classes
                outputs = outputs[..., : tasks.classes.shape[-1]]
                if self._confusions is not None:
                    self._confusions.add(criterion, outputs, tasks)
            right = accuracies(criterion, outputs, tasks.query)
            found |= {} if right is None else {ACCURACY: right}
        return found

    def evaluated(self, split: Split) -> dict[str, float]:
        """The means after every inner step; of a validation those after as many as are trained, of a test intervals.

        A validation of training remembers after how many steps it is best: the accuracy highest where the data names
        classes, of equal ones the loss lowest; else the loss lowest.
        """
        learner = self.evaluation.finish(self.trainer.datamodule, split)
        self._confusion = None if self._confusions is None else self._confusions.finish()
        found = {measure.name: learner.intervals(measure) for measure in learner.values if measure.logged}
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            right = found.get("accuracy") if self._class_names(split) is not None else None
            losses = {k: interval.mean for k, interval in enumerate(found["loss"]) if math.isfinite(interval.mean)}
            self.best_steps = min(losses, key=lambda k: (-right[k].mean if right else 0.0, losses[k]), default=None)
        trained = self.hypergradient.steps if split == "val" else None
        metrics = {} if trained is None else {name: found[name][trained].mean for name in self.shown if name in found}
        for name, intervals in found.items():
            for k, interval in enumerate(intervals):
                metrics[f"{name}_step_{k}"] = interval.mean
                if split == "test":
                    metrics[f"{name}_step_{k}_ci95"] = interval.half_width
        return metrics

    def report(self, split: Split) -> Report:
        """The errors after each number of inner steps, beside baselines."""
        data = self.trainer.datamodule
        data = data if isinstance(data, TaskDataModule) else None
        return task_report(self.evaluation.judged, split, data, self._confusion)

    def query_losses(self, tasks: Task) -> Tensor:
        """The query loss of each task after 0 … ``eval_steps`` inner steps, ``[tasks, eval_steps + 1]``."""
        (losses,) = self._after_each_step(tasks, _loss)
        return losses

    def query_predictions(self, tasks: Task) -> Tensor:
        """Normalised predictions after 0 … ``eval_steps`` steps, ``[tasks, eval_steps + 1, queries, outputs]``."""
        (predictions,) = self._after_each_step(tasks, _prediction)
        return predictions

    def query_deviations(self, tasks: Task) -> Tensor | None:
        """Their standard deviations, of the same shape; None where the problem knows none."""
        return self._after_each_step(tasks, _deviation)[0] if self.problem.has_spread else None

    def _after_each_step(self, tasks: Task, *asked: _Asked) -> tuple[Tensor, ...]:
        """What is asked of each task after 0 … ``eval_steps`` steps; all of it of one adaptation."""
        scaled = self.scaled_problem(self.stepper.scale)

        def one(outer: Outer, task: Task) -> tuple[Tensor, ...]:
            path = iterates(scaled, self.inner_optimizer, outer, task, self.eval_steps)
            each = [
                [find(self.problem.after(steps), inner, outer["problem"], task) for find in asked]
                for steps, inner in enumerate(path)
            ]
            return tuple(torch.stack(values) for values in zip(*each, strict=True))

        return for_each_task(one, self.constants(), self.cast(tasks), self.problem)

    def judge(self, predictions: Tensor, tasks: Task) -> Tensor:
        """The mean query loss of anybody's ``[tasks, queries, outputs]`` predictions, ``[tasks]``."""
        pairs = (self.cast(predictions), self.cast(tasks.query))
        return for_each_task(lambda _, pair: self.problem.judge(*pair), self.constants(), pairs, self.problem)

    # ---- helpers

    @property
    def task_losses(self) -> Tensor:
        """The query losses of all draws of the last evaluation, ``[draws, eval_steps + 1]``."""
        return self.evaluation.losses

    def _class_names(self, split: Split) -> Sequence[str] | None:
        data = self.trainer.datamodule
        return data.tasks.class_names(split) if isinstance(data, TaskDataModule) else None

    def _tasks_of(self, batch: Any, number: int) -> Task:
        """A batch as tasks; those of loaders of the user's draw from a key of (batch, rank)."""
        if isinstance(self.trainer.datamodule, TaskDataModule):
            return batch
        tasks = tasks_of(batch, fold(torch.tensor(0, device=self.device), number, self.global_rank))
        return with_classes(tasks) if self.problem.needs_classes else tasks


def _loss(problem: FewShotProblem, inner: Any, outer: Any, task: Task) -> Tensor:
    return problem.outer_loss(inner, outer, task)


def _prediction(problem: FewShotProblem, inner: Any, outer: Any, task: Task) -> Tensor:
    return problem.predict(inner, outer, task.query.x)


def _deviation(problem: FewShotProblem, inner: Any, outer: Any, task: Task) -> Tensor:
    return cast(Tensor, problem.spread(inner, outer, task.query.x))
