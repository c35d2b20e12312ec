"""The inner level at the point: whether it is solved, and derivatives of its steps at zero."""

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metalit.adapt import Outer
from metalit.checking.subject import Subject
from metalit.hypergradients import Direct, Estimate, Hypergradient
from metalit.modules.diagnosis import Diagnosis
from metalit.notices import say
from metalit.private_torch import tree_leaves
from metalit.training.batches import Batches, StepResult
from metalit.training.context import StepContext
from metalit.training.outer_gradient import OuterGradient
from metalit.tree import Tree, leaves, tree_map


def diagnosed(subject: Subject, hypergradient: Hypergradient, found: Estimate) -> tuple[dict[str, float], list[str]]:
    """What a log would say of an outer step, and what training would warn of."""
    diagnosis, metrics = _logged(subject, hypergradient, found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diagnosis.warn(0, metrics, subject.outer, subject.tasks, found.inner, "take more inner steps")
    return metrics, [str(each.message).removeprefix("outer step 0: ") for each in caught]


def inner_gradient(subject: Subject) -> float:
    """The mean norm of the inner gradient where the inner loops start."""
    _, metrics = _logged(subject, subject.form, subject.estimate(Direct()))
    return metrics.get("inner_grad_norm", 0.0)


def _logged(subject: Subject, hypergradient: Hypergradient, found: Estimate) -> tuple[Diagnosis, dict[str, float]]:
    owner = SimpleNamespace(problem=subject.problem, hypergradient=hypergradient)
    diagnosis = Diagnosis(owner, Batches(_nothing, subject.problem, False, None, "the check", say))
    context = StepContext(subject.outer, None, torch.tensor(subject.progress))
    result = StepResult(OuterGradient.of(found.loss, found.gradient), found.metrics, found.inner)
    return diagnosis, diagnosis.as_logged(context, result, subject.tasks, subject.start)


def _nothing(shared: Any, items: Any) -> None:
    """Stands for a step that is evaluated elsewhere."""


def not_a_number_at_zero(subject: Subject) -> list[str]:
    """Whether a step along a gradient that is exactly zero has a derivative that is no number."""
    begin = tree_map(Tensor.detach, subject.begin())
    if not (subject.form.steps and tree_leaves(begin)) or subject.optimizer.second_order:
        return []
    zeros = tree_map(torch.zeros_like, begin)

    def moved(gradient: Tree, outer: Outer) -> Tree:
        state = subject.optimizer.init(begin)
        return subject.optimizer.update(lambda _: gradient, begin, state, outer["optimizer"], 0)[0]

    try:
        after, back = vjp(moved, zeros, subject.outer)[:2]
        slopes, _ = back(tree_map(torch.ones_like, after))
    except Exception:  # an optimiser of the user's that asks more of its gradient than to be one
        return []
    lost = [name or "the inner variable" for name, leaf in leaves(slopes) if not bool(torch.isfinite(leaf).all())]
    if not lost:
        return []
    return [
        f"inner_optimizer {type(subject.optimizer).__name__}: where an inner gradient is 0, as of a dead ReLU, the "
        f"derivative of its step is NaN or infinite ({', '.join(lost[:3])}): the root of a zero second moment? Take "
        "sqrt where the square is positive alone, or add eps below the root"
    ]
