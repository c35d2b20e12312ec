"""The parameters and the state of one of torch's optimisers, as a vector each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metalit.adapt import Outer
from metalit.private_torch import copy_all, count_as_stepped, has_step_hooks
from metalit.training.rules import RULES, UpdateRule
from metalit.tree import leaves


class JoinedOptimizer:
    """Reads what a rule steps from torch's optimiser, and writes it back.

    Args:
        rule: the step of ``optimizer``, as a pure function.
        optimizer: one that :func:`rule_of` finds a rule for.
        outer: the outer variable, whose leaves are the optimiser's parameters.
    """

    def __init__(self, rule: UpdateRule, optimizer: torch.optim.Optimizer, outer: Outer) -> None:
        self.rule = rule
        self.optimizer = optimizer
        self.outer = outer
        self.parameters = [parameter for _, parameter in leaves(outer)]
        group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._groups = [(group_of[id(parameter)], parameter.numel()) for parameter in self.parameters]

    def is_of(self, optimizer: torch.optim.Optimizer, outer: Outer) -> bool:
        """Whether it is made for this optimiser and these leaves: others may have become trainable."""
        present = [id(parameter) for _, parameter in leaves(outer)]
        return self.optimizer is optimizer and present == [id(parameter) for parameter in self.parameters]

    @property
    def steps_taken(self) -> int:
        """What the rule counts of the steps before."""
        return self.rule.steps_taken(self.optimizer.state.get(self.parameters[0], {}))

    def coefficients(self, step: int) -> list[Sequence[float]]:
        """Those of step number ``step``, counted from 1, one row for each parameter group."""
        return [self.rule.coefficients(group, step) for group in self.optimizer.param_groups]

    def of_each_parameter(self, coefficients: Tensor) -> Tensor:
        """``[groups, coefficients]`` repeated for all entries of each group: ``[parameters, coefficients]``."""
        return torch.cat([coefficients[group].expand(size, -1) for group, size in self._groups])

    def note_step(self) -> None:
        """Let a scheduler know that there are steps: it warns where its optimiser never took one."""
        count_as_stepped(self.optimizer)

    def read(self) -> list[Tensor]:
        """The parameters, and then each of their states, zero where there is none yet: ``[parameters]`` each."""
        found = [[parameter.detach() for parameter in self.parameters]]
        for name in self.rule.states:
            kept = [self.optimizer.state.get(parameter, {}).get(name) for parameter in self.parameters]
            pairs = zip(self.parameters, kept, strict=True)
            found.append([torch.zeros_like(parameter) if state is None else state for parameter, state in pairs])
        return [torch.cat([value.reshape(-1) for value in values]) for values in found]

    def write(self, vectors: Sequence[Tensor], steps: int) -> None:
        """Put the parameters and their states back where torch has them, after so many steps."""
        places: list[list[Tensor]] = [[parameter.detach() for parameter in self.parameters]]
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        for name in self.rule.states:
            for parameter, state in zip(self.parameters, states, strict=True):
                if state.get(name) is None:
                    state[name] = torch.empty_like(parameter, requires_grad=False)
            places.append([state[name] for state in states])
        for into, vector in zip(places, vectors, strict=True):
            pieces = vector.split([place.numel() for place in into])
            copy_all(into, [piece.view_as(place) for piece, place in zip(pieces, into, strict=True)])
        for state in states:
            self.rule.count(state, steps)


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """The rule of an optimiser, if there is one: of a known kind, on the CPU, with no hooks of the user's own."""
    kinds = {(value.dtype, value.device.type) for group in optimizer.param_groups for value in group["params"]}
    if has_step_hooks(optimizer) or len(kinds) != 1 or kinds.pop()[1] != "cpu":
        return None
    return next((rule for rule in RULES if rule.suits(optimizer)), None)
