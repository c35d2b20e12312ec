"""What is learned, adapted to points of the user's: a function in the user's units."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from metalit.adapt import adapt
from metalit.autodiff.blame import as_input_error
from metalit.data.module import TaskDataModule, UserTask
from metalit.data.scaling import Scaling
from metalit.errors import InputError
from metalit.evaluation.judged import Z95
from metalit.modules.two_level import TwoLevelLearner
from metalit.notices import warn
from metalit.problem import FewShotProblem, Points, Task
from metalit.tree import Tree


@dataclass(frozen=True)
class Adapted:
    """A network adapted to one task: call it with inputs in the user's units.

    Attributes:
        learner: where it comes from.
        inner: the adapted parameters by name.
        steps: after how many inner steps.
    """

    learner: "AdaptingLearner"
    inner: Tree
    steps: int

    def __call__(self, x: Tensor) -> Tensor:
        """Predict at ``[rows, inputs]``; returns ``[rows, outputs]``.

        Raises:
            InputError: inputs of another shape, or that are not finite.
        """
        prediction = self._at(x, self._predict)
        return self.learner.scaling.restore_y(prediction) if self.learner.scaling else prediction

    def spread(self, x: Tensor) -> Tensor:
        """The standard deviation of each prediction at ``[rows, inputs]``, noise included: ``[rows, outputs]``.

        Raises:
            InputError: the problem knows none; what a prediction raises.
        """
        if not self.has_spread:
            name = type(self.learner.problem).__name__
            raise InputError(f"spread: {name} predicts no standard deviation; BayesianHead and NeuralProcess do")
        deviation = self._at(x, self._spread)
        return self.learner.scaling.restore_deviation(deviation) if self.learner.scaling else deviation

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the 95 % interval of a new point at each of ``[rows, inputs]``."""
        mean, margin = self(x), Z95 * self.spread(x)
        return mean - margin, mean + margin

    @property
    def has_spread(self) -> bool:
        """Whether predictions have a standard deviation."""
        return self.learner.problem.has_spread

    def loss(self, x: Tensor, y: Tensor) -> float:
        """The mean loss at points of the task, in normalised units."""
        learner = self.learner
        points = learner.cast(Points(learner.normalise_x(x), learner.normalise_y(y)))
        with torch.no_grad(), learner.evaluating():
            return float(learner.problem.judge(self._predict(points.x), points))

    def _at(self, x: Tensor, found: Callable[[Tensor], Tensor]) -> Tensor:
        learner = self.learner
        check_points("x", x, learner.scaling.x_mean if learner.scaling else None)
        with torch.no_grad(), learner.evaluating():
            inputs = learner.cast(learner.normalise_x(x))
            with learner.told_at(inputs):
                return found(inputs)

    def _predict(self, x: Tensor) -> Tensor:
        problem, outer = self.learner.problem.after(self.steps), self.learner.constants()["problem"]
        return problem.predict(self.inner, outer, x)

    def _spread(self, x: Tensor) -> Tensor:
        problem, outer = self.learner.problem.after(self.steps), self.learner.constants()["problem"]
        return cast(Tensor, problem.spread(self.inner, outer, x))


class AdaptingLearner(TwoLevelLearner):
    """A learner over tasks that adapts to the points of new ones, which are in the units of its data.

    Attributes:
        scaling: how the data was normalised, None if it is not known; it belongs to what is learned.
        asked_steps: how many inner steps :meth:`adapt` takes; None to leave it to the validation.
        best_steps: after how many the last validation of training was best.
    """

    problem: FewShotProblem

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scaling: Scaling | None = None
        self.asked_steps: int | None = None
        self.best_steps: int | None = None
        self._fitted_worse: list[str] = []

    def setup(self, stage: str) -> None:
        """Take over the data's normalisation, which belongs to what is learned."""
        super().setup(stage)
        if stage == "fit":
            self.best_steps = None
        source = getattr(self.trainer.datamodule, "tasks", None)
        if stage != "predict" and source is not None:
            self.scaling = source.scaling()

    @property
    def prediction_steps(self) -> int:
        """The inner steps of :meth:`adapt`: ``asked_steps``, if set; else as many as the last validation of training
        found best, and without one, as many as are trained.
        """
        found = (self.asked_steps, self.best_steps, self.hypergradient.steps)
        return next(steps for steps in found if steps is not None)

    @property
    def why_so_many_steps(self) -> str:
        """Where :attr:`prediction_steps` comes from, in words."""
        if self.prediction_steps == 0 and self.problem.adapts_in_init:
            return f"{type(self.problem).__name__} adapts without"
        if self.asked_steps is not None:
            return "as asked"
        return "as trained: there was no validation" if self.best_steps is None else "the best number in validation"

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
        check_points("x", x, self.scaling.x_mean if self.scaling else None)
        check_points("y", y, self.scaling.y_mean if self.scaling else None)
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
        return Adapted(self, inner, steps)

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

    def predict_step(self, task: UserTask, batch_idx: int) -> tuple[Any, ...]:
        """Adapt to a task of the user's: its name, the predictions at its rows, and those at the grid.

        Where they have a standard deviation, the 95 % intervals follow at the rows and at the grid: ``(lower, upper)``.

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
        found = task.name, adapted(task.x), adapted(task.grid)
        return (*found, adapted.interval(task.x), adapted.interval(task.grid)) if adapted.has_spread else found

    def told_at(self, x: Tensor) -> AbstractContextManager[None]:
        """Tell it likewise of a network that is tried on the rows ``x``."""
        network = getattr(self.problem, "network", None)
        return super().told(x) if network is None else as_input_error("model.problem.network", network, x)

    def normalise_x(self, x: Tensor) -> Tensor:
        """From the user's units, ``[..., inputs]``; unchanged where the data had none."""
        return self.scaling.normalise_x(x) if self.scaling else x

    def normalise_y(self, y: Tensor) -> Tensor:
        """From the user's units, ``[..., outputs]``, likewise."""
        return self.scaling.normalise_y(y) if self.scaling else y

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the normalisation with the weights, and the best number of inner steps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_steps"] = self.best_steps
        checkpoint["scaling"] = self.scaling.state() if self.scaling else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check network and normalisation.

        Raises:
            InputError: the checkpoint is of another network, or was trained on data of another scaling.
        """
        super().on_load_checkpoint(checkpoint)
        if "scaling" not in checkpoint:
            raise InputError("ckpt_path: the checkpoint is of another kind of learner: it holds no scaling of its data")
        self.best_steps = checkpoint.get("best_steps")
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


def check_points(name: str, value: Tensor, columns: Sequence[float] | None) -> None:
    """Raise an :class:`InputError` unless ``value`` is ``[points, columns]`` and finite.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        columns: a sequence with one entry for each column; without one, points may be of any shape, or classes.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"adapt: {name} is of type {type(value).__name__}; give a tensor, torch.as_tensor(...)")
    known = len(columns) if columns is not None else None
    least = 2 if value.is_floating_point() else 1  # [points] may be classes
    if value.dim() < least or (known and (value.dim() != 2 or known != value.shape[1])):
        raise InputError(
            f"adapt: {name} has shape {tuple(value.shape)}; it must be [points, {known or 'columns'}] "
            "(a single column: value.unsqueeze(-1))"
        )
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"adapt: {name} holds values that are not finite; leave those points out")
