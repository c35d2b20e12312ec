"""Several outer steps in a row, compiled together with Adam as one loop, so that nothing else happens between them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalit.adapt import Outer
from metalit.autodiff.untouched import untouched
from metalit.compiled import Compiled, repeated
from metalit.private_torch import copy_all, count_as_stepped, has_step_hooks, pytree_map, tree_flatten, tree_unflatten
from metalit.training.batches import Found
from metalit.tree import Tree, leaves, tree_map, unflatten

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Taken(NamedTuple):
    """What the last of several outer steps found, the outer variable and the start that it found it at, and flags.

    ``not_finite``, ``[steps]``, tells of each step whether its loss or gradient was not finite.
    """

    found: Found
    outer: Outer
    start: Tree | None
    not_finite: Tensor


class AdamSteps:
    """Outer steps of ``torch.optim.Adam`` or ``AdamW`` as a loop over (φ, m, v), compiled with the hypergradient.

    m ← m + (1 − β₁)(g − m),  v ← β₂v + (1 − β₂)g²,  φ ← φ − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε)

    (Kingma, Ba 2015, algorithm 1; weight decay as torch has it.) Parameters and the optimiser's state are read before
    the first step and written after the last; step sizes and β may change at every step, as a scheduler likes.

    Args:
        estimate: maps (outer, tasks, start) to a :class:`~metalit.training.batches.Found`.
        module: the module that it knows.
        optimizer: one for which :meth:`suits` holds.
        outer: the outer variable, whose leaves are the optimiser's parameters.
        tell, seconds: see :class:`~metalit.compiled.Compiled`.
    """

    def __init__(
        self,
        estimate: Callable[..., Found],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        outer: Outer,
        tell: Callable[[str], None],
        seconds: float = 300.0,
    ) -> None:
        self.estimate = _Estimate(estimate, module)
        self.optimizer = optimizer
        self.parameters = [parameter for _, parameter in leaves(outer)]
        self.outer = outer
        group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.groups = [(group_of[id(parameter)], parameter.numel()) for parameter in self.parameters]
        self.compiled = Compiled(self._loop, module, tell=tell, seconds=seconds)

    @staticmethod
    def suits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is an Adam of the kind above, on the CPU, whose steps nobody listens to."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        plain = not any(group[flag] for group in optimizer.param_groups for flag in ("amsgrad", "maximize"))
        heard = has_step_hooks(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        alike = {(parameter.dtype, parameter.device.type) for parameter in parameters}
        counts = {float(optimizer.state[parameter].get("step", 0.0)) for parameter in parameters}
        return plain and not heard and len(alike) == len(counts) == 1 and alike.pop()[1] == "cpu"

    def is_of(self, outer: Outer) -> bool:
        """Whether these are its leaves: others may have become trainable."""
        return [id(parameter) for _, parameter in leaves(outer)] == [id(parameter) for parameter in self.parameters]

    def __call__(self, tasks: Any, steps: int, start: Tree | None, schedule: Callable[[], None]) -> Taken | None:
        """Take the steps.

        Args:
            tasks: those of all steps, one step after the other along the leading dimension of every tensor.
            steps: how many.
            start: where the inner variables of the first start; if given, each further step starts where the last
                one ended.
            schedule: sets the rates of the next step; called between steps.

        Returns:
            None where they cannot be compiled; then no step is taken.
        """
        self._begin()
        moments = [[self.optimizer.state[parameter][name] for parameter in self.parameters] for name in _MOMENTS]
        places = [[parameter.detach() for parameter in self.parameters], *moments]
        state = [torch.cat([value.reshape(-1) for value in values]) for values in places]
        taken = int(self.optimizer.state[self.parameters[0]]["step"])
        rows = [self._numbers(taken + 1)] * steps
        like = {"dtype": state[0].dtype, "device": state[0].device}
        values, spec = tree_flatten((torch.tensor(1), state, torch.tensor(rows, **like), tasks, start))
        program = self.compiled.program(values, spec)  # of any number of steps, but tried out on one
        if self.compiled.failed:
            return None
        for number in range(1, steps):
            schedule()
            rows[number] = self._numbers(taken + 1 + number)
        values[0], values[1 + len(state)] = torch.tensor(steps), torch.tensor(rows, **like)
        state, found, outer, begun, flags = tree_unflatten(program(values), program.spec)
        for values, flat in zip(places, state, strict=True):
            pieces = flat.split([value.numel() for value in values])
            copy_all(values, [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)])
        for parameter in self.parameters:
            self.optimizer.state[parameter]["step"] += steps
        return Taken(found, unflatten(outer, self.outer), begun, flags)

    def _begin(self) -> None:
        """What torch's own first step does."""
        for parameter in self.parameters:
            if not self.optimizer.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in _MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        count_as_stepped(self.optimizer)

    def _numbers(self, step: int) -> list[list[float]]:
        return [_numbers(group, step) for group in self.optimizer.param_groups]

    def _loop(self, count: Tensor, state: list[Tensor], rows: Tensor, tasks: Any, start: Tree | None) -> tuple:
        # read here, where a program sees its arguments in their place: its loop takes nothing from around it
        held = self.estimate.tensors()
        known = held, rows, tasks
        # of the form that each step finds, and so the inner variable that the first one starts at lies there
        nothing = pytree_map(torch.zeros_like, self._evaluated(torch.zeros_like(count), state[0], start, known))
        before = nothing if start is None else nothing._replace(inner=start)

        def step(number: Tensor, going: tuple, known: tuple) -> tuple:
            (flat, *moments), before, _, _, flags = going
            begun = None if start is None else before.inner
            found = self._evaluated(number, flat, begun, known)
            flags = torch.where(torch.arange(len(flags)) == number, found.packed[-1], flags)
            state = self._updated(flat, *moments, found.packed[1:-1], _at(known[1], number))
            return state, found, flat.clone(), _copied(begun), flags

        going = state, before, state[0], start, rows.new_zeros(len(rows))
        return repeated(step, count, going, known)

    def _evaluated(self, number: Tensor, flat: Tensor, start: Tree | None, known: tuple) -> Found:
        held, rows, tasks = known

        def now(leaf: Any) -> Any:
            return _at(leaf.reshape(len(rows), -1, *leaf.shape[1:]), number) if isinstance(leaf, Tensor) else leaf

        given = unflatten(flat, self.outer), pytree_map(now, tasks), start
        with untouched(self.estimate):
            found = functional_call(self.estimate, held, given)
        if start is not None:  # in the order of its keys, as it goes in again
            found = found._replace(inner=tree_map(lambda _, value: value, start, found.inner))
        return pytree_map(Tensor.contiguous, found)

    def _updated(self, flat: Tensor, first: Tensor, second: Tensor, gradient: Tensor, numbers: Tensor) -> list[Tensor]:
        each = torch.cat([numbers[group].expand(size, -1) for group, size in self.groups])
        rate, less, keep, more, root, eps, decay, shrink = each.unbind(1)
        gradient = gradient + decay * flat
        first = first + less * (gradient - first)
        second = keep * second + more * gradient * gradient
        flat = flat - shrink * flat - rate * first / (second.sqrt() / root + eps)
        return [flat, first, second]


class _Estimate(nn.Module):
    """The estimate as a module, that can be called with other tensors than its own."""

    def __init__(self, fn: Callable[..., Found], module: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.module = module

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, *given: Any) -> Found:
        return self.fn(*given)


def _at(rows: Tensor, number: Tensor) -> Tensor:
    return rows.index_select(0, number.reshape(1)).squeeze(0)


def _copied(tree: Any) -> Any:
    return pytree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


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
