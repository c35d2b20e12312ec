"""What single ranks request, and all of them then do after the same step."""

from collections.abc import Callable, Sequence


class Agreement:
    """Requests of single ranks, such as to save or to stop, which all ranks learn of with the same outer step.

    They travel with the gradient that the ranks average anyway: no collective of their own, and none that a signal or
    a clock could start on one rank alone. A rank that is alone asks itself.

    >>> agreement = Agreement()
    >>> agreement.request("stop", lambda: True)
    >>> agreement.any_rank("stop"), agreement.any_rank("save")
    (True, False)
    >>> agreement.resolve([0.0])  # the mean over several ranks: none of them requests to stop
    >>> agreement.any_rank("stop")
    False
    """

    def __init__(self) -> None:
        self._wanted: dict[str, Callable[[], bool]] = {}
        self._resolved: set[str] | None = None

    def request(self, name: str, wanted: Callable[[], bool]) -> None:
        """Let ``wanted`` be asked in every outer step; all ranks name the same requests in the same order."""
        self._wanted[name] = wanted

    def requests(self) -> list[float]:
        """1 for each request that this rank has now, 0 for each that it has not."""
        return [float(wanted()) for wanted in self._wanted.values()]

    def resolve(self, means: Sequence[float]) -> None:
        """Take what any rank requests, given the means over them."""
        self._resolved = {name for name, mean in zip(self._wanted, means, strict=True) if mean > 0}

    def any_rank(self, name: str) -> bool:
        """Whether any rank requested it, as of the last outer step."""
        if self._resolved is not None:
            return name in self._resolved
        return name in self._wanted and self._wanted[name]()
