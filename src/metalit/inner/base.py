"""The protocol of an inner optimiser."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from metalit.tree import Tree

GradFn: TypeAlias = Callable[[Tree], Tree]


class InnerOptimizer(ABC):
    """A pure pair of functions: state goes in and comes out, so every step can be differentiated."""

    def outer(self, inner: Tree, steps: int) -> dict[str, Tree]:
        """The outer parameters that the optimiser brings, such as learned step sizes, with their initial values.

        Args:
            inner: an inner variable, of whose shapes they may be.
            steps: the number of inner steps that are trained, for parameters that each step has its own of.
        """
        return {}

    @property
    def learns(self) -> bool:
        """Whether it brings outer parameters."""
        return type(self).outer is not InnerOptimizer.outer

    @property
    def second_order(self) -> bool:
        """Whether it asks for derivatives of ``grad_fn``, which an estimator of first order takes for a constant."""
        return False

    def init(self, inner: Tree) -> Any:
        """Return the state before the first step."""
        return None

    @property
    def damped_by(self) -> str:
        """The argument that makes invertible what it inverts, or the empty string where it inverts nothing."""
        return ""

    def check(self, grad_fn: GradFn, inner: Tree) -> None:  # noqa: B027  (most have no condition)
        """Raise an ``InputError`` if it cannot step from ``inner``; asked once, on the first task."""

    @abstractmethod
    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> tuple[Tree, Any]:
        """Take one step.

        Args:
            grad_fn: maps an inner variable to the gradient of the inner loss there.
            inner: the inner variable.
            state: what :meth:`init` or the last step returned.
            outer: the present values of the parameters that :meth:`outer` brought.
            step: the number of the step, from 0.
        """
