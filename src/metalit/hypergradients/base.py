"""The protocol of a hypergradient, and its average over a batch of tasks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from metalit.adapt import Iterate, Outer, Start, inner_of
from metalit.errors import InputError
from metalit.hypergradients.paths import Claims, Path, check_paths
from metalit.hypergradients.tasks import for_each_task
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, leaves, tree_map

Progress: TypeAlias = Tensor | int


class Estimate(NamedTuple):
    """The outer loss at one task, its gradient (shaped like the outer variable), and the adapted inner variable.

    ``metrics`` holds what the estimator noticed on its way, such as the residual of a solver, as scalars by name;
    ``state`` is the inner optimiser's after the last inner step.
    """

    loss: Tensor
    gradient: Outer
    inner: Tree
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  (never changed)
    state: Any = {}  # noqa: RUF012  (never changed)


class Hypergradient(ABC):
    """Estimates d outer_loss(θ_steps(φ), φ) / dφ for one task.

    Attributes:
        steps: the number of inner steps.
        carries: the paths from the outer variable to the outer loss whose derivative it carries.
        needs: those of them that the problem must have.
        second_order: whether inner gradients are differentiated.
        differences: whether it divides differences by what makes them small, which half precision would round away.
    """

    steps: int
    carries: ClassVar[frozenset[Path]]
    needs: ClassVar[frozenset[Path]] = frozenset()
    second_order: ClassVar[bool] = True
    differences: ClassVar[bool] = False

    @property
    def damped_by(self) -> str:
        """The argument that makes invertible what it inverts, or the empty string where it inverts nothing."""
        return ""

    @property
    def begins(self) -> tuple[int, ...]:
        """The outer steps from which on it has another form, in order; the first is 0."""
        return (0,)

    def at(self, progress: int) -> "Hypergradient":
        """Return the form that it has after ``progress`` outer steps, itself unless that changes.

        A program is of one form: who compiles asks for it, and compiles another one where another begins.
        """
        return self

    def begun(self, progress: int) -> int:
        """The outer step at which the form began that it has after ``progress`` outer steps."""
        return max(step for step in self.begins if step <= progress)

    @abstractmethod
    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Estimate the hypergradient for one task.

        Args:
            problem, optimizer, outer, task, start: see :func:`metalit.adapt.path`.
            progress: how many outer steps were taken before this one, for what changes over them. In training it is a
                tensor of no dimensions, of type int64: a compiled program reads it anew at every step.
        """

    def check(self, problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, start: Start = None) -> None:
        """Try the problem on one task, in each form, before anything is trained.

        Raises:
            InputError: a loss that is no scalar, or that the outer variable does not reach; an outer parameter that is
                reached by another way than the argument; a problem or an inner optimiser for which this estimator is
                not valid; half precision where it takes differences.
        """
        start = inner_of(start)
        if self.differences and _is_half(outer):
            raise InputError(
                f"hypergradient {type(self).__name__} takes differences of gradients, which half precision would round "
                "away; use trainer.precision 32-true or 64-true, or another hypergradient"
            )
        for begin, end in zip(self.begins, [*self.begins[1:], None], strict=True):
            form = self.at(begin)
            name = type(form).__name__ + ("" if end is None else f" (before outer step {end})")
            claims = Claims(name, form.carries, form.needs, form.second_order)
            check_paths(claims, problem, optimizer, outer, task, start, self.steps)
        if self.steps:
            inner = problem.init(outer["problem"], task) if start is None else start
            optimizer.check(lambda inner: problem.inner_grad(inner, outer["problem"], task, 0), inner)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return warnings by kind, given the means of ``metrics`` over tasks; each names the way out."""
        return {}


def over_tasks(
    hypergradient: Hypergradient,
    problem: Problem,
    optimizer: InnerOptimizer,
    outer: Outer,
    tasks: Any,
    start: Start = None,
    progress: Progress = 0,
) -> Estimate:
    """Average the loss, the gradient and the metrics over a batch of tasks, as of :func:`for_each_task`.

    Args:
        tasks: a task whose tensors have a leading task dimension.
        start: where each task's inner loop starts, with a leading task dimension, instead of ``problem.init``.
        progress: how many outer steps were taken before this one.

    Returns:
        An :class:`Estimate` whose ``inner`` keeps the task dimension; so does its ``state``, where ``start`` has one.
    """

    def one(shared: tuple[Outer, Progress], pair: tuple[Any, Start]) -> tuple[Any, ...]:
        outer, progress = shared
        *found, state = hypergradient(problem, optimizer, outer, *pair, progress)
        return *found, state if isinstance(start, Iterate) else {}

    loss, gradient, inner, metrics, state = for_each_task(one, (outer, progress), (tasks, start), problem)
    metrics = {name: value.to(loss.dtype).mean(0) for name, value in metrics.items()}
    return Estimate(loss.mean(), tree_map(lambda value: value.mean(0), gradient), inner, metrics, state)


def _is_half(outer: Outer) -> bool:
    """Whether values are of half precision, or cast to it."""
    values = [value for _, value in leaves(outer)]
    types = {value.dtype for value in values} & {torch.half, torch.bfloat16}
    return bool(types) or any(torch.is_autocast_enabled(value.device.type) for value in values)


def problem_alone(gradient: dict[str, Tensor], outer: Outer) -> Outer:
    """The gradient of an estimator that learns the problem's outer parameters; the optimiser's rates get zeros."""
    return {"problem": gradient, "optimizer": tree_map(torch.zeros_like, outer["optimizer"])}


def check_steps(owner: str, steps: int) -> None:
    """Raise an :class:`InputError` unless ``steps`` is at least one."""
    if steps < 1:
        raise InputError(f"{owner}: steps={steps} must be at least 1: without an inner step nothing adapts")
