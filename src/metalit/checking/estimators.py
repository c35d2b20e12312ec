"""Every hypergradient on the problem at hand: is it valid, how near to the exact gradient, at what cost."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from metalit.checking.inner_level import diagnosed
from metalit.checking.peak import peak_of
from metalit.checking.subject import DENSE, Subject
from metalit.errors import InputError
from metalit.hypergradients import (
    F2SA,
    Direct,
    FiniteDifference,
    FirstOrder,
    Hypergradient,
    Implicit,
    JTg,
    Recomputed,
    Reptile,
    Truncated,
    Unrolled,
)
from metalit.linsolve import Dense
from metalit.modules.first_task import damping_of, if_singular
from metalit.private_torch import pytree_map, tree_leaves
from metalit.tree import flatten

_ALIGNED = 0.9  # a cosine that is near enough for a cheaper estimator to be told of
_FASTER = 1.25  # how many times as fast it must be
_TURNS = 5  # of timing, at most
_LONG = 3.0  # seconds of timing after which no other turn begins


@dataclass(frozen=True)
class EstimatorRow:
    """A hypergradient on this problem.

    Attributes:
        name: of the class, with what it is given.
        configured: whether it is that of the learner.
        adapts: whether it differentiates the outer loss after inner steps; of another one the cosine says less.
        invalid: why it is not valid here; the empty string where it is.
        cosine: between its gradient and the exact one.
        error: the norm of their difference, relative to that of the exact one.
        seconds: of an outer step on the tasks that were checked, in the learner's precision, not compiled.
        peak: the most bytes that it took at once.
        told: what training would warn of.
    """

    name: str
    configured: bool
    adapts: bool = True
    invalid: str = ""
    cosine: float = float("nan")
    error: float = float("nan")
    seconds: float = float("nan")
    peak: int = 0
    told: Sequence[str] = ()


def candidates(subject: Subject) -> list[Hypergradient]:
    """The configured hypergradient, then all others with as many steps; one of each kind."""
    steps, weights = subject.form.steps, subject.weights
    if not steps:
        return [subject.form]
    others: list[Hypergradient] = [
        Unrolled(steps, weights),
        Recomputed(steps, weights),
        *([Truncated(steps, steps // 2)] if steps > 1 else []),
        FirstOrder(steps, weights),
        FiniteDifference(steps),
        Implicit(steps),
        *([Implicit(steps, Dense())] if sum(leaf.numel() for leaf in tree_leaves(subject.begin())) <= DENSE else []),
        F2SA(steps),
        Reptile(steps),
        JTg(steps),
        Direct(),
    ]
    known = label(subject.form)
    return [subject.form, *(each for each in others if label(each) != known)]


def label(hypergradient: Hypergradient) -> str:
    """Its class, with the solver that it is given, and the steps that it keeps."""
    name, solver = type(hypergradient).__name__, getattr(hypergradient, "solver", None)
    kept = getattr(hypergradient, "kept", None)
    given = type(solver).__name__ if solver is not None else f"last {kept}" if kept is not None else ""
    return f"{name}, {given}" if given else name


def table_of(
    subject: Subject, plain: Subject, exact: Tensor | None, deadline: float
) -> tuple[list[EstimatorRow], list[str]]:
    """A row of each, and the names of those that are left out for want of time.

    Args:
        subject: in the precision of the check.
        plain: the same in the learner's own.
        exact: the exact gradient, ``[parameters]``, if there is one.
        deadline: when no other is begun, by ``perf_counter``.
    """
    each, rows = candidates(subject), list[EstimatorRow]()
    for one in each:
        if rows and perf_counter() > deadline:
            break
        rows.append(_row(one, subject, plain, exact, not rows))
    valid = [one for one, row in zip(each, rows, strict=False) if not row.invalid]
    seconds = iter(timed(plain, valid))
    done = [row if row.invalid else replace(row, seconds=next(seconds)) for row in rows]
    return done, [label(one) for one in each[len(rows) :]]


def _row(each: Hypergradient, subject: Subject, plain: Subject, exact: Tensor | None, configured: bool) -> EstimatorRow:
    name = label(each)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            each.check(subject.problem, subject.optimizer, subject.outer, subject.one(), _begin(subject))
            found = subject.estimate(each)
        flat = flatten(found.gradient).detach()
        if not bool(torch.isfinite(flat).all()):
            damping = damping_of(each, subject.optimizer)
            way = f"; {if_singular(damping)}" if damping else ""
            return EstimatorRow(name, configured, invalid=f"its gradient is not finite{way}")
        _, told = diagnosed(subject, each, found)
        cosine, error = compared(flat, exact)
        peak = peak_of(lambda: plain.estimate(each), next(iter(tree_leaves(plain.outer))).device)
    except InputError as refusal:
        return EstimatorRow(name, configured, invalid=str(refusal))
    adapts = each.steps > 0 and "outer_loss" in each.carries
    own = [str(one.message) for one in caught if str(one.message).startswith("hypergradient")]
    return EstimatorRow(name, configured, adapts, "", cosine, error, peak=peak, told=[*own, *told])


def _begin(subject: Subject) -> Any:
    return None if subject.start is None else subject.begin()


def compared(gradient: Tensor, exact: Tensor | None) -> tuple[float, float]:
    """The cosine of two gradients, and the norm of their difference relative to the second's."""
    if exact is None:
        return float("nan"), float("nan")
    size, own = exact.norm(), gradient.norm()
    cosine = gradient @ exact / (size * own)
    return float(cosine), float((gradient - exact).norm() / size)


