"""The outer gradient beside finite differences: as a whole, and parameter by parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metalit.checking.differences import Comparison, Value, scaled_to_one, slope, steps_of, unit_direction
from metalit.tree import Tree, leaves, norm, tree_map

Status = Literal["right", "kink", "zero", "unused", "cut off", "first order", "none", "NaN", "wrong", "unknown"]
_RANDOM = 2  # random directions of the whole outer variable
_NONE = 1e-12  # the share of the whole gradient below which a part counts as none


@dataclass(frozen=True)
class Parameter:
    """An outer parameter, and what the gradient of it is worth.

    Attributes:
        name: dotted, ``problem.…`` or ``optimizer.…``.
        size: the norm of its exact gradient.
        status: ``right``, or why not: ``unused`` if nothing depends on it, ``cut off`` if the loss does and no
            derivative comes through, ``first order`` if inner gradients count as constants though they should not,
            ``none`` if the estimator carries none to it, ``zero`` if it is zero here, ``unknown`` if differences say
            nothing or there was no time for them.
        error: that of its slope.
    """

    name: str
    size: float
    status: Status
    error: float


class Gradients(NamedTuple):
    """Gradients at one point, alike: exact, of the learner's own estimator, and of first order if there is one."""

    exact: Tree
    own: Tree
    first_order: Tree | None


def whole_slopes(value: Value, at: Any, gradient: Tree, here: float, few: bool = False) -> list[Comparison]:
    """Slopes along the gradient and along random directions, over the whole sweep of steps, or every second one."""
    steps = steps_of(next(leaf for _, leaf in leaves(at)).dtype)[:: 2 if few else 1]
    ways = {f"random direction {seed}": unit_direction(at, seed) for seed in range(1, _RANDOM + 1)}
    if 0 < float(norm(gradient)) < float("inf"):
        ways = {"along the gradient": scaled_to_one(gradient), **ways}
    return [slope(value, at, gradient, way, name, steps, here) for name, way in ways.items()]


def parameters(
    value: Value,
    at: Any,
    found: Gradients,
    reached: set[str],
    slopes: Sequence[Comparison],
    here: float,
    deadline: float = float("inf"),
) -> list[Parameter]:
    """Each outer parameter by itself, at the steps that were right for the whole.

    After the ``deadline``, by ``perf_counter``, those that are left are ``unknown``.
    """
    chosen = sorted(each.step for each in slopes)[len(slopes) // 2]
    steps = [chosen * 10 ** (-half / 2) for half in (-2, -1, 0, 1, 2)]
    exact, own = dict(leaves(found.exact)), dict(leaves(found.own))
    first = dict(leaves(found.first_order)) if found.first_order is not None else {}
    whole = float(norm(found.exact))
    rows = []
    for number, (name, leaf) in enumerate(leaves(at)):
        if not leaf.numel():
            continue
        mean, answer = exact[name], own[name]
        if not bool(torch.isfinite(mean).all() and torch.isfinite(answer).all()):
            rows.append(Parameter(name, float(mean.norm()), "NaN", float("nan")))
            continue
        if perf_counter() > deadline:
            rows.append(Parameter(name, float(mean.norm()), "unknown", float("nan")))
            continue
        way = _along(at, name, number)
        each = slope(value, at, found.exact, way, name, steps, here)
        is_zero = float(mean.norm()) <= _NONE * whole or not bool(mean.any())
        status = _status(each, mean, answer, first.get(name), is_zero, name in reached)
        rows.append(Parameter(name, float(mean.norm()), status, each.error))
    return rows


def _status(each: Comparison, exact: Tensor, own: Tensor, first: Tensor | None, is_zero: bool, reached: bool) -> Status:
    if each.verdict in ("not finite", "jump", "no plateau"):
        return "NaN" if each.verdict == "not finite" else "unknown"
    if each.verdict == "differs":
        if not bool(exact.any()):
            return "cut off"
        close = first is not None and float((exact - first).norm()) <= 1e-9 * float(exact.norm())
        return "first order" if close else "wrong"
    if is_zero:
        return "zero" if reached else "unused"
    if not bool(own.any()):
        return "none"
    return "kink" if each.verdict == "kink" else "right"


def _along(at: Any, name: str, seed: int) -> Tree:
    """A random direction of length 1 of one leaf."""
    way = unit_direction(at, 1000 + seed)
    each = leaves(way)

    def only(_: Tensor) -> Tensor:
        key, leaf = next(each)
        return leaf if key == name else torch.zeros_like(leaf)

    return scaled_to_one(tree_map(only, way))


def told_of_slopes(slopes: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Problems and remarks of the whole gradient."""
    wrong = [each for each in slopes if each.verdict in ("differs", "not finite")]
    problems = [
        f"the gradient {each.direction} is {each.autograd:.6g} by autograd and {each.differences:.6g} by finite "
        f"differences (step {each.step:.0e}, doubt {each.doubt:.0e})"
        for each in wrong[:1]
    ]
    verdicts, remarks = {each.verdict for each in slopes}, []
    if "kink" in verdicts:
        remarks.append(
            "at a kink (ReLU, max-pool): the differences to both sides stay apart, so autograd's is one of many"
        )
    if "jump" in verdicts:
        remarks.append("at a jump (an inner gradient at a kink): finite differences say nothing in that direction")
    if "no plateau" in verdicts:
        remarks.append("finite differences found no step that is free of rounding: they say nothing in that direction")
    if not all(each.smooth for each in slopes) and not verdicts & {"kink", "jump"}:
        remarks.append("kinks (ReLU, max-pool) lie within the larger steps: the differences are of smaller ones")
    return problems, remarks


_WHY = {
    "unused": "nothing depends on it: it will never move; freeze it, or use it",
    "cut off": "the loss depends on it, but no derivative comes through: is something detached?",
    "first order": "inner gradients count as constants, though they depend on it: are they detached?",
    "wrong": "autograd and finite differences disagree: is a part of the graph detached, or a backward wrong?",
    "NaN": "its gradient is not finite",
}


def told_of_parameters(rows: Sequence[Parameter]) -> list[str]:
    """What is wrong, by name."""
    lines = []
    for status, why in _WHY.items():
        names = [row.name for row in rows if row.status == status]
        if names:
            lines.append(f"{', '.join(names)}: {why}")
    return lines
