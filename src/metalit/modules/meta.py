"""The meta-learner: learns, over tasks, an outer variable from which a few inner steps fit a new task."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from metalit.adapt import Outer, adapt, iterates
from metalit.autodiff.blame import told
from metalit.data.base import Split
from metalit.data.given import tasks_of
from metalit.data.module import TaskDataModule, UserTask
from metalit.data.scaling import Scaling
from metalit.data.stream import Fused
from metalit.errors import InputError
from metalit.evaluation.judged import ACCURACY, LEARNER, LOSS, Measure
from metalit.evaluation.report import Report
from metalit.evaluation.task_report import task_report
from metalit.evaluation.task_scores import TaskScores, absolute_errors, accuracies, indices
from metalit.hypergradients.base import Hypergradient
from metalit.hypergradients.tasks import for_each_task
from metalit.inner.base import InnerOptimizer
from metalit.keys import fold
from metalit.modules.adapted import Adapted, check_points
from metalit.modules.two_level import TwoLevelLearner
from metalit.notices import warn
from metalit.problem import FewShotProblem, Points, Task


class MetaLearner(TwoLevelLearner):
    """Learns to learn: each outer step draws a batch of tasks and descends the mean hypergradient over them.

    φ ← outer optimiser(φ, 1/T Σ_tasks d outer_loss(θ_k(φ)) / dφ)

    Validation and test adapt to every task and log ``loss_step_k``, the mean query loss after k inner steps, for every
    k from 0 (before adaptation) to ``eval_steps``, for classes ``accuracy_step_k`` too; ``val/loss`` is the loss after
    as many steps as are trained. Where a task is drawn several times, its mean over the draws counts once.

    Attributes:
        evaluation: what the last evaluation found (:class:`~metalit.evaluation.task_scores.TaskScores`).

    Args:
        problem: what is learned: a few-shot problem, that adapts to a :class:`~metalit.problem.Task`.
        inner_optimizer: how a task is adapted to.
        hypergradient: how the outer variable learns from it, and in how many inner steps.
        eval_steps: the inner steps taken in validation, test and prediction; may exceed the trained ones.
        compile, fused_steps, tasks_per_chunk, compile_seconds: see
            :class:`~metalit.modules.two_level.TwoLevelLearner`.
        optimizer, scheduler, lr_by_name, clip_norm: see :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: negative ``eval_steps``, or fewer than are trained.
    """

    takes = "a TaskDataModule, or loaders of batches of metalit.problem.Task"

    def __init__(
        self,
        problem: FewShotProblem,
        inner_optimizer: InnerOptimizer,
        hypergradient: Hypergradient,
        eval_steps: int = 10,
        compile: bool = False,
        fused_steps: int = 1,
        tasks_per_chunk: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        lr_by_name: dict[str, float] | None = None,
        clip_norm: float | None = None,
        compile_seconds: float = 300.0,
    ) -> None:
        super().__init__(
            problem,
            inner_optimizer,
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
        if eval_steps < hypergradient.steps:
            raise InputError(
                f"model.eval_steps={eval_steps} must be at least the {hypergradient.steps} inner step(s) that are "
                "trained: val/loss is the loss after those"
            )
        self.save_given()
        self.eval_steps = eval_steps
        self.scaling: Scaling | None = None
        self._fitted_worse: list[str] = []
        self.evaluation = TaskScores(eval_steps)
        self.asked_steps: int | None = None
        self._best_steps: int | None = None

    # ---- training

    def setup(self, stage: str) -> None:
        """Take over the data's normalisation, which belongs to what is learned."""
        super().setup(stage)
        if stage == "fit":
            self._best_steps = None
        source = getattr(self.trainer.datamodule, "tasks", None)
        if stage != "predict" and source is not None:
            self.scaling = source.scaling()

    def training_step(self, tasks: Task, batch_idx: int) -> None:
        """Take one outer step, or as many as are fused."""
        self.steps_on(self.cast(self._tasks_of(tasks, self.global_step)))

    def on_fit_start(self) -> None:
        """Try the network on a task, before anything is trained.

        Raises:
            InputError: it cannot take the inputs; also what the problem and :class:`OuterLearner` raise.
        """
        super().on_fit_start()
        data = self.trainer.datamodule
        if isinstance(data, TaskDataModule):
            tasks = self.cast(data.draw("train", torch.arange(2)))
            with self.told(tasks):
                self.query_losses(tasks)
            self.check_first_task(tasks)

    def told(self, tasks: Task) -> AbstractContextManager[None]:
        """Tell in one line what is wrong with the user's network, which is tried on tasks."""
        return self.told_at(tasks.support.x[0])

    def told_at(self, x: Tensor) -> AbstractContextManager[None]:
        """Tell it likewise of a network that is tried on the rows ``x``."""
        network = getattr(self.problem, "network", None)
        return super().told(x) if network is None else told("model.problem.network", network, x)

    # ---- evaluation

    def start_evaluation(self) -> None:
        """Collect anew."""
        self.evaluation.start()

    def evaluate(self, batch: Any, batch_idx: int, split: Split) -> None:
        """Adapt, and collect the query losses; beside baselines only where it is none of the many validations of a fit.

        Where the data has units, each output's mean absolute error in them is collected beside the loss.
        """
        loader = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        tasks, data = self._tasks_of(batch, batch_idx), self.trainer.datamodule
        found = {LEARNER: {LOSS: self.query_losses(tasks)}}
        compares = isinstance(data, TaskDataModule) and self.trainer.state.fn != "fit"
        units = compares and data.tasks.scaling().changes

        def errors(predictions: Tensor) -> dict[Measure, Tensor]:
            return absolute_errors(predictions, tasks.query, data.tasks.columns.y, self.scaling.y_std)

        if not tasks.query.y.is_floating_point():
            units = False
            right = accuracies(getattr(self.problem, "loss", None), self.query_predictions(tasks), tasks.query)
            found[LEARNER] |= {} if right is None else {ACCURACY: right}
        elif units:
            found[LEARNER] |= errors(self.query_predictions(tasks))
        for name, prediction in data.tasks.baselines(tasks).items() if compares else ():
            found[name] = {LOSS: self.judge(prediction, tasks).unsqueeze(1)}
            found[name] |= errors(prediction.unsqueeze(1)) if units else {}
        self.evaluation.add(indices(loader, batch_idx), found)

    def evaluated(self, split: Split) -> dict[str, float]:
        """The means after every inner step; of a validation the loss after as many as are trained, of a test intervals.

        A validation of training remembers after how many steps the loss is lowest.
        """
        learner = self.evaluation.finish(self.trainer.datamodule, split)
        found = {measure.name: learner.intervals(measure) for measure in (LOSS, ACCURACY) if measure in learner.values}
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            losses = {k: interval.mean for k, interval in enumerate(found["loss"]) if math.isfinite(interval.mean)}
            self._best_steps = min(losses, key=losses.get, default=None)
        metrics = {"loss": found["loss"][self.hypergradient.steps].mean} if split == "val" else {}
        for name, intervals in found.items():
            for k, interval in enumerate(intervals):
                metrics[f"{name}_step_{k}"] = interval.mean
                if split == "test":
                    metrics[f"{name}_step_{k}_ci95"] = interval.half_width
        return metrics

    def report(self, split: Split) -> Report:
        """The errors after each number of inner steps, beside baselines."""
        data = self.trainer.datamodule
        return task_report(self.evaluation.judged, split, data if isinstance(data, TaskDataModule) else None)

    def on_predict_start(self) -> None:
        """Tell of points that lie far from what was trained on."""
        data, self._fitted_worse = self.trainer.datamodule, []
        if isinstance(data, TaskDataModule) and self.scaling and self.scaling.x_min:
            names = (data.tasks.inputs, data.tasks.columns.y)
            far = self.scaling.outside(torch.tensor(data.asked.x), torch.tensor(data.asked.y), *names)
            if far:
                warn(f"data.predict_file={data.predict_file!r} lies far outside of the training data: {far}")

    def on_predict_end(self) -> None:
        """Tell of tasks that adapting does not fit."""
        worse = self._fitted_worse
        if worse:
            warn(
                f"predict: {len(worse)} task(s), first {worse[0]!r}, are fitted worse at their own support points "
                "after adapting than before; see that x and y are in the units of the training data, or take fewer "
                "inner steps (model.eval_steps)"
            )

    def predict_step(self, task: UserTask, batch_idx: int) -> tuple[str, Tensor, Tensor]:
        """Adapt to a task of the user's: its name, the predictions at its rows, and those at the grid.

        Raises:
            InputError: a batch of another kind.
        """
        if not isinstance(task, UserTask):
            raise InputError(
                f"data: predict adapts to the points of a file, TaskDataModule's predict_file, and got a "
                f"{type(task).__name__}; adapt(x, y) adapts to tensors"
            )
        adapted, before = (self._adapt(task.support_x, task.support_y, steps) for steps in (self.prediction_steps, 0))
        if not adapted.loss(task.support_x, task.support_y) <= before.loss(task.support_x, task.support_y):
            self._fitted_worse.append(task.name)
        return task.name, adapted(task.x), adapted(task.grid)

    def query_losses(self, tasks: Task) -> Tensor:
        """The query loss of each task after 0 … ``eval_steps`` inner steps, ``[tasks, eval_steps + 1]``."""

        scaled = self.scaled_problem(self.stepper.scale)

        def one(outer: Outer, task: Task) -> Tensor:
            path = iterates(scaled, self.inner_optimizer, outer, task, self.eval_steps)
            return torch.stack([self.problem.outer_loss(inner, outer["problem"], task) for inner in path])

        return self._each(one, tasks)

    def query_predictions(self, tasks: Task) -> Tensor:
        """Normalised predictions after 0 … ``eval_steps`` steps, ``[tasks, eval_steps + 1, queries, outputs]``."""

        scaled = self.scaled_problem(self.stepper.scale)

        def one(outer: Outer, task: Task) -> Tensor:
            path = iterates(scaled, self.inner_optimizer, outer, task, self.eval_steps)
            return torch.stack([self.problem.predict(inner, outer["problem"], task.query.x) for inner in path])

        return self._each(one, tasks)

    def judge(self, predictions: Tensor, tasks: Task) -> Tensor:
        """The mean query loss of anybody's ``[tasks, queries, outputs]`` predictions, ``[tasks]``."""
        pairs = (self.cast(predictions), self.cast(tasks.query))
        return for_each_task(lambda _, pair: self.problem.judge(*pair), self.constants(), pairs, self.problem)

    # ---- use

    @property
    def prediction_steps(self) -> int:
        """The inner steps of :meth:`adapt`: ``asked_steps``, if set; else as many as the last validation of training
        found best, and without one, as many as are trained.
        """
        found = (self.asked_steps, self._best_steps, self.hypergradient.steps)
        return next(steps for steps in found if steps is not None)

    @property
    def why_so_many_steps(self) -> str:
        """Where :attr:`prediction_steps` comes from, in words."""
        if self.asked_steps is not None:
            return "as asked"
        return "as trained: there was no validation" if self._best_steps is None else "the best number in validation"

    def adapt(self, x: Tensor, y: Tensor, steps: int | None = None) -> Adapted:
        """Adapt what was learned to a few points of a new task.

        Args:
            x: ``[shots, inputs]``, in the units of the data that was trained on; ``[shots, ...]`` where it has none.
            y: ``[shots, outputs]``, likewise, or ``[shots]`` classes.
            steps: the number of inner steps; :attr:`prediction_steps` if not given.

        Returns:
            A function from ``[rows, inputs]`` to ``[rows, outputs]``, in the same units.

        Raises:
            InputError: tensors of other shapes, no point, or values that are not finite.
        """
        adapted = self._adapt(x, y, self.prediction_steps if steps is None else steps)
        if self.scaling and self.scaling.x_min:
            names = ([f"{name}[:, {column}]" for column in range(v.shape[1])] for name, v in (("x", x), ("y", y)))
            far = self.scaling.outside(x, y, *names)
            if far:
                warn(f"adapt: the points lie far outside of the training data: {far}")
        return adapted

    def _adapt(self, x: Tensor, y: Tensor, steps: int) -> Adapted:
        check_points("x", x, self.scaling and self.scaling.x_mean)
        check_points("y", y, self.scaling and self.scaling.y_mean)
        if len(x) != len(y) or len(x) == 0:
            raise InputError(
                f"adapt: x has {len(x)} points and y has {len(y)}; give one y for each x, and one at least"
            )
        if steps < 0:
            raise InputError(f"adapt: steps={steps} must not be negative")
        support = self.cast(Points(self.normalise_x(x), self.normalise_y(y)))
        task = Task(support, support, torch.tensor(0, device=self.device))
        with torch.inference_mode(False), torch.no_grad(), self.evaluating(), self.told_at(support.x):
            inner = adapt(self.scaled_problem(self.stepper.scale), self.inner_optimizer, self.constants(), task, steps)
        return Adapted(self, inner)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the normalisation with the weights, and the best number of inner steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_steps"] = self._best_steps
        checkpoint["scaling"] = self.scaling.state() if self.scaling else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check network and normalisation.

        Raises:
            InputError: the checkpoint is of another network, or was trained on data of another scaling.
        """
        super().on_load_checkpoint(checkpoint)
        if "scaling" not in checkpoint:
            raise InputError("ckpt_path: the checkpoint is of another kind of learner: it holds no scaling of its data")
        self._best_steps = checkpoint.get("best_steps")
        kept = checkpoint["scaling"]
        if self.scaling is not None and not (kept and self.scaling.agrees(kept)):
            raise InputError(
                f"ckpt_path: the checkpoint was trained on data with the scaling {kept}, and the present data has "
                f"{self.scaling.state()}; give the table and the split that it was trained on"
            )
        try:
            self.scaling = Scaling(**kept) if kept else None
        except TypeError:
            raise InputError(f"ckpt_path: the checkpoint's scaling {kept} is none; use another checkpoint") from None

    # ---- helpers

    @property
    def task_losses(self) -> Tensor:
        """The query losses of all draws of the last evaluation, ``[draws, eval_steps + 1]``."""
        return self.evaluation.losses

    def _tasks_of(self, batch: Any, number: int) -> Task | Fused:
        """A batch as tasks; those of loaders of the user's draw from a key of (batch, rank)."""
        if isinstance(batch, Fused) or isinstance(self.trainer.datamodule, TaskDataModule):
            return batch
        return tasks_of(batch, fold(torch.tensor(0, device=self.device), number, self.global_rank))

    def _each(self, one: Any, tasks: Task) -> Tensor:
        return for_each_task(one, self.constants(), self.cast(tasks), self.problem)

    def normalise_x(self, x: Tensor) -> Tensor:
        """From the user's units, ``[..., inputs]``; unchanged where the data had none."""
        return self.scaling.normalise_x(x) if self.scaling else x

    def normalise_y(self, y: Tensor) -> Tensor:
        """From the user's units, ``[..., outputs]``, likewise."""
        return self.scaling.normalise_y(y) if self.scaling else y
