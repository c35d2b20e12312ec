"""What adapts to points of the user's: of a new task, or of classes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from metalit.adapt import adapt
from metalit.autodiff.blame import as_input_error
from metalit.data.base import Split
from metalit.data.classes.asked import AskedClasses
from metalit.data.module import TaskDataModule, UserTask
from metalit.data.scaling import Scaling
from metalit.data.table import Asked
from metalit.errors import InputError
from metalit.modules.adapted import Adapted, check_lengths, check_points
from metalit.modules.adapted_classes import (
    AdaptedClasses,
    Label,
    NamedClasses,
    are_classes,
    check_outputs,
    inputs_of,
    labels_of,
    tell_of_units,
)
from metalit.modules.two_level import TwoLevelLearner
from metalit.notices import warn
from metalit.private_lightning import trainer_of
from metalit.problem import FewShotProblem, Points, Task


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
        """Take over the data's normalisation, which belongs to what is learned; what was learned keeps its own.

        Raises:
            InputError: it was learned from data of another scaling.
        """
        super().setup(stage)
        if stage == "fit":
            self.best_steps = None
        if stage == "fit" or self.trainer.ckpt_path is not None:
            self.scaling = None  # what is learned or loaded brings its own
        self._agree_with_the_data()

    def _agree_with_the_data(self) -> None:
        """Normalise one as the other: the learner as data that is trained on, else the data as the learner.

        For prediction nothing of the data need be there.
        """
        trainer = trainer_of(self)
        data = getattr(trainer, "datamodule", None)
        if trainer is None or trainer.predicting or not isinstance(data, TaskDataModule):
            return
        present = data.tasks.scaling()
        if self.scaling is None:
            self.scaling = present
            return
        trained = _shape_of(self.scaling)
        shape = _shape_of(present) if present else list(data.tasks.input_shape())
        if shape != trained:
            raise InputError(
                f"data.tasks: the learner was trained on inputs of shape {trained}, and those of the present data are "
                f"{shape}; give the size and the channels that it was trained with"
            )
        if present is None:
            data.tasks.take_scaling(self.scaling)
            self._tell_of_units(data)
        else:
            _check_scaling(present, self.scaling)

    def _tell_of_units(self, data: TaskDataModule) -> None:
        """Warn of data that the learner was not trained on, and that is in other units."""
        assert self.scaling is not None
        split: Split = "val" if data.tasks.count("test") == 0 else "test"
        points = data.loaded(split, torch.arange(data.tasks.count(split) or 1)).support
        x = self.scaling.restore_x(points.x).flatten(0, 1)
        if data.tasks.of_classes:
            tell_of_units(x, self.scaling, "data.tasks")
            return
        y = self.scaling.restore_y(points.y).flatten(0, 1)
        far = self.scaling.outside(x, y, data.tasks.inputs, data.tasks.columns.y)
        if far:
            warn(f"data.tasks lie far outside of what the learner was trained on: {far}")

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

    def adapt(
        self, x: Tensor | np.ndarray, y: Tensor | np.ndarray | Sequence[Label], steps: int | None = None
    ) -> Adapted | AdaptedClasses:
        """Adapt what was learned to a few points of a new task.

        Args:
            x: ``[shots, inputs]``, in the units of the data that was trained on; ``[rows, channels, height, width]`` of
                images; ``[shots, ...]`` where the data has no units.
            y: ``[shots, outputs]``, likewise; or the ``[shots]`` classes, whole numbers or names, as a list, an array
                or a tensor.
            steps: the number of inner steps; :attr:`prediction_steps` if not given.

        Returns:
            A function from ``[rows, inputs]`` to ``[rows, outputs]``, in the same units; for classes to the
            probability of each class by its name (:class:`~metalit.modules.adapted_classes.ClassScores`).

        Raises:
            InputError: tensors of other shapes, no point, or values that are not finite; a single class, or more
                classes than what is learned has outputs for.
        """
        steps = self.prediction_steps if steps is None else steps
        if are_classes(y) or self.problem.needs_classes or (self.scaling and self.scaling.x_shape):
            adapted = self.adapt_to_classes(x, y, steps)
            tell_of_units(x, self.scaling)
            return adapted
        points = self._adapt(cast(Tensor, x), cast(Tensor, y), steps)
        if self.scaling and self.scaling.x_min:
            given = (("x", cast(Tensor, x)), ("y", cast(Tensor, y)))
            names = ([f"{name}[:, {column}]" for column in range(v.shape[1])] for name, v in given)
            far = self.scaling.outside(given[0][1], given[1][1], *names)
            if far:
                warn(f"adapt: the points lie far outside of the training data: {far}")
        return points

    def adapt_to_classes(self, x: Any, y: Any, steps: int, owner: str = "adapt") -> AdaptedClasses:
        """Do so where y are classes; ``owner`` names them in messages."""
        names, numbers = labels_of(y, self.scaling, owner)
        rows = inputs_of("x", x, self.scaling, owner)
        check_lengths(rows, numbers)
        support = self.cast(Points(self.normalise_x(rows), numbers))
        classes = torch.arange(len(names), device=self.device)
        task = Task(support, support, torch.tensor(0, device=self.device), classes)
        before = self._adapted_to(task, 0)
        check_outputs(before.outputs(rows).shape[1], len(names), getattr(self.problem, "loss", None), owner)
        return AdaptedClasses(self._adapted_to(task, steps) if steps else before, names)

    def _adapt(self, x: Tensor, y: Tensor, steps: int) -> Adapted:
        check_points("x", x, self.scaling.x_mean if self.scaling else None)
        check_points("y", y, self.scaling.y_mean if self.scaling else None)
        check_lengths(x, y)
        support = self.cast(Points(self.normalise_x(x), self.normalise_y(y)))
        return self._adapted_to(Task(support, support, torch.tensor(0, device=self.device)), steps)

    def _adapted_to(self, task: Task, steps: int) -> Adapted:
        if steps < 0:
            raise InputError(f"adapt: steps={steps} must not be negative")
        with torch.inference_mode(False), torch.no_grad(), self.evaluating(), self.told_at(task.support.x):
            inner = adapt(self.scaled_problem(self.stepper.scale), self.inner_optimizer, self.constants(), task, steps)
        return Adapted(self, inner, steps)

    def on_predict_start(self) -> None:
        """Tell of points that lie far from what was trained on."""
        data, self._fitted_worse = self.trainer.datamodule, []
        asked = isinstance(data, TaskDataModule) and isinstance(data.asked, Asked)
        if asked and self.scaling and self.scaling.x_min:
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

    def predict_step(self, task: UserTask | AskedClasses, batch_idx: int) -> Any:
        """Adapt to a task of the user's: its name, the predictions at its rows, and those at the grid.

        Where they have a standard deviation, the 95 % intervals follow at the rows and at the grid: ``(lower, upper)``.
        Of classes, return a :class:`~metalit.modules.adapted_classes.NamedClasses`.

        Raises:
            InputError: a batch of another kind.
        """
        if isinstance(task, AskedClasses):
            return self._named(task)
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

    def _named(self, task: AskedClasses) -> NamedClasses:
        scaling, owner = self.scaling, task.owner
        if scaling is None:
            raise InputError(f"{owner}: the checkpoint does not know the units of its data; adapt(x, y) takes tensors")
        examples, asked = task.values([*scaling.x_shape] or [len(scaling.x_mean)])
        tell_of_units(examples, scaling, owner)
        before, after = (
            self.adapt_to_classes(examples, task.labels, steps, owner) for steps in (0, self.prediction_steps)
        )
        if not after.loss(examples, task.labels) <= before.loss(examples, task.labels):
            self._fitted_worse.append(task.source.name)
        found = after(inputs_of("what is asked", asked, scaling, owner))
        return NamedClasses(found.names, found.table, found.are_probabilities, examples, asked)

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
        kept, present = checkpoint["scaling"], self.scaling
        self.scaling = Scaling.restored(kept) if kept else None
        if present is not None and self.scaling is None:
            raise InputError("ckpt_path: the checkpoint was trained on data without units; give tasks of that kind")
        self._agree_with_the_data()


def _shape_of(scaling: Scaling) -> list[int]:
    return [*scaling.x_shape] or [len(scaling.x_mean)]


def _check_scaling(present: Scaling, kept: Scaling) -> None:
    """Raise an :class:`InputError` where what was learned is from data of another scaling."""
    name = present.difference(kept)
    if name is not None:
        trained, now = ([float(f"{number:.6g}") for number in getattr(side, name)] for side in (kept, present))
        raise InputError(
            f"data.tasks: the learner was trained on data with the scaling {name}={trained}, and that of the present "
            f"training data is {now}; give the data and the split that it was trained on, or test it on all of other "
            "data, with data.tasks.val=0 and data.tasks.test=1"
        )
