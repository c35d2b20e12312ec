"""What is optimised: the protocol of a problem, and the tasks that problems are posed on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.utils.rnn import pad_sequence

from metalit.autodiff.attention import plain_attention
from metalit.private_torch import collate_by
from metalit.tree import Tree
from metalit.unrounded import Unrounded

Inner: TypeAlias = Any  # a Tree, whose form each problem decides


class Points(NamedTuple):
    """Rows of a table: ``x`` of shape ``[rows, inputs]``, ``y`` of shape ``[rows, outputs]`` (or ``[rows]`` classes).

    ``mask`` of shape ``[rows]`` is true for real rows and false for padding, which must be finite; without one, every
    row is real.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None


def collate_points(each: Sequence[Points], *, collate_fn_map: Any = None) -> Points:
    """Stack points to a batch, for a ``DataLoader``; shorter ones are padded with zeros, and masked."""
    x, y = ([torch.as_tensor(part) for part in parts] for parts in zip(*(points[:2] for points in each), strict=True))
    given = [None if points.mask is None else torch.as_tensor(points.mask) for points in each]
    alike = all(len({part.shape for part in parts}) == 1 for parts in (x, y))
    shape = next((mask.shape for mask in given if mask is not None), None)
    if alike and shape is None:
        return Points(torch.stack(x), torch.stack(y))
    # the mask of a single row, as of rows that are collated, has no dimension
    real = [torch.ones(shape if alike and shape is not None else (len(part),), dtype=torch.bool) for part in x]
    masks = [ones if mask is None else mask for mask, ones in zip(given, real, strict=True)]
    if alike:
        return Points(*(torch.stack(parts) for parts in (x, y, masks)))
    return Points(*(pad_sequence(parts, batch_first=True) for parts in (x, y, masks)))


# a DataLoader would stumble over a mask that is None
collate_by(Points, collate_points)


class Task(NamedTuple):
    """One few-shot task: adapt to ``support``, be judged on ``query``; ``key`` seeds every draw (:mod:`metalit.keys`).

    ``classes`` of shape ``[ways]`` is there where targets are classes whose number is known: ``y`` counts from 0 to
    ``ways − 1``, and ``classes[y]`` is which class of the data that is. A batch of tasks is the same tuple with a
    leading task dimension on every tensor.
    """

    support: Points
    query: Points
    key: Tensor
    classes: Tensor | None = None


def collate_tasks(each: Sequence[Task], *, collate_fn_map: Any = None) -> Task:
    """Stack tasks to a batch, for a ``DataLoader``; sets of points as :func:`collate_points` does."""
    support, query = (collate_points(points) for points in zip(*(task[:2] for task in each), strict=True))
    key = torch.stack([torch.as_tensor(task.key) for task in each])
    classes = [task.classes for task in each if task.classes is not None]
    return Task(support, query, key, torch.stack(classes) if len(classes) == len(each) else None)


collate_by(Task, collate_tasks)


class Splits(NamedTuple):
    """A table in three parts: the inner level fits ``train``, the outer one is judged on ``val``, both on ``test``.

    What was spoiled on purpose is for evaluation alone: ``noise`` of shape ``[inputs]`` is true for columns of
    noise, ``corrupted`` of shape ``[rows of train]`` for rows whose label is wrong. ``key`` seeds every draw.
    """

    train: Points
    val: Points
    test: Points
    noise: Tensor
    corrupted: Tensor
    key: Tensor


class Matrix(NamedTuple):
    """A matrix of shape ``[rows, columns]`` and where it was ``observed``; hidden entries are 0."""

    values: Tensor
    observed: Tensor
    key: Tensor


