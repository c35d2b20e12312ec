"""The check: all of it on a few tasks of a learner."""

import warnings
from math import isnan
from time import perf_counter
from typing import Any

import torch

from metalit.autodiff.blame import as_input_error, first_line
from metalit.checking.curvature import curvatures, told_of_curvature
from metalit.checking.estimators import (
    EstimatorRow,
    advice,
    in_own_precision,
    second_order_in_name_alone,
    table_of,
)
from metalit.checking.faults import faults_of_losses
from metalit.checking.gradients import Gradients, parameters, told_of_parameters, told_of_slopes, whole_slopes
from metalit.checking.inner_level import diagnosed, inner_gradient, not_a_number_at_zero
from metalit.checking.memory import memory_of, told_of_memory
from metalit.checking.report import CheckReport, counted
from metalit.checking.rows import faults_of_rows
from metalit.checking.subject import SOLVED, Subject, count_of, first_tasks, solved, subject_of, warmed
from metalit.checking.supervised import check_supervised
from metalit.checking.tasks import first_step_of
from metalit.errors import InputError
from metalit.hypergradients import Direct, Estimate, FirstOrder, Unrolled
from metalit.hypergradients.paths import paths
from metalit.modules import SupervisedLearner
from metalit.modules.base import OuterLearner
from metalit.modules.two_level import TwoLevelLearner
from metalit.tree import flatten, leaves

_TASKS = 4
_SLOW = 300  # evaluations of the outer loss that must fit into the time, else one task is enough


