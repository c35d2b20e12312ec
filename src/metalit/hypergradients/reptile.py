"""Reptile: the outer variable moves towards the adapted one."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalit.adapt import Outer, Start, beginning, inner_step, kept
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, Progress, check_steps, problem_alone
from metalit.hypergradients.paths import Path
from metalit.inner.base import InnerOptimizer
from metalit.keys import fold, permutation
from metalit.problem import Points, Problem, Task
from metalit.tree import leaves, tree_map

_ORDER = 0x5EED  # folded into a task's key, so that the order of its rows follows no other draw


@dataclass(frozen=True)
class Reptile(Hypergradient):
    """φ − θ_steps(φ) in the place of a gradient, so that φ moves towards the adapted weights (Nichol et al. 2018).

    It is divided by nothing: the paper's φ ← φ + ε(θ_steps − φ) is an outer SGD of rate ε. On quadratic tasks
    ½(θ − c)ᵀA(θ − c) and with inner steps of size α it is (I − Mᵏ)(φ − c), M = I − αA; so it is about α · steps times
    as large as :class:`~metalit.hypergradients.Direct`'s, which an outer Adam does not see, and ``clip_norm`` does.

    Valid where ``init`` hands over the outer variable as it is. The outer loss takes no part but in ``loss``.

    Args:
        steps: the number of inner steps.
        batch: the inner steps take minibatches of so many rows of support and query together, as its authors train: one
            after the other, in an order that the task's key draws, and over again from the first. Then ``train/loss``
            is of rows that were trained on. If not given, the inner loss is that of the support set.

    Raises:
        InputError: no inner step, or a ``batch`` below 1; before training: an ``init`` that hands over something else,
            a ``batch`` of tasks without support and query.
    """

    carries: ClassVar[frozenset[Path]] = frozenset({"init"})
    needs: ClassVar[frozenset[Path]] = frozenset({"init"})
    steps: int = 5
    batch: int | None = None

    def __post_init__(self) -> None:
        check_steps("Reptile", self.steps)
        if self.batch is not None and self.batch < 1:
            raise InputError(f"Reptile: batch={self.batch} must be at least 1")

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Adapt, and take the difference."""
        own = outer["problem"]
        inner, state = beginning(problem, optimizer, own, task, start)
        given = (lambda _: task) if self.batch is None else _minibatches(task, self.batch)
        for step in range(self.steps):
            inner, state = inner_step(problem, optimizer, inner, state, outer, given(step), step)
        away = tree_map(lambda before, after: problem.scaled(before - after), own, inner)
        loss = problem.after(self.steps).outer_loss(inner, own, task)
        return Estimate(loss, problem_alone(away, outer), inner, state=kept(state))

    def check(self, problem: Problem, optimizer: InnerOptimizer, outer: Outer, task: Any, start: Start = None) -> None:
        """Check also that ``init`` is the identity.

        Raises:
            InputError: it is not; or what :meth:`Hypergradient.check` raises.
        """
        with warnings.catch_warnings():  # what init does not hand over is an error below
            warnings.filterwarnings("ignore", message="hypergradient Reptile carries no derivative")
            super().check(problem, optimizer, outer, task, start)
        name, own = type(problem).__name__, dict(leaves(outer["problem"]))
        begun = dict(leaves(problem.init(outer["problem"], task)))
        other = [key for key in {**own, **begun} if not _same(own.get(key), begun.get(key))]
        if other:
            raise InputError(
                f"hypergradient Reptile moves the outer variable towards the inner one, so {name}.init must hand it "
                f"over as it is, and {', '.join(other)} it does not; adapt all parameters, or use FirstOrder or "
                "Unrolled"
            )
        if self.batch is not None and not isinstance(task, Task):
            raise InputError(
                f"hypergradient Reptile: batch={self.batch} takes rows of support and query together, which a "
                f"{type(task).__name__} has not; leave it out"
            )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _minibatches(task: Task, size: int) -> Callable[[int], Task]:
    """By its number, the task with a minibatch of its rows as support set."""
    parts = task.support, task.query
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    count, mask = len(x), None
    if any(part.mask is not None for part in parts):
        masks = [x.new_ones(len(part.x), dtype=torch.bool) if part.mask is None else part.mask for part in parts]
        mask = torch.cat(masks)
    real: Any = count if mask is None else mask.sum().clamp(min=1)
    order = permutation(fold(task.key, _ORDER), count, mask)  # real rows come first
    place = torch.arange(min(size, count), device=order.device)

    def minibatch(number: int) -> Task:
        rows = order[(number * len(place) + place) % real]
        # where there are fewer real rows than are asked for, each counts once
        return task._replace(support=Points(x[rows], y[rows], None if mask is None else place < real))

    return minibatch
