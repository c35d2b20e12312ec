"""Warnings of what an outer step tells against its hypergradient: each kind once in a fit."""

from collections.abc import Callable, Mapping

from metalit.hypergradients.base import Hypergradient
from metalit.notices import warn

_SOON = 10  # steps after which a log comes early enough


class EstimatorWarnings:
    """Warns, once in a fit, of what the metrics of an outer step tell against the hypergradient.

    Args:
        hypergradient: the estimator.
    """

    def __init__(self, hypergradient: Hypergradient) -> None:
        self.hypergradient = hypergradient
        self._warned: set[str] = set()

    def are_wanted_early(self, log_every: int) -> bool:
        """Whether the first log comes too late, if it ever does."""
        return self.has_own and not 0 < log_every <= _SOON

    @property
    def has_own(self) -> bool:
        """Whether the estimator has warnings of its own."""
        return type(self.hypergradient).warnings is not Hypergradient.warnings

    def tell(self, step: int, metrics: Mapping[str, float], inner_gradient: Callable[[], float], advice: str) -> None:
        """Warn.

        Args:
            step: the outer step.
            metrics: its means over tasks, with its ``loss`` and ``grad_norm``, the norm of the outer gradient.
            inner_gradient: finds the norm of ∂outer_loss/∂θ there.
            advice: what may be done where the inner steps carry no derivative.
        """
        found = self.hypergradient.warnings(metrics) if self.has_own else {}
        if metrics["grad_norm"] == 0 and "zero" not in self._warned and not metrics.get("indefinite", 0) > 0:
            found["zero"] = (
                f"the outer gradient is exactly 0: {self._why_zero(metrics['loss'], inner_gradient, advice)}"
            )
        for kind, warning in found.items():
            if kind not in self._warned:
                self._warned.add(kind)
                warn(f"outer step {step}: {warning}")

    def _why_zero(self, loss: float, inner_gradient: Callable[[], float], advice: str) -> str:
        carries = type(self.hypergradient).carries
        if self.hypergradient.steps == 0:
            return "the outer loss has a zero gradient where the outer variable stands, which may be its optimum"
        if "outer_loss" not in carries and loss == 0:  # the loss is that of the inner gradient
            return "where the inner loop starts, the inner gradient is 0 too: the inner problem is solved there"
        if "outer_loss" in carries and inner_gradient() == 0:
            return (
                "the outer loss has a zero gradient at the inner variable that was found, which may fit it exactly: "
                "nothing is left to learn there"
            )
        implicit = "outer_loss" in carries and "init" not in carries
        where = "at the inner variable that was found" if implicit else "where the inner loop starts"
        return (
            f"{where}, the inner gradient does not depend on the outer variable (zero weights under a penalty?); "
            f"{advice}"
        )
