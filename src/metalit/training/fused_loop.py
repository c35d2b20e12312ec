"""Several outer steps in a row, compiled together with the optimiser as one loop: nothing else happens between them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalit.adapt import Start
from metalit.autodiff.untouched import untouched
from metalit.compiling.compiled import Compiled
from metalit.compiling.loops import repeated
from metalit.private_torch import pytree_map, tree_flatten, tree_unflatten
from metalit.training.batches import StepResult
from metalit.training.context import StepContext
from metalit.training.joined import JoinedOptimizer
from metalit.tree import unflatten

Diagnose = Callable[[StepContext, StepResult, Any, Start], dict[str, Tensor]]


class FusedResult(NamedTuple):
    """What several outer steps found.

    Attributes:
        last: the result of the last one.
        not_finite: for each step whether its loss or gradient was not finite, ``[steps]``.
        diagnosis: what is to be logged of the last one, scalars by name.
    """

    last: StepResult
    not_finite: Tensor
    diagnosis: dict[str, Tensor]


class FusedLoop:
    """Outer steps as a loop over (φ, optimiser state), compiled with the outer gradient.

    The parameters and the optimiser's state are read before the first step and written after the last. Step sizes and
    other options may change at every step, as a scheduler likes.

    Args:
        optimizer: steps the outer variable.
        evaluate: maps a :class:`~metalit.training.context.StepContext` and (items, start) to a
            :class:`~metalit.training.batches.StepResult`.
        diagnose: finds what is to be logged of a step: of what it was taken at, what it found, its items and their
            start. It is part of the program, once after the last step: a program of its own would be compiled longer.
        module: the module that both know.
        tell, seconds: see :class:`~metalit.compiling.compiled.Compiled`.
    """

    def __init__(
        self,
        optimizer: JoinedOptimizer,
        evaluate: Callable[[StepContext, Any], StepResult],
        diagnose: Diagnose,
        module: nn.Module,
        tell: Callable[[str], None],
        seconds: float = 300.0,
    ) -> None:
        self.optimizer = optimizer
        self.evaluate = evaluate
        self.diagnose = diagnose
        self.host = _Host(module)
        self.compiled = Compiled(self._loop, module, tell=tell, seconds=seconds)

    def __call__(
        self, items: Any, steps: int, start: Start, progress: int, schedule: Callable[[], None], form: int = 0
    ) -> FusedResult | None:
        """Take the steps.

        Args:
            items: those of all steps, one step after the other along the leading dimension of every tensor.
            steps: how many.
            start: where the inner loops of the first start; if given, each further step starts where the last
                one ended.
            progress: how many outer steps were taken before.
            schedule: sets the options of the next step; called between steps.
            form: that of the steps (:class:`~metalit.training.context.StepContext`), all of which have one.

        Returns:
            None where they cannot be compiled; then no step is taken.
        """
        carried, taken = self.optimizer.read(), self.optimizer.steps_taken
        first, rows = (torch.tensor(progress), form), [self.optimizer.coefficients(taken + 1)] * steps
        values, spec = tree_flatten((torch.tensor(1), carried, start, first, carried[0].new_tensor(rows), items))
        program = self.compiled.program(values, spec)  # of any number of steps, but tried out on one
        if self.compiled.failed:
            return None
        self.optimizer.note_step()
        for number in range(1, steps):
            schedule()
            rows[number] = self.optimizer.coefficients(taken + 1 + number)
        values, _ = tree_flatten((torch.tensor(steps), carried, start, first, carried[0].new_tensor(rows), items))
        found = program(values)
        assert program.spec is not None  # since it was called
        carried, *result = tree_unflatten(found, program.spec)
        self.optimizer.write(carried, steps)
        return FusedResult(*result)

    # ---- the program. Inside of it, all that changes from call to call must come as an argument: what a traced
    # function takes from elsewhere is a constant of the program. So the module's own tensors are read once, at the
    # beginning, and handed to the loop as part of its context; and the carry keeps one form (tree, shapes, types,
    # order of keys, contiguous) from step to step, since the loop's body is compiled for one form alone.

    def _loop(
        self, count: Tensor, carried: list[Tensor], start: Start, first: tuple[Tensor, int], rows: Tensor, items: Any
    ) -> tuple[Any, ...]:
        context = self.host.tensors(), first, rows, items
        # one evaluation tells the form of what each step finds; no number of it is used, and the program leaves it out
        form = pytree_map(_zeros, self._evaluated(torch.zeros_like(count), carried[0], start, context))
        # a warm start travels as what "the step before the first" left
        previous = form if start is None else form._replace(per_item=start)

        def step(number: Tensor, carry: tuple[Any, ...], context: tuple[Any, ...]) -> tuple[Any, ...]:
            (flat, *states), previous, _, _, flags = carry
            start_of_last = None if start is None else previous.per_item
            found = self._evaluated(number, flat, start_of_last, context)
            # not flags[number] = …: a loop's body must not write into its arguments
            flags = torch.where(torch.arange(len(flags)) == number, found.gradient.not_finite, flags)
            _, _, rows, _ = context
            each = self.optimizer.of_each_parameter(_at(rows, number))
            moved = self.optimizer.rule.update(flat, states, found.gradient.gradient, each)
            # clones, because what a body returns must not be one of its arguments
            return moved, found, flat.clone(), _cloned(start_of_last), flags

        carry = carried, previous, carried[0], start, rows.new_zeros(len(rows))
        moved, last, before_last, start_of_last, flags = repeated(step, count, carry, context)
        at, items_of_last = self._given(count - 1, before_last, context)
        diagnosis = self._called(self.diagnose, context, at, last, items_of_last, start_of_last)
        return moved, last, flags, diagnosis

    def _given(self, number: Tensor, flat: Tensor, context: tuple[Any, ...]) -> tuple[StepContext, Any]:
        """What step ``number`` of the loop is taken at, the parameters ``flat``, and its items."""
        _, (first, form), rows, items = context

        def of_this_step(leaf: Any) -> Any:
            return _at(leaf.reshape(len(rows), -1, *leaf.shape[1:]), number) if isinstance(leaf, Tensor) else leaf

        at = StepContext(unflatten(flat, self.optimizer.outer), None, first + number, form)
        return at, pytree_map(of_this_step, items)

    def _called(self, fn: Callable[..., Any], context: tuple[Any, ...], *given: Any) -> Any:
        """``fn(*given)`` with the module's tensors of the context."""
        with untouched(self.host):
            return functional_call(self.host, context[0], (fn, *given))

    def _evaluated(self, number: Tensor, flat: Tensor, start: Start, context: tuple[Any, ...]) -> StepResult:
        """The result of step ``number`` of the loop."""
        at, items = self._given(number, flat, context)
        found = self._called(self.evaluate, context, at, (items, start))
        if start is not None:  # in the order of its keys, as it goes in again
            found = found._replace(per_item=pytree_map(lambda _, value: value, start, found.per_item))
        return pytree_map(Tensor.contiguous, found)


class _Host(nn.Module):
    """Holds a module, so that functions which know it can be called with other tensors than its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, fn: Callable[..., Any], *given: Any) -> Any:
        return fn(*given)


def _at(rows: Tensor, number: Tensor) -> Tensor:
    return rows.index_select(0, number.reshape(1)).squeeze(0)


def _zeros(leaf: Tensor) -> Tensor:
    # not zeros_like, by which the program would depend on the leaf
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _cloned(tree: Any) -> Any:
    return pytree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