def timed(subject: Subject, each: Sequence[Hypergradient]) -> list[float]:
    """The shortest of a few outer steps of each, in seconds; they take turns, as others may use the machine."""
    found, begin = [float("inf")] * len(each), perf_counter()
    for _ in range(_TURNS):
        for place, hypergradient in enumerate(each):
            since = perf_counter()
            subject.estimate(hypergradient)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            found[place] = min(found[place], perf_counter() - since)
        if perf_counter() - begin > _LONG:
            break
    return found


def advice(rows: Sequence[EstimatorRow]) -> str:
    """One line: whether another hypergradient is as good and cheaper, or better."""
    own, others = rows[0], [row for row in rows[1:] if row.adapts and not row.invalid and not row.told]
    if own.invalid or not others:
        return ""
    if own.cosine < _ALIGNED:
        better = [row for row in others if row.cosine > 0.999]
        if better:
            best = min(better, key=lambda row: row.seconds)
            return (
                f"{best.name} is exact and takes {best.seconds / own.seconds:.2g} times as long as {own.name}, "
                f"which is {own.cosine:.2f} aligned"
            )
    fast = [row for row in others if row.cosine >= _ALIGNED and row.seconds * _FASTER < own.seconds]
    if fast:
        best = min(fast, key=lambda row: row.seconds)
        return f"{best.name} is {own.seconds / best.seconds:.1f} times as fast and {best.cosine:.2f} aligned"
    small = [row for row in others if row.cosine > 0.999 and 2 * row.peak < own.peak]
    if small:
        best = min(small, key=lambda row: row.peak)
        return (
            f"{best.name} is as exact in {best.peak / own.peak:.2f} times the memory, and takes "
            f"{best.seconds / own.seconds:.1f} times as long"
        )
    said = f"{own.name} is a good choice: none of the others is both {_FASTER:g} times as fast and aligned"
    if own.cosine >= _ALIGNED and own.error > 1:
        # ‖g − e‖² = ‖g‖² + ‖e‖² − 2 cos ‖g‖ ‖e‖
        longer = own.cosine + (own.error**2 - 1 + own.cosine**2) ** 0.5
        said += f"; its gradient is {longer:.2g} times as long as the exact one: choose the learning rate for it"
    return said


def second_order_in_name_alone(subject: Subject, own: Tensor, exact: Tensor) -> list[str]:
    """Whether an estimator that says that it differentiates inner gradients takes them for constants."""
    form = subject.form
    claims = form.second_order and {"inner_loss", "outer_loss"} <= form.carries
    if not (form.steps and claims) or subject.optimizer.second_order:
        return []
    first = flatten(subject.estimate(FirstOrder(form.steps, subject.weights)).gradient)
    is_first, differs = (float((one - first).norm()) for one in (own, exact))
    size = float(exact.norm())
    if is_first <= 1e-9 * size < 1e-6 * size < differs:
        return [
            f"hypergradient {type(form).__name__} says that it differentiates inner gradients (second_order, carries "
            f"inner_loss), but its gradient is FirstOrder's, {100 * differs / size:.3g} % off the exact one; set "
            "second_order = False, or let nothing be detached in it"
        ]
    return []


def in_own_precision(subject: Subject, plain: Subject) -> Subject:
    """The plain subject where the other one starts, such as at a warm start."""
    dtype = plain.dtype

    def cast(leaf: object) -> object:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return replace(plain, start=pytree_map(cast, subject.start))
