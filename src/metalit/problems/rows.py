"""Problems whose inner level fits the training rows of a table, judged by the outer level on its validation rows."""

from abc import abstractmethod
from typing import Any, Literal, cast

import torch
from torch import Tensor

from metalit.autodiff import per_sample_gradients
from metalit.errors import InputError
from metalit.keys import fold, permutation
from metalit.problem import Inner, Points, Problem, Splits

Batch = int | Literal["all"]
_OUTER_DRAW = -1  # the key of the outer minibatch; inner step k uses k


class RowsProblem(Problem):
    """inner_loss = weighted mean row loss on a minibatch of ``train`` + penalty, outer_loss = mean row loss on ``val``.

    Minibatches are drawn without replacement from the task's key and the number of the inner step, and nothing else.

    Args:
        batch: rows of ``train`` in each inner step, or ``"all"``.
        outer_batch: rows of ``val`` in each outer step, or ``"all"``.

    Raises:
        InputError: a number of rows that is not positive.
    """

    def __init__(self, batch: Batch = "all", outer_batch: Batch = "all") -> None:
        super().__init__()
        for name, size in (("batch", batch), ("outer_batch", outer_batch)):
            if not (size == "all" or (isinstance(size, int) and size >= 1)):
                raise InputError(f"{type(self).__name__}: {name}={size!r} must be a positive number of rows, or 'all'")
        self.batch = batch
        self.outer_batch = outer_batch

    @abstractmethod
    def predict(self, inner: Inner, x: Tensor) -> Tensor:
        """Return what an inner variable says of ``[rows, inputs]``."""

    @abstractmethod
    def row_losses(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each row, ``[rows]``."""

    def row_weights(self, outer: dict[str, Tensor], rows: Tensor) -> Tensor | None:
        """Return the weights of these training rows in the inner loss; None if all count 1."""
        return None

    def penalty(self, inner: Inner, outer: dict[str, Tensor]) -> Tensor | float:
        """Return the penalty that the inner loss adds to the mean row loss."""
        return 0.0

    def inner_loss(self, inner: Inner, outer: dict[str, Tensor], task: Splits, step: int) -> Tensor:
        """The weighted mean row loss on a minibatch of the training rows, and the penalty."""
        rows = _draw(task.key, step, len(task.train.x), self.batch)
        losses = self.row_losses(self.predict(inner, task.train.x[rows]), task.train.y[rows])
        weights = self.row_weights(outer, rows)
        return (losses if weights is None else weights * losses).mean() + self.penalty(inner, outer)

    def outer_loss(self, inner: Inner, outer: dict[str, Tensor], task: Splits) -> Tensor:
        """The mean row loss on a minibatch of the validation rows."""
        rows = _draw(task.key, _OUTER_DRAW, len(task.val.x), self.outer_batch)
        return self.row_losses(self.predict(inner, task.val.x[rows]), task.val.y[rows]).mean()

    def sample_gradient_norms(self, inner: Inner, points: Points) -> Tensor:
        """The norm of each row's own loss gradient, ‖∇θ ℓᵢ(θ)‖, ``[rows]``.

        Raises:
            InputError: an inner variable that is no dictionary of tensors.
        """
        if not isinstance(inner, dict):
            raise InputError(
                f"{type(self).__name__}: per-sample gradients need an inner variable that is a dictionary of tensors, "
                f"not a {type(inner).__name__}"
            )

        def loss(x: Tensor, y: Tensor, **inner: Tensor) -> Tensor:
            return self.row_losses(self.predict(inner, x.unsqueeze(0)), y.unsqueeze(0))[0]

        gradients = per_sample_gradients(loss, points.x, points.y, parameters=inner, flat=True)
        return cast(Tensor, gradients).norm(dim=1)

    def scores(self, inner: Inner, outer: dict[str, Tensor], task: Splits, split: str) -> dict[str, Tensor]:
        """The mean row loss over the whole split, with the accuracy of :meth:`answers`, or the R² of real numbers."""
        points: Points = getattr(task, split)
        prediction = self.predict(inner, points.x)
        losses = self.row_losses(prediction, points.y)
        return {"loss": losses.mean(), **self._quality(prediction, points.y)}

    def answers(self, prediction: Tensor) -> Tensor | None:
        """The predicted classes, ``[rows]``, of ``[rows, classes]`` scores; None for other predictions."""
        return prediction.argmax(1) if prediction.dim() == 2 and prediction.shape[1] > 1 else None

    def _quality(self, prediction: Tensor, y: Tensor) -> dict[str, Tensor]:
        if y.is_floating_point():
            if prediction.numel() != y.numel():
                return {}
            y = y.reshape(prediction.shape)
            return {"r2": 1 - (prediction - y).square().sum() / (y - y.mean(0)).square().sum()}
        answers = self.answers(prediction)
        if answers is None or y.numel() != len(y):
            return {}
        return {"accuracy": (answers == y.flatten()).to(torch.get_default_dtype()).mean()}

    def check_targets(self, y: Tensor) -> None:
        """Raise an ``InputError`` for targets, ``[rows, 1]`` or classes ``[rows]``, that the losses cannot take."""

    def check(self, task: Splits) -> None:
        """Raise an ``InputError`` for minibatches of more rows than there are, or targets of another kind."""
        check_task(self, task, Splits, "SplitsDataModule")
        for split in ("train", "val", "test"):
            self.check_targets(getattr(task, split).y)
        for name, size, points in (("batch", self.batch, task.train), ("outer_batch", self.outer_batch, task.val)):
            if size != "all" and size > len(points.x):
                raise InputError(
                    f"{type(self).__name__}: {name}={size} is more than the {len(points.x)} rows that there are; "
                    "say 'all', or a smaller number"
                )


def check_size(owner: str, name: str, value: int, there: int, what: str) -> None:
    """Raise an ``InputError`` unless a size in the config is that of the data."""
    if value != there:
        raise InputError(f"{owner}: {name}={value}, but the data has {there} {what}; set {name} to {there}")


def check_task(problem: Problem, task: Any, kind: type, module: str) -> None:
    """Raise an ``InputError`` unless a task is of the kind that the problem is posed on."""
    if not isinstance(task, kind):
        raise InputError(
            f"data: {type(problem).__name__} is posed on {kind.__name__}, not on {type(task).__name__}; use {module}"
        )


def _draw(key: Tensor, number: int, count: int, size: Batch) -> Any:
    return slice(None) if size == "all" else permutation(fold(key, number), count)[:size]
