"""Hyperparameters of inner optimisers, any of which may be learned with the outer variable."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from metalit.errors import InputError
from metalit.tree import Tree, leaves, tree_map

Per = Literal["all", "parameter", "step", "parameter and step", "entry"]


class Domain(NamedTuple):
    """The values that a hyperparameter may have.

    Attributes:
        told: what they are, in words.
        holds: whether a fixed number is one.
        inside: whether a number may be learned from: it is a value of ``value``, which a boundary is not.
        raw, value: a number as what is learned, which is free, and back.
    """

    told: str
    holds: Callable[[float], bool]
    inside: Callable[[float], bool]
    raw: Callable[[float], float]
    value: Callable[[Tensor], Tensor]


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


_LOGARITHM = math.log, torch.exp
RATE = Domain("a finite positive number, such as 0.01", _positive, math.isfinite, float, lambda raw: raw)
POSITIVE = Domain("a finite positive number", _positive, _positive, *_LOGARITHM)
DECAY = Domain("a finite number, 0 or more", lambda n: n == 0 or _positive(n), _positive, *_LOGARITHM)
SHARE = Domain(
    "a number from 0 to below 1",
    lambda number: 0 <= number < 1,
    lambda number: 0 < number < 1,
    lambda number: math.log(number / (1 - number)),
    torch.sigmoid,
)


@dataclass(frozen=True)
class Learned:
    """A hyperparameter of an inner optimiser that is learned: stands wherever a number may.

    A learning rate is free, so it may become negative as Meta-SGD's (Li et al. 2017), unless it is ``positive``. All
    others stay in their domain: momenta and other shares are sigmoids of what is learned, decays, ``eps`` and norms its
    exponentials.

    Args:
        start: the value that it begins with.
        per: what has a value of its own: nothing, each parameter, each inner step, each parameter at each step ("LSLR"
            of Antoniou et al. 2019, "MAML++"), or each entry of each parameter. There are as many steps as are trained;
            beyond them the last one's value holds.
        positive: keep a learning rate positive.

    Raises:
        InputError: a ``start`` that is no finite number, or an unknown ``per``.
    """

    start: float
    per: Per = "all"
    positive: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.start, float | int) and math.isfinite(self.start)):
            raise InputError(f"Learned: start={self.start!r} must be a finite number")
        if self.per not in get_args(Per):
            raise InputError(f"Learned: per={self.per!r} must be one of {', '.join(map(repr, get_args(Per)))}")

    def initial(self, domain: Domain, inner: Tree, steps: int) -> Tree:
        """What is learned, before it is: for ``all`` and ``step`` a tensor, else a tree of the keys of ``inner``."""
        raw = self._domain(domain).raw(self.start)
        if self.per == "entry":
            return tree_map(lambda leaf: torch.full_like(leaf, raw), inner)
        shape = (steps,) if "step" in self.per else ()
        if "parameter" in self.per:
            return tree_map(lambda leaf: leaf.new_full(shape, raw), inner)
        return next((leaf.new_full(shape, raw) for _, leaf in leaves(inner)), {})

    def at(self, domain: Domain, learned: dict[str, Tensor], name: str, step: int) -> Tensor:
        """The value for the parameter ``name`` at an inner step, given the leaves of what is learned."""
        raw = learned[name if name in learned else ""]
        if "step" in self.per:
            raw = raw[min(step, len(raw) - 1)]
        return self._domain(domain).value(raw)

    def _domain(self, domain: Domain) -> Domain:
        return POSITIVE if self.positive and domain is RATE else domain

    def check(self, owner: str, domain: Domain) -> None:
        """Raise an :class:`InputError` unless it may start where it does; asked by who is given it."""
        if not self._domain(domain).inside(self.start):
            edge = "between 0 and 1" if domain is SHARE else "positive"
            raise InputError(f"{owner}.start={self.start} must be {edge}, as it stays while it is learned")


Number: TypeAlias = float | Learned


def check_number(owner: str, name: str, number: Number, domain: Domain) -> None:
    """Raise an :class:`InputError` unless a hyperparameter has, or starts from, a value of its domain."""
    if isinstance(number, Learned):
        number.check(f"{owner}: {name}", domain)
    elif not domain.holds(number):
        raise InputError(f"{owner}: {name}={number} must be {domain.told}")


def is_off(number: Any) -> bool:
    """Whether a hyperparameter is fixed at zero, or not given at all."""
    return not isinstance(number, Learned) and not number