class Findings:
    """Problems and remarks as they come, each once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.remarks: list[str] = []

    def add(self, problems: Any, remarks: Any = ()) -> None:
        """Take both."""
        self.problems += [line for line in problems if line not in self.problems]
        self.remarks += [line for line in remarks if line not in self.remarks]


def check(learner: OuterLearner, tasks: Any = None, count: int = _TASKS, seconds: float = 60.0) -> CheckReport:
    """Check a learner on a few tasks, before it is trained: is its outer gradient right, and which estimator is best?

    Nothing is trained or changed: the problem is copied, in float64 where it can be evaluated so.

    Args:
        learner: a MetaLearner or BilevelLearner; of a SupervisedLearner, its plain gradient.
        tasks: a batch of the tasks of an outer step, or what gives them: a DataModule, or a DataLoader. None for a
            BilevelLearner without data.
        count: how many of the tasks are looked at; one where more would take too long.
        seconds: after so many, nothing else is begun that can be left out.

    Returns:
        The report: ``report.ok``, ``report.problems``, tables; it prints itself.

    Raises:
        InputError: another learner, or data that it does not take.
    """
    begin = perf_counter()
    deadline = begin + 0.7 * seconds
    if count < 1:
        raise InputError(f"check: count={count} must be at least 1")
    batch = first_step_of(learner, tasks)
    if isinstance(learner, SupervisedLearner):
        return check_supervised(learner, batch)
    if not isinstance(learner, TwoLevelLearner):
        raise InputError(f"check: {type(learner).__name__} is none of MetaLearner, BilevelLearner, SupervisedLearner")
    few = first_tasks(batch, count)
    found = Findings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is reported
        subject = _subject(learner, few, found)
        since = perf_counter()
        if not found.problems:
            subject.value(subject.outer)
        if count_of(few) > 1 and perf_counter() - since > seconds / _SLOW:
            few, subject = first_tasks(few, 1), subject.of(1)
        rest = _checked(learner, subject, few, count_of(batch), found, deadline)
    precision = str(subject.dtype).removeprefix("torch.")
    form, steps = type(learner.hypergradient).__name__, learner.hypergradient.steps
    name = f"{type(learner).__name__}, {type(learner.problem).__name__}, {form} ({counted(steps, 'inner step')})"
    said = found.problems, found.remarks
    return CheckReport(name, count_of(few), precision, perf_counter() - begin, *said, **rest)


def _subject(learner: TwoLevelLearner, tasks: Any, found: Findings) -> Subject:
    """The subject in float64, or in the learner's own precision where the network does not take that.

    Raises:
        InputError: its losses cannot be evaluated.
    """
    own = learner.dtype if isinstance(learner.dtype, torch.dtype) else torch.float32
    error: InputError | None = None
    for dtype in dict.fromkeys((torch.float64, torch.float32 if own.itemsize < 4 else own)):
        subject = subject_of(learner, tasks, dtype)
        try:
            with as_input_error("model.problem", subject.problem):
                subject.problem.check(subject.one())
                found.add(faults_of_losses(subject))
                if not found.problems:
                    subject.value(subject.outer)
        except InputError as refusal:
            error = error or refusal
            continue
        if error is not None:
            found.add([], [f"checked in {dtype} for want of float64: {first_line(error)}"])
        return subject
    raise error or AssertionError


def _checked(
    learner: TwoLevelLearner, subject: Subject, few: Any, number: int, found: Findings, deadline: float
) -> dict[str, Any]:
    """What follows where each loss can be evaluated; the tables by name."""
    try:
        with as_input_error("model.problem", subject.problem):
            if not found.problems:
                found.add(*faults_of_rows(subject))
            if found.problems:  # derivatives of another function would tell nothing
                return {}
            if getattr(learner, "warm_start", False):
                subject = warmed(subject, inner_gradient)
                found.add([], ["warm start: the check begins where outer steps at this outer variable would"])
            plain = in_own_precision(subject, subject_of(learner, few, _own_dtype(learner)))
            return _derivatives(learner, subject, plain, number, found, deadline)
    except InputError as refusal:
        found.add([str(refusal)])
        return {}


def _own_dtype(learner: TwoLevelLearner) -> torch.dtype:
    return learner.dtype if isinstance(learner.dtype, torch.dtype) else torch.float32


def _derivatives(
    learner: TwoLevelLearner, subject: Subject, plain: Subject, number: int, found: Findings, deadline: float
) -> dict[str, Any]:
    found.add(not_a_number_at_zero(subject))
    form, begin = subject.form, None if subject.start is None else subject.begin()
    form.check(subject.problem, subject.optimizer, subject.outer, subject.one(), begin)
    truth = solved(subject) or subject
    if truth is not subject:
        found.add([], [f"warm start: {type(form).__name__} is compared with the gradient of the solved inner problem"])
    exact, own, first = _estimates(subject, truth, found)
    reference = own if exact is None else exact
    since = perf_counter()
    here = truth.value(truth.outer)
    left = deadline - perf_counter()
    few = (perf_counter() - since) * _SLOW > left
    slopes = whole_slopes(truth.value, truth.outer, reference.gradient, here, few)
    reached = _reached(subject)
    gradients = Gradients(reference.gradient, own.gradient, None if first is None else first.gradient)
    share = (
        1 / 3 if form.steps else 2 / 3
    )  # without inner steps there is one estimator, and its row is all that follows
    rows = parameters(truth.value, truth.outer, gradients, reached, slopes, here, perf_counter() + share * left)
    late = sum(row.status == "unknown" and isnan(row.error) for row in rows)
    if late:
        found.add([], [f"left out for want of time: {counted(late, 'parameter')}, each by itself (unknown above)"])
    flat = flatten(own.gradient).detach()
    if exact is not None:
        found.add(*told_of_slopes(slopes))
        found.add(told_of_parameters(rows))
        found.add(second_order_in_name_alone(subject, flat, flatten(exact.gradient)))
    metrics, told = diagnosed(subject, form, own)
    found.add(told)
    if not form.steps and metrics.get("inner_grad_ratio", 0.0) > SOLVED:  # what init makes is not to be a minimum
        metrics = {name: value for name, value in metrics.items() if not name.startswith("inner_grad")}
    bends = curvatures(subject)
    found.add(*told_of_curvature(subject, bends, metrics))
    table, left_out = table_of(subject, plain, None if exact is None else flatten(exact.gradient), deadline)
    if left_out:
        found.add([], [f"left out for want of time: {', '.join(left_out)}; count=1, or more seconds"])
    found.add(_told_of_estimator(subject, table[0]))
    memory = memory_of(plain, number)
    found.add(*told_of_memory(memory, learner.tasks_per_chunk))
    return {
        "slopes": slopes, "parameters": rows, "metrics": metrics, "curvature": bends, "estimators": table,
        "advice": advice(table), "memory": memory,
    }  # fmt: skip


def _estimates(subject: Subject, truth: Subject, found: Findings) -> tuple[Estimate | None, Estimate, Estimate | None]:
    """The exact gradient, the configured one, and that of first order, where there are any."""
    own, first = subject.estimate(subject.form), None
    try:
        exact = truth.estimate(truth.exact)
    except InputError as refusal:
        found.add([], [f"there is no exact gradient to compare with: {refusal}"])
        exact = None
    if subject.form.steps and not subject.optimizer.second_order:
        first = subject.estimate(FirstOrder(subject.form.steps, subject.weights))
    return exact, own, first


def _reached(subject: Subject) -> set[str]:
    """The names of outer parameters to which autograd finds a way."""
    begin = None if subject.start is None else subject.begin()
    entries = paths(subject.problem, subject.outer, subject.one(), begin, max(1, subject.form.steps))
    own = {f"problem.{name}" for path, names in entries.items() if path != "inner optimiser" for name in names}
    return own | {f"optimizer.{name}" for name, _ in leaves(subject.outer["optimizer"])}


def _told_of_estimator(subject: Subject, own: EstimatorRow) -> list[str]:
    form = subject.form
    if own.invalid:
        return [own.invalid]
    if isinstance(form, Unrolled | Direct) and own.error > 1e-6 and subject.dtype == torch.float64:
        return [f"hypergradient {own.name} is exact by its name, but {100 * own.error:.3g} % off"]
    if "outer_loss" in form.carries and own.cosine < 0:
        return [f"hypergradient {own.name} points away from the exact gradient: their cosine is {own.cosine:.2f}"]
    return []
