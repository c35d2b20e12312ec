"""Finite differences of a function along a direction, with the step that is right for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, log
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from metalit.tree import Tree, dot, leaves, norm, tree_map

Verdict = Literal["agrees", "differs", "kink", "jump", "no plateau", "not finite"]
Value = Callable[[Any], float]

_SPAN = {torch.float64: (-2, -9), torch.float32: (0, -4)}  # powers of ten of the steps
_ENOUGH = {torch.float64: 1e-5, torch.float32: 2e-2}  # the relative error that counts as none


@dataclass(frozen=True)
class Comparison:
    """A derivative along a direction of length 1, as autograd and as differences have it.

    Attributes:
        direction: its name.
        autograd: gradient · direction.
        differences: (F(φ + hu) − F(φ − hu)) / 2h at the step that was chosen.
        step: h, on the plateau where the next smaller and larger step say the same.
        doubt: by how much those differ from it.
        error: |differences − autograd|, relative to the larger of both.
        verdict: whether they agree; ``kink`` where the one-sided differences stay apart however small the step is, and
            autograd's is near them; ``jump`` where the function itself jumps there; ``no plateau`` where rounding
            leaves no step.
        smooth: whether the error falls with the square of the step; else kinks lie within the larger steps.
    """

    direction: str
    autograd: float
    differences: float
    step: float
    doubt: float
    error: float
    verdict: Verdict
    smooth: bool


@dataclass(frozen=True)
class Probe:
    """What was found at one step: the central and both one-sided differences."""

    step: float
    central: float
    ahead: float
    behind: float

    @property
    def gap(self) -> float:
        """By how much the sides differ."""
        return abs(self.ahead - self.behind)


def steps_of(dtype: torch.dtype) -> list[float]:
    """The steps that are tried in a precision, half a power of ten apart, the largest first."""
    most, least = _SPAN[dtype]
    return [10 ** (most - half / 2) for half in range(2 * (most - least) + 1)]


def slope(
    value: Value,
    at: Tree,
    gradient: Tree,
    direction: Tree,
    name: str,
    steps: Sequence[float],
    here: float | None = None,
) -> Comparison:
    """Compare a gradient with differences along a direction of length 1.

    Args:
        value: the function, of trees like ``at``.
        at: the point.
        gradient: what is checked.
        direction: a tree like ``at``, of norm 1.
        name: of the direction.
        steps: those that are tried, the largest first, at least three.
        here: the value at the point, where it is known.
    """
    here = value(at) if here is None else here
    probes = [_probe(value, at, direction, step, here) for step in steps]
    expected = float(dot(gradient, direction))
    dtype = next(leaf for _, leaf in leaves(at)).dtype
    unit = torch.finfo(dtype).eps * max(abs(here), torch.finfo(dtype).tiny)
    if not all(map(isfinite, (expected, here, *(probe.central for probe in probes)))):
        return Comparison(
            name, expected, probes[-1].central, steps[-1], float("nan"), float("nan"), "not finite", False
        )
    place = min(range(1, len(probes) - 1), key=lambda place: _unrest(probes, place))
    chosen, doubt = probes[place], _unrest(probes, place) + unit / steps[place]
    scale = max(abs(expected), abs(chosen.central))
    off = abs(chosen.central - expected)
    slack = _ENOUGH[dtype] * scale + 10 * doubt
    verdict: Verdict = "agrees" if off <= slack else "differs"
    kind = _corner(probes, unit, scale)
    if kind == "kink":
        corner = probes[-1 - _apart(probes)]
        low, high = sorted((corner.ahead, corner.behind))
        # of several kinks at once, what autograd takes may lie beside both sides
        reach = corner.gap + slack
        verdict = "kink" if low - reach <= expected <= high + reach else "differs"
    elif kind == "jump":
        verdict = "jump"
    elif doubt > 0.05 * scale and scale > 100 * unit / steps[place]:
        verdict = "no plateau"
    return Comparison(
        name,
        expected,
        chosen.central,
        chosen.step,
        doubt,
        off / scale if scale else 0.0,
        verdict,
        kind is None and _falls_as_the_square(probes, place, doubt),
    )


def _probe(value: Value, at: Tree, direction: Tree, step: float, here: float) -> Probe:
    ahead, behind = (value(_moved(at, direction, sign * step)) for sign in (1, -1))
    return Probe(step, (ahead - behind) / (2 * step), (ahead - here) / step, (here - behind) / step)


def _moved(at: Tree, direction: Tree, by: float) -> Tree:
    return tree_map(lambda here, way: here + by * way, at, direction)


def _unrest(probes: Sequence[Probe], place: int) -> float:
    here = probes[place].central
    return max(abs(here - probes[place - 1].central), abs(here - probes[place + 1].central))


def _apart(probes: Sequence[Probe]) -> int:
    """The places between two steps that are ten times apart."""
    return min(2, len(probes) - 1)


def _corner(probes: Sequence[Probe], unit: float, scale: float) -> Literal["kink", "jump"] | None:
    """What keeps the one-sided differences apart at every step, which else come together with it."""
    apart = _apart(probes)
    stays, grows = [], []
    for large, small in zip(probes, probes[apart:], strict=False):
        if small.gap <= 300 * unit / small.step or small.gap <= 1e-3 * scale:  # of rounding, or of no matter
            return None
        stays.append(small.gap > 0.5 * large.gap)
        grows.append(small.gap > 3 * large.gap)
    if all(grows[-3:]):
        return "jump"
    return "kink" if all(stays[-3:]) else None


def _falls_as_the_square(probes: Sequence[Probe], place: int, doubt: float) -> bool:
    errors = [(probe.step, abs(probe.central - probes[place].central)) for probe in probes[:place]]
    seen = [(step, error) for step, error in errors if error > 10 * doubt]
    orders = [log(a / b) / log(s / t) for (s, a), (t, b) in pairwise(seen)]
    return not orders or median(orders) > 1.5


def unit_direction(like: Tree, seed: int) -> Tree:
    """A random direction of length 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return scaled_to_one(tree_map(drawn, like))


def scaled_to_one(tree: Tree) -> Tree:
    """A tree divided by its norm."""
    size = norm(tree)
    return tree_map(lambda leaf: leaf / size, tree)
