"""What is checked: a learner's problem, inner optimiser and hypergradient at a point, on a few tasks."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from metalit.adapt import Iterate, Outer, Start, adapt
from metalit.errors import InputError
from metalit.hypergradients import Direct, Estimate, Hypergradient, Unrolled, for_each_task, over_tasks
from metalit.hypergradients.through_steps import weighted_loss
from metalit.hypergradients.weights import Weights
from metalit.inner import Newton
from metalit.inner.base import InnerOptimizer
from metalit.modules.learned import brought, updated
from metalit.modules.two_level import TwoLevelLearner
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Problem
from metalit.tree import tree_map

DENSE = 400  # entries of an inner variable whose Hessian is solved with as a matrix
_ROUNDS = 40  # outer steps whose warm start is taken, at most, where the inner problem must be solved
_FEW_ROUNDS = 2  # likewise, where it need not be
SOLVED = 1e-6  # the share of the inner gradient that is as good as none
_NEWTON = 3  # steps of Newton's method, which doubles the right digits in each


@dataclass(frozen=True)
class Subject:
    """A point at which an outer step would be taken, and what takes it.

    Attributes:
        problem, optimizer: copies, in the precision of the check.
        form: the hypergradient as it is in its last form, such as after ``first_order_until``.
        outer: the outer variable.
        tasks: with a leading dimension of tasks.
        start: where the inner loops start; None for ``init``.
        progress: the outer step at which that form begins.
    """

    problem: Problem
    optimizer: InnerOptimizer
    form: Hypergradient
    outer: Outer
    tasks: Any
    start: Start = None
    progress: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the check."""
        return next(leaf for leaf in tree_leaves(self.outer) if isinstance(leaf, Tensor)).dtype

    @property
    def weights(self) -> Weights | None:
        """How much the loss after each inner step counts."""
        return cast(Weights | None, getattr(self.form, "weights", None))

    @property
    def exact(self) -> Hypergradient:
        """The hypergradient that leaves nothing out of what is differentiated."""
        return Unrolled(self.form.steps, self.weights) if self.form.steps else Direct()

    @property
    def must_be_solved(self) -> bool:
        """Whether the hypergradient is right at a stationary inner point alone."""
        carries = self.form.carries
        return "init" not in carries and {"inner_loss", "outer_loss"} <= carries

    def estimate(self, hypergradient: Hypergradient) -> Estimate:
        """The mean hypergradient over the tasks."""
        given = self.problem, self.optimizer, self.outer, self.tasks, self.start, self.progress
        return over_tasks(hypergradient, *given)

    def losses(self, outer: Outer) -> Tensor:
        """The outer loss of each task through the whole adaptation, ``[tasks]``: what is differentiated."""

        def one(outer: Outer, given: tuple[Any, Start]) -> Tensor:
            task, start = given
            rest = self.form.steps, start, self.weights, self.progress
            return weighted_loss(self.problem, self.optimizer, outer, task, *rest)[0]

        with torch.no_grad():
            return cast(Tensor, for_each_task(one, outer, (self.tasks, self.start), self.problem))

    def value(self, outer: Outer) -> float:
        """Their mean."""
        return float(self.losses(outer).double().mean())

    def of(self, count: int) -> "Subject":
        """The same on the first tasks alone."""
        return replace(self, tasks=first_tasks(self.tasks, count), start=first_tasks(self.start, count))

    def one(self, index: int = 0) -> Any:
        """One of the tasks, in memory of its own."""
        return pytree_map(lambda leaf: leaf[index].clone() if isinstance(leaf, Tensor) else leaf, self.tasks)

    def begin(self, index: int = 0) -> Any:
        """The inner variable at which the loop of a task starts."""
        if self.start is None:
            return self.problem.init(self.outer["problem"], self.one(index))
        held = self.start.inner if isinstance(self.start, Iterate) else self.start
        return tree_map(lambda leaf: leaf[index], held)


def solved(subject: Subject) -> Subject | None:
    """The same with the inner problem solved by Newton's method, for estimators that are right there, at a warm start.

    One step alone, differentiated, would be the gradient of many outer steps only if the start were no constant.
    None for other estimators, for an inner loss of each step, and where the Hessian is too large for a matrix.
    """
    if subject.start is None or not subject.must_be_solved:
        return None
    if sum(leaf.numel() for leaf in tree_leaves(subject.begin())) > DENSE or subject.problem.of_each_step:
        return None
    return replace(subject, optimizer=Newton(), form=Unrolled(_NEWTON))


def first_tasks(tasks: Any, count: int) -> Any:
    """The first tasks of a batch."""
    return pytree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, tasks)


def count_of(tasks: Any) -> int:
    """How many tasks a batch has."""
    return len(next(leaf for leaf in tree_leaves(tasks) if isinstance(leaf, Tensor)))


def subject_of(learner: TwoLevelLearner, tasks: Any, dtype: torch.dtype) -> Subject:
    """A copy of what a learner has, in a precision.

    Raises:
        InputError: a problem that cannot be copied.
    """
    try:
        problem, learned = deepcopy((learner.problem, learner.learned))
    except RuntimeError as error:
        raise InputError(f"check: {type(learner.problem).__name__} cannot be copied: {error}") from error
    problem.to(dtype)
    learned.to(dtype)
    begins = learner.hypergradient.begins[-1]
    form = learner.hypergradient.at(begins)
    own = tree_map(Tensor.detach, problem.outer())
    rates = updated(brought(problem, learner.inner_optimizer, form.steps), learned.tree)
    outer = {"problem": own, "optimizer": tree_map(Tensor.detach, rates)}

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(learner.device, dtype if leaf.is_floating_point() else None)

    return Subject(problem, learner.inner_optimizer, form, outer, pytree_map(moved, tasks), progress=begins)


def warmed(subject: Subject, inner_gradient: Callable[[Subject], float]) -> Subject:
    """The same where a warm start would be after some outer steps: until the inner problem is solved if it must be."""
    first = inner_gradient(subject)

    def one(outer: Outer, given: tuple[Any, Start]) -> Any:
        task, start = given
        return adapt(subject.problem, subject.optimizer, outer, task, subject.form.steps, start)

    for _ in range(_ROUNDS if subject.must_be_solved else _FEW_ROUNDS):
        with torch.no_grad():
            inner = for_each_task(one, subject.outer, (subject.tasks, subject.start), subject.problem)
        subject = replace(subject, start=inner)
        if inner_gradient(subject) <= SOLVED * first:
            break
    return subject
