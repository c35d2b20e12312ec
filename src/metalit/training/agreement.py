"""What single ranks wish for, and all of them then do after the same step."""

from collections.abc import Callable, Sequence


class Agreement:
    """Wishes of single ranks, such as to save or to stop, that are granted on all ranks after the same outer step.

    They travel with the gradient that the ranks average anyway: no collective of their own, and none that a signal or
    a clock could start on one rank alone. A rank by itself grants its own wishes when it is asked.

    >>> agreement = Agreement()
    >>> agreement.wish("stop", lambda: True)
    >>> agreement.granted("stop"), agreement.granted("save")
    (True, False)
    >>> agreement.grant([0.0])  # the mean over several ranks: none of them wishes to stop
    >>> agreement.granted("stop")
    False
    """

    def __init__(self) -> None:
        self._wishes: dict[str, Callable[[], bool]] = {}
        self._granted: set[str] | None = None

    def wish(self, name: str, wanted: Callable[[], bool]) -> None:
        """Let ``wanted`` be asked in every outer step; all ranks name the same wishes in the same order."""
        self._wishes[name] = wanted

    def wants(self) -> list[float]:
        """1 for each wish that this rank has now, 0 for each that it has not."""
        return [float(wanted()) for wanted in self._wishes.values()]

    def grant(self, wants: Sequence[float]) -> None:
        """Grant what any rank wants, given the means over them."""
        self._granted = {name for name, want in zip(self._wishes, wants, strict=True) if want > 0}

    def granted(self, name: str) -> bool:
        """Whether all ranks are to do it now."""
        if self._granted is not None:
            return name in self._granted
        return name in self._wishes and self._wishes[name]()
