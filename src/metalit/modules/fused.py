"""Several outer steps in a row, each one compiled together with Adam, so that little else happens between them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metalit.adapt import Outer
from metalit.compiled import Compiled
from metalit.modules.estimates import Found
from metalit.tree import Tree, leaves, tree_map, unflatten

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Taken(NamedTuple):
    """What the last of several outer steps found, and the outer variable and the start that it found it at."""

    found: Found
    outer: Outer
    start: Tree | None


class AdamSteps:
    """Outer steps of ``torch.optim.Adam`` or ``AdamW`` as functions of (φ, m, v), compiled with the hypergradient.

    m ← m + (1 − β₁)(g − m),  v ← β₂v + (1 − β₂)g²,  φ ← φ − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε)

    (Kingma, Ba 2015, algorithm 1; weight decay as torch has it.) Parameters and the optimiser's state are read before
    the first step and written after the last; step sizes and β may change at every step, as a scheduler likes.

    Args:
        estimate: maps (outer, tasks, start) to a :class:`~metalit.modules.estimates.Found`.
        module: the module that it knows.
        optimizer: one for which :meth:`suits` holds.
        outer: the outer variable, whose leaves are the optimiser's parameters.
        tell: see :class:`~metalit.compiled.Compiled`.
    """

    def __init__(
        self,
        estimate: Callable[..., Found],
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        outer: Outer,
        tell: Callable[[str], None],
    ) -> None:
        self.estimate = estimate
        self.optimizer = optimizer
        self.parameters = [parameter for _, parameter in leaves(outer)]
        self.outer = outer
        group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.groups = [(group_of[id(parameter)], parameter.numel()) for parameter in self.parameters]
        self.compiled = Compiled(self._step, module, tell=tell)

    @staticmethod
    def suits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is an Adam of the kind above, on the CPU, whose steps nobody listens to."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        plain = not any(group[flag] for group in optimizer.param_groups for flag in ("amsgrad", "maximize"))
        heard = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        alike = {(parameter.dtype, parameter.device.type) for parameter in parameters}
        counts = {float(optimizer.state[parameter].get("step", 0.0)) for parameter in parameters}
        return plain and not heard and len(alike) == len(counts) == 1 and alike.pop()[1] == "cpu"

    def __call__(
        self, steps: Sequence[Sequence[Any]], tasks: Any, start: Tree | None, schedule: Callable[[], None]
    ) -> tuple[Taken, list[Tensor]]:
        """Take the steps.

        Args:
            steps: the leaves of the tasks of each step.
            tasks: the tasks of the first one, as a tree.
            start: where its inner variables start; if given, each further step starts where the last one ended.
            schedule: sets the rates of the next step; called between steps.

        Returns:
            What the last step found, and of each step whether it was not finite.
        """
        self._begin()
        taken = self.optimizer.state[self.parameters[0]]["step"]
        numbers = []
        for number in range(len(steps)):
            if number:
                schedule()
            numbers.append([_numbers(group, int(taken) + number + 1) for group in self.optimizer.param_groups])
        rows = torch.tensor(numbers, dtype=self.parameters[0].dtype, device=self.parameters[0].device).unbind()
        moments = [[self.optimizer.state[parameter][name] for parameter in self.parameters] for name in _MOMENTS]
        places = [[parameter.detach() for parameter in self.parameters], *moments]
        state = [torch.cat([value.reshape(-1) for value in values]) for values in places]
        begun, spec = tree_flatten(start)[0], tree_flatten((*state, rows[0], tasks, start))[1]
        program = self.compiled.program([*state, rows[0], *steps[0], *begun], spec)
        flags = []
        for row, values in zip(rows, steps, strict=True):
            before, start_of_last = state[0], begun
            found = program([*state, row, *values, *begun])
            state = found[:3]
            flags.append(found[3][-1])
            if start is not None:
                begun = found[4 : 4 + len(begun)]
        for values, flat in zip(places, state, strict=True):
            pieces = flat.split([value.numel() for value in values])
            torch._foreach_copy_(values, [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)])
        for parameter in self.parameters:
            self.optimizer.state[parameter]["step"] += len(steps)
        last = tree_unflatten(found, program.spec)[1]
        at = None if start is None else tree_unflatten(start_of_last, tree_flatten(start)[1])
        return Taken(last, unflatten(before, self.outer), at), flags

    def _begin(self) -> None:
        """What torch's own first step does."""
        for parameter in self.parameters:
            if not self.optimizer.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in _MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        self.optimizer._opt_called = True  # a scheduler warns where its optimiser never took a step

    def _step(
        self, flat: Tensor, first: Tensor, second: Tensor, numbers: Tensor, tasks: Any, start: Tree | None
    ) -> tuple[list[Tensor], Found]:
        found = self.estimate(unflatten(flat, self.outer), tasks, start)
        if start is not None:  # in the order of its keys, as it goes in again
            found = found._replace(inner=tree_map(lambda _, value: value, start, found.inner))
        gradient = found.packed[1:-1]
        each = torch.cat([numbers[group].expand(size, -1) for group, size in self.groups])
        rate, less, keep, more, root, eps, decay, shrink = each.unbind(1)
        gradient = gradient + decay * flat
        first = first + less * (gradient - first)
        second = keep * second + more * gradient * gradient
        flat = flat - shrink * flat - rate * first / (second.sqrt() / root + eps)
        return [flat, first, second], found


def _numbers(group: dict[str, Any], step: int) -> list[float]:
    (first, second), rate, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    apart = group["decoupled_weight_decay"]
    return [
        rate / (1 - first**step),
        1 - first,
        second,
        1 - second,
        (1 - second**step) ** 0.5,
        group["eps"],
        0.0 if apart else decay,
        rate * decay if apart else 0.0,
    ]
