"""The outer steps of one call of the Trainer: one program for all of them where that can be, else one by one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from metalit.adapt import Outer, Start
from metalit.private_torch import pytree_map, tree_flatten, tree_unflatten
from metalit.training.batches import Batches, FlatResult, StepResult
from metalit.training.context import StepContext
from metalit.training.fused_loop import FusedLoop
from metalit.training.joined import JoinedOptimizer, rule_of
from metalit.training.optimizers import optimizer_of
from metalit.training.stepper import OuterStepper, Scalars


class Diagnosing(Protocol):
    """Finds what is to be logged of a step: of what it was taken at, what it found, its items and their start."""

    def __call__(self, context: StepContext, found: StepResult, items: Any, start: Start, /) -> dict[str, Tensor]:
        """Scalars by name; called before the outer variable moves, where a log is due."""

    def pure(self, context: StepContext, found: StepResult, items: Any, start: Start, /) -> dict[str, Tensor]:
        """The same as a pure function of these."""


class OuterLoop:
    """Takes outer steps in a row.

    Args:
        stepper: takes single steps, and counts.
        batches: finds the outer gradient of (items, start), where each item may have a start of its own.
        diagnosis: finds what is to be logged.
        module: the module that the functions of both know.
        tell, seconds: see :class:`~metalit.compiling.compiled.Compiled`.
        form: finds the form of an outer step (:class:`~metalit.training.context.StepContext`), given how many were
            taken before it.
    """

    def __init__(
        self,
        stepper: OuterStepper,
        batches: Batches,
        diagnosis: Diagnosing,
        module: nn.Module,
        tell: Callable[[str], None],
        seconds: float,
        form: Callable[[int], int],
    ) -> None:
        self.stepper = stepper
        self.batches = batches
        self.diagnosis = diagnosis
        self.module = module
        self.tell = tell
        self.seconds = seconds
        self.form = form
        self._program: FusedLoop | None = None

    def take(self, outer: Outer, items: Any, steps: int, start: Start) -> tuple[StepResult, Scalars]:
        """Take so many steps.

        Args:
            outer: the outer variable, detached, which the optimiser changes in place.
            items: those of all steps, one step after the other along the leading dimension of every tensor.
            steps: how many, all of one form.
            start: where the items of the first step start; if not None, each further one starts where the one before it
                ended.

        Returns:
            What the last step found, and what was logged of it, if a log was due.
        """
        program = self._find_program() if steps > 1 else None
        found = None if program is None else self._in_a_program(program, items, steps, start)
        return self._one_by_one(outer, items, steps, start) if found is None else found

    def _one_by_one(self, outer: Outer, items: Any, steps: int, start: Start) -> tuple[StepResult, Scalars]:
        values, form = tree_flatten(items)
        each = list(zip(*(_split(value, steps) for value in values), strict=True))
        last = tree_unflatten(each[-1], form)
        step = self.stepper.module.global_step
        context = self.stepper.context(outer, step)._replace(form=self.form(step))
        evaluate = self.batches.bind(context, (tree_unflatten(each[0], form), start))
        for leaves in each[:-1]:
            found, _ = self.stepper.take(partial(evaluate, [*leaves, *tree_flatten(start)[0]]))
            start = None if start is None else found.joined().per_item

        def diagnosed(found: FlatResult) -> dict[str, Tensor]:
            return self.diagnosis(context, found.joined(), last, start)

        found, logged = self.stepper.take(partial(evaluate, [*each[-1], *tree_flatten(start)[0]]), diagnosed)
        return found.joined(), logged

    def _find_program(self) -> FusedLoop | None:
        """The program of steps and optimiser together, where nothing else happens between two steps."""
        module = self.stepper.module
        if not self.batches.is_compiled or self.stepper.has_hooks or self.batches.per_chunk is not None:
            return None
        optimizer, outer = optimizer_of(module), self.stepper.outer()
        rule = rule_of(optimizer) if module.trainer.world_size == 1 else None
        if rule is None:
            return None
        if self._program is None or not self._program.optimizer.is_of(optimizer, outer):
            joined = JoinedOptimizer(rule, optimizer, outer)
            fns = self.batches.fn, self.diagnosis.pure
            self._program = FusedLoop(joined, *fns, self.module, self.tell, self.seconds)
        return self._program

    def _in_a_program(
        self, program: FusedLoop, items: Any, steps: int, start: Start
    ) -> tuple[StepResult, Scalars] | None:
        step = self.stepper.module.global_step
        found = program(items, steps, start, step, self.stepper.schedule, self.form(step))
        if found is None:
            self.batches.stay_uncompiled()  # the reason is the same, and was said
            return None
        return found.last, self.stepper.took(found, steps)


def items_of_step(items: Any, steps: int, number: int) -> Any:
    """Those of step ``number`` among the items of all steps."""

    def part(value: Any) -> Any:
        size = len(value) // steps if isinstance(value, Tensor) else 0
        return value.narrow(0, size * number, size) if size else value

    return pytree_map(part, items)


def _split(value: Any, steps: int) -> Sequence[Any]:
    return value.split(len(value) // steps) if isinstance(value, Tensor) else [value] * steps
