"""What is learned, adapted to points of the user's: a function in the user's units."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from metalit.adapt import Outer
from metalit.data.scaling import Scaling
from metalit.errors import InputError
from metalit.evaluation.judged import Z95
from metalit.problem import FewShotProblem, Points
from metalit.tree import Tree


class Adapts(Protocol):
    """What an adapted network asks of its learner (:class:`~metalit.modules.adapting.AdaptingLearner`)."""

    problem: FewShotProblem
    scaling: Scaling | None

    def constants(self) -> Outer:
        """The outer variable, without derivatives."""

    def cast(self, tree: Any) -> Any:
        """Bring tensors to the learner's device and precision."""

    def normalise_x(self, x: Tensor) -> Tensor:
        """From the user's units."""

    def normalise_y(self, y: Tensor) -> Tensor:
        """From the user's units."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Be in evaluation mode."""

    def told_at(self, x: Tensor) -> AbstractContextManager[None]:
        """Tell in one line what is wrong with the user's network."""


@dataclass(frozen=True)
class Adapted:
    """A network adapted to one task: call it with inputs in the user's units.

    Attributes:
        learner: where it comes from.
        inner: the adapted parameters by name.
        steps: after how many inner steps.
    """

    learner: Adapts
    inner: Tree
    steps: int

    def __call__(self, x: Tensor) -> Tensor:
        """Predict at ``[rows, inputs]``; returns ``[rows, outputs]``.

        Raises:
            InputError: inputs of another shape, or that are not finite.
        """
        self._check(x)
        prediction = self.outputs(x)
        return self.learner.scaling.restore_y(prediction) if self.learner.scaling else prediction

    def spread(self, x: Tensor) -> Tensor:
        """The standard deviation of each prediction at ``[rows, inputs]``, noise included: ``[rows, outputs]``.

        Raises:
            InputError: the problem knows none; what a prediction raises.
        """
        if not self.has_spread:
            name = type(self.learner.problem).__name__
            raise InputError(f"spread: {name} predicts no standard deviation; BayesianHead and NeuralProcess do")
        self._check(x)
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

    def outputs(self, x: Tensor) -> Tensor:
        """What the network says at rows of the user's, ``[rows, outputs]``, in normalised units."""
        return self._at(x, self._predict)

    def loss(self, x: Tensor, y: Tensor) -> float:
        """The mean loss at points of the task, in normalised units; y are real, or numbers of classes."""
        learner = self.learner
        points = learner.cast(Points(learner.normalise_x(x), learner.normalise_y(y) if y.is_floating_point() else y))
        with torch.no_grad(), learner.evaluating():
            return float(learner.problem.judge(self._predict(points.x), points))

    def _check(self, x: Tensor) -> None:
        scaling = self.learner.scaling
        check_points("x", x, scaling.x_mean if scaling else None)

    def _at(self, x: Tensor, found: Callable[[Tensor], Tensor]) -> Tensor:
        learner = self.learner
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


def check_lengths(x: Tensor, y: Tensor) -> None:
    """Raise an :class:`InputError` unless there are as many of both."""
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"adapt: x has {len(x)} points and y has {len(y)}; give one y for each x, and one at least")


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
