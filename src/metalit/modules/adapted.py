"""What a meta-learner hands out: a network adapted to one task, as a function in the user's units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metalit.errors import InputError
from metalit.problem import Points
from metalit.tree import Tree

if TYPE_CHECKING:
    from metalit.modules.meta import MetaLearner


@dataclass(frozen=True)
class Adapted:
    """A network adapted to one task: call it with inputs in the user's units.

    Attributes:
        learner: where it comes from.
        inner: the adapted parameters by name.
    """

    learner: "MetaLearner"
    inner: Tree

    def __call__(self, x: Tensor) -> Tensor:
        """Predict at ``[rows, inputs]``; returns ``[rows, outputs]``.

        Raises:
            InputError: inputs of another shape, or that are not finite.
        """
        learner = self.learner
        check_points("x", x, learner.scaling and learner.scaling.x_mean)
        with torch.no_grad(), learner.evaluating():
            inputs = learner.cast(learner.normalise_x(x))
            with learner.told_at(inputs):
                prediction = learner.problem.predict(self.inner, learner.constants()["problem"], inputs)
        return learner.scaling.restore_y(prediction) if learner.scaling else prediction

    def loss(self, x: Tensor, y: Tensor) -> float:
        """The mean loss at points of the task, in normalised units."""
        learner = self.learner
        points = learner.cast(Points(learner.normalise_x(x), learner.normalise_y(y)))
        with torch.no_grad(), learner.evaluating():
            prediction = learner.problem.predict(self.inner, learner.constants()["problem"], points.x)
            return float(learner.problem.judge(prediction, points))


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
