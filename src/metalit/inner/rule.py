"""What the inner optimisers that descend the gradient share: hyperparameters, a schedule, clipping, one step a leaf."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from metalit.errors import InputError
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.inner.learned import POSITIVE, Domain, Learned, Number, check_number
from metalit.inner.pieces import clipped
from metalit.inner.schedules import Schedule, check_schedule, factor
from metalit.tree import Tree, leaves, tree_map

Numbers: TypeAlias = Mapping[str, Any]  # of one leaf at one step: a number, or a tensor that its shape takes
State: TypeAlias = dict[str, Tensor]  # of one leaf


@dataclass(frozen=True)
class GradientRule(InnerOptimizer):
    """A step along the gradient of the inner loss, leaf by leaf; the state of each leaf is a dictionary of tensors.

    Every number is fixed or :class:`~metalit.inner.learned.Learned`.

    Args:
        schedule: factors of ``lr``, one for each inner step, of which the last repeats; or one number, whose powers
            they are; or :class:`~metalit.inner.schedules.Cosine`.
        clip_norm: scale the inner gradient by min(1, clip_norm / ‖gradient‖), over all parameters of a task.

    Raises:
        InputError: a number outside of its domain.
    """

    domains: ClassVar[dict[str, Domain]]
    schedule: Schedule | None = field(default=None, kw_only=True)
    clip_norm: Number | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name, (number, domain) in self.hyperparameters().items():
            check_number(owner, name, number, domain)
        if self.schedule is not None:
            check_schedule(owner, self.schedule)
        if isinstance(self.clip_norm, Learned) and self.clip_norm.per not in ("all", "step"):
            raise InputError(f"{owner}: clip_norm.per={self.clip_norm.per!r} must be 'all' or 'step': the norm is one")

    def hyperparameters(self) -> dict[str, tuple[Number, Domain]]:
        """Each hyperparameter by name, with its domain."""
        found = {name: (getattr(self, name), domain) for name, domain in self.domains.items()}
        return found if self.clip_norm is None else {**found, "clip_norm": (self.clip_norm, POSITIVE)}

    # ---- the protocol of an inner optimiser

    @property
    def learns(self) -> bool:
        """Whether a hyperparameter is learned."""
        return any(isinstance(number, Learned) for number, _ in self.hyperparameters().values())

    def outer(self, inner: Tree, steps: int) -> dict[str, Tree]:
        """What is learned of each hyperparameter, by its name."""
        return {
            name: number.initial(domain, inner, steps)
            for name, (number, domain) in self.hyperparameters().items()
            if isinstance(number, Learned)
        }

    def init(self, inner: Tree) -> dict[str, State]:
        """The state of each leaf, by its dotted name."""
        return {name: self.begin(leaf) for name, leaf in leaves(inner)}

    def update(
        self, grad_fn: GradFn, inner: Tree, state: dict[str, State], outer: dict[str, Tree], step: int
    ) -> tuple[Tree, dict[str, State]]:
        """Take one step."""
        numbers = self.numbers(inner, outer, step)
        gradient = self.seen(grad_fn(self.asked(inner, state, numbers)), numbers, outer)
        return self.moved(inner, gradient, state, numbers)

    # ---- its parts

    def numbers(self, inner: Tree, outer: dict[str, Tree], step: int) -> dict[str, Numbers]:
        """The hyperparameters of each leaf at a step, by its dotted name."""
        learned = {name: dict(leaves(outer[name])) for name in outer if name in self.hyperparameters()}

        def of_leaf(leaf: str, dtype: torch.dtype) -> Numbers:
            found: dict[str, Any] = {}
            for name, (number, domain) in self.hyperparameters().items():
                found[name] = number
                if isinstance(number, Learned):
                    found[name] = number.at(domain, learned[name], leaf, step).to(dtype)
            if self.schedule is not None:
                found["lr"] = found["lr"] * factor(self.schedule, step)
            return found

        return {name: of_leaf(name, leaf.dtype) for name, leaf in leaves(inner)}

    def asked(self, inner: Tree, state: dict[str, State], numbers: dict[str, Numbers]) -> Tree:
        """Where the gradient is taken."""
        return _like(inner, [self.ask_at(leaf, state[name], numbers[name]) for name, leaf in leaves(inner)])

    def seen(self, gradient: Tree, numbers: dict[str, Numbers], outer: dict[str, Tree]) -> Tree:
        """The gradient as the rule takes it: clipped."""
        if self.clip_norm is None or not numbers:
            return gradient
        return clipped(gradient, next(iter(numbers.values()))["clip_norm"])  # which is the same of every leaf

    def moved(
        self, inner: Tree, gradient: Tree, state: dict[str, State], numbers: dict[str, Numbers]
    ) -> tuple[Tree, dict[str, State]]:
        """Every leaf after a step."""
        slopes = dict(leaves(gradient))
        each = {name: self.move(leaf, slopes[name], state[name], numbers[name]) for name, leaf in leaves(inner)}
        return _like(inner, [leaf for leaf, _ in each.values()]), {name: after for name, (_, after) in each.items()}

    # ---- what a rule says of one leaf

    def begin(self, leaf: Tensor) -> State:
        """The state before the first step."""
        return {}

    def ask_at(self, leaf: Tensor, state: State, numbers: Numbers) -> Tensor:
        """Where the gradient is taken: there."""
        return leaf

    @abstractmethod
    def move(self, leaf: Tensor, gradient: Tensor, state: State, numbers: Numbers) -> tuple[Tensor, State]:
        """The leaf and its state after a step."""


def _like(tree: Tree, values: Sequence[Tensor]) -> Tree:
    """A tree of the keys of ``tree`` with these leaves."""
    each = iter(values)
    return tree_map(lambda _: next(each), tree)
