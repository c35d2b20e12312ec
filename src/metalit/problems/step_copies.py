"""Parameters of a network of which each inner step has a copy of its own."""

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, nn

from metalit.errors import InputError
from metalit.unrounded import ParameterTree


class StepCopies(nn.Module):
    """Parameters of which each inner step k has its own, row k of ``[steps, ...]``; past the last row, that one stays.

    Args:
        names: of the parameters in their network.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.rows: ParameterTree | None = None

    def make(self, network: nn.Module, steps: int) -> None:
        """Make a row for each of so many steps, at least one, that starts from the network's; those there are stay."""
        steps, rows = max(1, steps), {}
        for name in self.names:
            own = attrgetter(name)(network).unsqueeze(0) if self.rows is None else attrgetter(name)(self.rows)
            rows[name] = own[[min(step, len(own) - 1) for step in range(steps)]]
        if self.names and (self.rows is None or len(next(self.rows.parameters())) != steps):
            self.rows = ParameterTree(rows)

    def outer(self) -> dict[str, Tensor]:
        """The rows by the network's names of the parameters.

        Raises:
            InputError: they are not made yet.
        """
        if self.names and self.rows is None:
            raise InputError(
                f"per_step={list(self.names)}: each inner step has its own, and their number is not known; call "
                "problem.trained_for(steps) first, as a learner does with the steps of its hypergradient"
            )
        return {name: attrgetter(name)(self.rows) for name in self.names} if self.rows is not None else {}

    def at(self, outer: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The outer variable as inner step ``step`` knows it, with its own row of each parameter; −1 is as 0."""
        rows = {name: outer.get(name, own) for name, own in self.outer().items()}  # frozen ones are not outer
        return {**outer, **{name: value[min(max(step, 0), len(value) - 1)] for name, value in rows.items()}}
