"""The exact hypergradient in little memory: every inner step is computed again in the backward sweep."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from metalit.adapt import Outer, Start, beginning, inner_step
from metalit.hypergradients.base import Estimate, Progress
from metalit.hypergradients.unrolled import Unrolled
from metalit.hypergradients.weights import weights_at
from metalit.inner.base import InnerOptimizer
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Problem
from metalit.tree import Tree, axpy, leaves, tree_map


@dataclass(frozen=True)
class Recomputed(Unrolled):
    """:class:`Unrolled`'s gradient, to rounding, in the memory of a single inner step and all iterates θ₀ … θ_steps.

    The way there is not recorded. On the way back each step is taken again from its iterate, and its derivative pulls
    λ = d outer_loss / dθₖ₊₁ back to dθₖ and dφ: half as much arithmetic again, against memory that does not grow with
    the number of steps but for one copy of θ (and of the inner optimiser's state) for each (Griewank, Walther 2008,
    "Evaluating derivatives", chapter 12). A compiled program may keep what it meets twice: leave ``model.compile`` out
    where memory is short.

    Args:
        steps, weights, first_order_until: see :class:`Unrolled`.

    Raises:
        InputError: see :class:`Unrolled`.
    """

    def __call__(
        self,
        problem: Problem,
        optimizer: InnerOptimizer,
        outer: Outer,
        task: Any,
        start: Start = None,
        progress: Progress = 0,
    ) -> Estimate:
        """Adapt, then sweep back."""
        if self.first_order_until:
            return self.at(int(progress))(problem, optimizer, outer, task, start, progress)
        own = outer["problem"]

        def first_iterate(own: dict[str, Tensor]) -> tuple[Tree, dict[str, Any]]:
            inner, state = beginning(problem, optimizer, own, task, start)
            return inner, as_tree(state)

        def step(number: int, inner: Tree, state: dict[str, Any], outer: Outer) -> tuple[Tree, dict[str, Any]]:
            inner, after = inner_step(problem, optimizer, inner, state.get("state"), outer, task, number)
            return inner, as_tree(after)

        path = [first_iterate(own)]
        for number in range(self.steps):
            path.append(step(number, *path[-1], outer))
        only_last = [0.0] * (self.steps - 1) + [1.0]
        weights = weights_at(self.weights, progress, next(leaf for _, leaf in leaves(outer))) or only_last
        inner, state = path[-1]
        value: Any = 0.0
        gradient = tree_map(torch.zeros_like, outer)
        pull = pytree_map(torch.zeros_like, path.pop())
        for number in reversed(range(self.steps)):
            reached = inner if number == self.steps - 1 else path[number + 1][0]
            # a number that is 0 needs no derivative; a tensor may become another one at the next outer step
            if isinstance(weights[number], Tensor) or weights[number]:
                judged = problem.after(number + 1).outer_loss
                (at_inner, direct), loss = grad_and_value(judged, argnums=(0, 1))(reached, own, task)
                value = value + weights[number] * loss
                pull = axpy(weights[number], at_inner, pull[0]), pull[1]
                gradient = {**gradient, "problem": axpy(weights[number], direct, gradient["problem"])}
            *pull, through = pulled(partial(step, number), (*path[number], outer), tuple(pull))
            gradient = axpy(1.0, through, gradient)
            del path[number + 1 :]
        (through,) = pulled(first_iterate, (own,), tuple(pull))
        gradient = {**gradient, "problem": axpy(1.0, through, gradient["problem"])}
        return Estimate(value, gradient, inner, state=state.get("state", {}))


def pulled(fn: Callable[..., Any], given: tuple[Any, ...], pull: Any) -> tuple[Any, ...]:
    """``pull`` pulled back through ``fn`` to what it was given; zero where there is no inner variable."""
    if not tree_leaves(pull):
        return pytree_map(torch.zeros_like, given)
    _, back = vjp(fn, *given)[:2]
    return back(pull)


def as_tree(state: Any) -> dict[str, Any]:
    """``vjp`` takes trees of tensors alone, and most inner optimisers have no state."""
    return {} if state is None else {"state": state}
