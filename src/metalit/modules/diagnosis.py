"""What is worth knowing of an outer step beside its loss: what is logged, and what is warned of."""

from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.func import grad

from metalit.adapt import Iterate, Outer, Start, inner_of
from metalit.hypergradients.base import Hypergradient
from metalit.hypergradients.tasks import for_each_task
from metalit.modules.estimator_warnings import EstimatorWarnings
from metalit.problem import Problem
from metalit.scaled import Scaled
from metalit.training.batches import Batches, StepResult
from metalit.training.context import StepContext
from metalit.tree import Tree, leaves, norm, tree_map, unflatten


class Means(NamedTuple):
    """Scalars by name, means over the tasks."""

    metrics: dict[str, Tensor]


class HasProblem(Protocol):
    """A learner of two levels."""

    problem: Problem
    hypergradient: Hypergradient


class Diagnosis:
    """Finds the norms of the variables and of the inner gradient, and what the problem watches, of outer steps.

    ``inner_grad_norm`` is ‖∇θ inner_loss‖ at the inner variable that was found, and ``inner_grad_ratio`` its share of
    what it is at ``init``; at θ = 0 where ``init`` is the whole adaptation.

    Attributes:
        batches: evaluates it.
        warnings: what is warned of.

    Args:
        owner: the learner, whose outer steps they are.
        steps: evaluates the outer steps; this is compiled as they are.
    """

    def __init__(self, owner: HasProblem, steps: Batches) -> None:
        self.owner = owner
        self.steps = steps
        self.batches = steps.alike(self._means, "what is logged of it")
        self.begin()

    def begin(self) -> None:
        """Begin a new fit, in which everything is warned of anew."""
        self.warnings = EstimatorWarnings(self.owner.hypergradient)

    def __call__(self, context: StepContext, found: StepResult, tasks: Any, start: Start) -> dict[str, Tensor]:
        """Scalars by name.

        Args:
            context: what the step was taken at.
            found: what it found.
            tasks, start: what it was taken on.
        """
        if not self.steps.is_compiled:
            self.batches.stay_uncompiled()
        items = tasks, inner_of(found.per_item), inner_of(start)
        # one program, whatever the form of the step
        means = self.batches((context._replace(form=0), _gradient(context, found)), items).metrics
        return {"outer_norm": norm(context.outer), **means, **found.metrics}

    def pure(self, context: StepContext, found: StepResult, tasks: Any, start: Start) -> dict[str, Tensor]:
        """The same as a pure function of these, of all tasks at once."""
        items = tasks, inner_of(found.per_item), inner_of(start)
        means = self._means((context, _gradient(context, found)), items).metrics
        return {"outer_norm": norm(context.outer), **means, **found.metrics}

    def as_logged(self, context: StepContext, found: StepResult, tasks: Any, start: Start) -> dict[str, float]:
        """The numbers of a step that is not taken, uncompiled, as a log would have them."""
        values = self.pure(context, found, tasks, start)
        scale = 1.0 if context.scale is None else context.scale
        values |= {"loss": found.gradient.loss, "grad_norm": (found.gradient.gradient / scale).norm()}
        return {name: float(value) for name, value in values.items()}

    def warn(
        self, step: int, metrics: dict[str, float], outer: Outer, tasks: Any, inner: Tree | Iterate, advice: str
    ) -> None:
        """Warn of an outer step.

        Args:
            step: its number.
            metrics: what was logged of it.
            outer: the outer variable.
            tasks, inner: what it was taken on, and the inner variables that it found.
            advice: what may be done where the inner steps carry no derivative.
        """
        self.warnings.tell(step, metrics, partial(self._inner_gradient_norm, outer, tasks, inner_of(inner)), advice)

    def _inner_gradient_norm(self, outer: Outer, tasks: Any, inner: Tree) -> float:
        """The norm of ∂outer_loss/∂θ over tasks."""

        judged = self.owner.problem.after(self.owner.hypergradient.steps)

        def one(outer: Outer, given: tuple[Any, Tree]) -> Tensor:
            task, inner = given
            return norm(grad(lambda inner: judged.outer_loss(inner, outer["problem"], task))(inner))

        return float(for_each_task(one, outer, (tasks, inner), self.owner.problem).norm())

    def _means(self, shared: tuple[StepContext, dict[str, Tensor]], items: tuple[Any, Tree, Tree | None]) -> Means:
        context, gradient = shared
        outer, own, step = context.outer, context.outer["problem"], self.owner.hypergradient.steps
        scaled = self.owner.problem if context.scale is None else Scaled(self.owner.problem, context.scale)

        in_init = self.owner.problem.adapts_in_init

        def one(shared: tuple[Outer, Outer], given: tuple[Any, Tree, Tree | None]) -> dict[str, Tensor]:
            (own, gradient), (task, inner, start) = shared, given
            init = self.owner.problem.init(own, task)
            inner_grad = partial(scaled.inner_grad, outer=own, task=task, step=step)
            values = dict(self.owner.problem.watch(init if start is None else start, inner, own, gradient, task))
            if next(leaves(inner), None) is not None:
                # init may solve the inner problem: two gradients of rounding alone have no ratio
                before = tree_map(torch.zeros_like, init) if in_init else init
                left, at_first = norm(inner_grad(inner)), norm(inner_grad(before))
                values |= {
                    "inner_norm": norm(inner),
                    "inner_grad_norm": left,
                    "inner_grad_ratio": left / torch.where(at_first > 0, at_first, 1.0),
                }
            return values

        dtype = next(leaves(outer))[1].dtype
        values = for_each_task(one, (own, gradient), items, self.owner.problem)
        return Means({name: value.to(dtype).mean() for name, value in values.items()})


def _gradient(context: StepContext, found: StepResult) -> dict[str, Tensor]:
    """The true gradient of the problem's own outer variable."""
    gradient = found.gradient.gradient if context.scale is None else found.gradient.gradient / context.scale
    return cast(dict[str, Tensor], unflatten(gradient, context.outer)["problem"])
