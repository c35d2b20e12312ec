"""Whether the inner point is stationary, for estimators that are right there alone."""

from collections.abc import Mapping

from metalit.errors import InputError


def check_stationary(owner: str, share: float) -> None:
    """Raise an :class:`InputError` unless the share of the inner gradient that counts as solved is positive."""
    if not share > 0:
        raise InputError(f"{owner}: stationary={share} must be positive, such as 0.01")


def not_stationary(owner: str, metrics: Mapping[str, float], share: float) -> dict[str, str]:
    """The warning, by kind, where more than ``share`` of the inner gradient at ``init`` is left."""
    if metrics["inner_grad_ratio"] <= share:
        return {}
    told = (
        f"{owner} needs a stationary inner point, but the norm of the inner gradient is "
        f"{metrics['inner_grad_norm']:.3g}, {100 * metrics['inner_grad_ratio']:.3g} % of that at init; take more inner "
        "steps (hypergradient.steps), a larger inner lr or a warm start, or use Unrolled"
    )
    return {"not stationary": told}
