"""No inner optimiser: for what is adapted without steps."""

from typing import Any, NoReturn

from metalit.errors import InputError
from metalit.inner.base import GradFn, InnerOptimizer
from metalit.tree import Tree


class NoSteps(InnerOptimizer):
    """Stands where no inner optimiser is given, since none is needed: ``init`` is the whole adaptation."""

    def update(self, grad_fn: GradFn, inner: Tree, state: Any, outer: dict[str, Tree], step: int) -> NoReturn:
        """Take no step.

        Raises:
            InputError: always.
        """
        raise InputError("inner_optimizer: there is none, so no inner step can be taken; give one, such as SGD")