class Problem(Unrounded, ABC):
    """A bilevel problem: an inner variable θ that a task sets, and an outer variable φ that is learned over tasks.

    φ* = argmin_φ E_task [ outer_loss(θ*(φ), φ) ],  θ*(φ) = the inner optimiser's answer to inner_loss(θ, φ).

    Papers on MAML write θ for the initialisation; that is our outer variable φ, and their adapted weights are our θ.

    A problem is a module, so that its frozen parameters, buffers and data follow it to a device and into checkpoints;
    its methods are pure functions all the same: every variable is an argument, nothing is changed in place.

    Attributes:
        vectorised: whether many tasks are evaluated at once; found out on the first ones, unless it is set.
        reads_data: whether its losses read ``tensor.data``; found out likewise.
        adapts_in_init: whether ``init`` reads the support set, and is the whole adaptation: no inner step is needed.
        of_each_step: the outer parameters of which each trained inner step has its own, one row for each.
        inner_term: the argument with which the inner loss depends on the outer variable, if one adds that.
    """

    vectorised: bool | None = None
    reads_data: bool | None = None
    adapts_in_init: ClassVar[bool] = False
    of_each_step: Sequence[str] = ()
    inner_term: ClassVar[str] = ""

    def outer(self) -> dict[str, Tensor]:
        """The outer parameters that the problem brings, with their present values: its trainable parameters."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    @abstractmethod
    def init(self, outer: dict[str, Tensor], task: Any) -> Tree:
        """Return the inner variable before the first inner step."""

    @abstractmethod
    def inner_loss(self, inner: Inner, outer: dict[str, Tensor], task: Any, step: int) -> Tensor:
        """Return the scalar that inner step number ``step`` descends."""

    @abstractmethod
    def outer_loss(self, inner: Inner, outer: dict[str, Tensor], task: Any) -> Tensor:
        """Return the scalar that judges an inner variable."""

    def trained_for(self, steps: int) -> None:
        """Make the outer parameters that each of the inner steps has its own of; asked once, by the learner."""

    def after(self, steps: int) -> "Problem":
        """Return the problem as it stands after so many inner steps: its outer loss and predictions are taken of that.

        It is the same at every step, unless parts of it are of a step each.
        """
        return self

    # ---- how it is differentiated; metalit.scaled alone overrides these

    def inner_grad(self, inner: Inner, outer: dict[str, Tensor], task: Any, step: int) -> Tree:
        """Return ∇θ inner_loss, which inner optimisers descend."""
        # by position: a problem may name its arguments as it likes, such as theta and phi
        with plain_attention():
            return grad(lambda inner: self.inner_loss(inner, outer, task, step))(inner)

    def scaled(self, value: Tensor) -> Tensor:
        """Return what is differentiated to get the outer gradient in place of ``value``."""
        return value

    # ---- what a problem may report

    def check(self, task: Any) -> None:
        """Raise an ``InputError`` if a task is not of the size that the problem was made for."""

    def watch(
        self, start: Inner, inner: Inner, outer: dict[str, Tensor], gradient: dict[str, Tensor], task: Any
    ) -> dict[str, Tensor]:
        """Return scalars to log at an outer step: of the inner variable before and after it, and the outer gradient."""
        return {}

    def scores(self, inner: Inner, outer: dict[str, Tensor], task: Any, split: str) -> dict[str, Tensor]:
        """Return scalars that judge an inner variable on the split ``val`` or ``test``; ``loss`` must be among them."""
        return {"loss": self.outer_loss(inner, outer, task)}

    def baselines(self, outer: dict[str, Tensor], task: Any) -> dict[str, tuple[dict[str, Tensor], Any]]:
        """Return other outer variables, by name, each with its task, whose scores stand beside the learned one's."""
        return {}

    def results(self, inner: Inner, outer: dict[str, Tensor], task: Any) -> dict[str, dict[str, Tensor]]:
        """Return what to write at the end of training: by file, its columns by name, each ``[rows]`` or a matrix."""
        return {}


class FewShotProblem(Problem):
    """A problem posed on a :class:`Task`, whose inner variable answers for new inputs.

    Attributes:
        needs_classes: whether it reads from ``Task.classes`` how many classes a task has.
    """

    needs_classes: bool = False

    def after(self, steps: int) -> "FewShotProblem":
        """Return that of :meth:`Problem.after`, which predicts too."""
        return self

    @abstractmethod
    def predict(self, inner: Inner, outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return what an inner variable says of ``[rows, inputs]``: ``[rows, outputs]``."""

    @abstractmethod
    def judge(self, prediction: Tensor, points: Points) -> Tensor:
        """Return the mean loss of ``[rows, outputs]`` predictions over the real rows of ``points``."""

    def spread(self, inner: Inner, outer: dict[str, Tensor], x: Tensor) -> Tensor | None:
        """Return the standard deviation of what :meth:`predict` says, ``[rows, outputs]``; None if it knows none."""
        return None

    @property
    def has_spread(self) -> bool:
        """Whether predictions come with a standard deviation; where they do, :meth:`judge` is the squared error."""
        return type(self).spread is not FewShotProblem.spread
