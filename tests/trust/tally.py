"""What a harness counts: how often something was done, by kind, and what was wrong then."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Tally:
    """Counts that can be added over tests and workers."""

    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.done + other.done, [*self.faults, *other.faults])

    @property
    def by_kind(self) -> str:
        """How often each kind was."""
        return ", ".join(f"{number} {kind}" for kind, number in sorted(self.done.items()))
