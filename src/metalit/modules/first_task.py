"""What is checked on the first tasks that come: what only a whole outer step shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metalit.adapt import Outer, Start, inner_of
from metalit.autodiff.draws import OtherGenerators
from metalit.errors import InputError
from metalit.hypergradients.base import Hypergradient, over_tasks
from metalit.inner.base import InnerOptimizer
from metalit.modules.learned import alike, brought
from metalit.notices import warn
from metalit.private_torch import pytree_map
from metalit.problem import Problem
from metalit.training.context import StepContext
from metalit.training.outer_gradient import OuterGradient
from metalit.unrounded import ParameterTree


def first_of(tasks: Any) -> Any:
    """The first task of a batch."""
    return pytree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, tasks)


def few_of(tasks: Any) -> Any:
    """The first two tasks of a batch."""
    return pytree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, tasks)


def check_first_task(
    hypergradient: Hypergradient,
    problem: Problem,
    optimizer: InnerOptimizer,
    context: StepContext,
    tasks: Any,
    start: Start,
) -> None:
    """Take an outer step on a few tasks, in each form of the hypergradient, to no effect.

    Raises:
        InputError: what :meth:`~metalit.hypergradients.base.Hypergradient.check` raises; derivatives that are missing;
            random numbers from others than a key; a matrix that cannot be inverted.
    """
    hypergradient.check(problem, optimizer, context.outer, first_of(tasks), first_of(start))
    try:
        given = few_of(tasks), few_of(start), context.progress
        with OtherGenerators() as others:
            forms = [hypergradient.at(begin) for begin in hypergradient.begins]
            each = [over_tasks(form, problem, optimizer, context.outer, *given) for form in forms]
    except torch.OutOfMemoryError:  # training makes its chunks as small as they must be
        return
    if others.drawn:
        raise InputError(
            "model.problem: it, or its network, draws from the generators of Python or numpy, so nothing could be "
            "resumed or repeated; draw by metalit.keys from the task's key"
        )
    _warn_of_still_rows(type(hypergradient).__name__, problem, [found.gradient["problem"] for found in each])
    damping = damping_of(hypergradient, optimizer)
    if damping and any(bool(OuterGradient.of(found.loss, found.gradient).not_finite) for found in each):
        raise InputError(f"model: the outer loss or its gradient is not finite from the start. {if_singular(damping)}")


def _warn_of_still_rows(estimator: str, problem: Problem, gradients: Sequence[Mapping[str, Tensor]]) -> None:
    """Warn of inner steps whose own parameters get no gradient in any form, and so will not move."""
    each = [one[name] for one in gradients for name in problem.of_each_step if name in one]
    moving = [{row for row, part in enumerate(value) if bool(part.any())} for value in each]
    still = sorted(set(range(max(map(len, each), default=0))) - set().union(*moving))
    if still:
        warn(
            f"hypergradient {estimator} carries no derivative to the rows {', '.join(map(str, still))} of "
            f"{', '.join(problem.of_each_step)}, of which each inner step has its own: they will not move; use Unrolled"
        )


def check_still_fits(
    hypergradient: Hypergradient,
    problem: Problem,
    optimizer: InnerOptimizer,
    learned: ParameterTree,
    outer: Outer,
    task: Any,
    start: Start,
) -> None:
    """Check that what was made for the inner variable fits it still, when others are trainable than before.

    Raises:
        InputError: it does not.
    """
    if not alike(brought(problem, optimizer, hypergradient.steps), learned.tree):
        raise InputError(
            f"inner_optimizer {type(optimizer).__name__} learns parameters for what adapts, which a callback froze or "
            "unfroze in mid-training; do so before training, or use SGD with a fixed lr inside"
        )
    begin, held = problem.init(outer["problem"], task), inner_of(first_of(start))
    if held is not None and not alike(begin, held):
        raise InputError(
            "model.warm_start: a callback froze or unfroze in mid-training what adapts, and so there is nowhere to "
            "go on from; do so before training, or leave it out"
        )


def damping_of(hypergradient: Hypergradient, optimizer: InnerOptimizer) -> str:
    """The argument that makes invertible what is inverted, or the empty string where nothing is."""
    return optimizer.damped_by or hypergradient.damped_by


def if_singular(damping: str) -> str:
    """What to try where a matrix may be singular that the argument ``damping`` makes invertible."""
    return (
        f"The Hessian of the inner loss, which is inverted, may be singular: raise {damping}, such as to 1e-3, or "
        "regularise the inner loss"
    )
