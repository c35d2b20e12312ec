"""The smallest bilevel problem: f(θ, φ) = (θᵀθ)(φᵀφ), all of whose derivatives are known."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import grad

from metalit.errors import InputError
from metalit.problem import Problem
from metalit.tree import norm


class ThetaPhi(Problem):
    """f(θ, φ) = (θᵀθ)(φᵀφ) at both levels, from given θ₀ and φ₀.

    With s = φᵀφ: g = ∇θ f = 2sθ, J = ∂g/∂φ = 4θφᵀ, Jᵀg = 8s(θᵀθ)φ. :meth:`watch` logs both products as they were taken
    beside these, all at the (θ, φ) before the step: they hold for the hypergradient ``JTg``.

    Args:
        theta: θ₀, where θ starts unless it is warm-started.
        phi: φ₀.

    Raises:
        InputError: an empty vector.
    """

    theta: Tensor

    def __init__(self, theta: Sequence[float], phi: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("theta", theta), ("phi", phi)):
            if len(values) == 0:
                raise InputError(f"ThetaPhi: {name}={list(values)} must hold at least one number")
        self.register_buffer("theta", self.written("theta", theta))
        self.phi = nn.Parameter(self.written("phi", phi))

    def init(self, outer: dict[str, Tensor], task: Any) -> Tensor:
        """θ₀."""
        return self.theta

    def inner_loss(self, inner: Tensor, outer: dict[str, Tensor], task: Any, step: int) -> Tensor:
        """f."""
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner: Tensor, outer: dict[str, Tensor], task: Any) -> Tensor:
        """f."""
        return inner.dot(inner) * outer["phi"].dot(outer["phi"])

    def watch(
        self, start: Tensor, inner: Tensor, outer: dict[str, Tensor], gradient: dict[str, Tensor], task: Any
    ) -> dict[str, Tensor]:
        """f, and the norms of g and Jᵀg: as autograd took them, as the formulas have them, and of the difference."""
        phi = outer["phi"]
        square = phi.dot(phi)
        taken = {"theta": grad(self.outer_loss)(start, outer, task), "phi": gradient["phi"]}
        expected = {"theta": 2 * square * start, "phi": 8 * square * start.dot(start) * phi}
        values = {"f": self.outer_loss(start, outer, task)}
        for name, formula in expected.items():
            values[f"{name}_gradient_actual"] = norm(taken[name])
            values[f"{name}_gradient_expected"] = norm(formula)
            values[f"{name}_gradient_difference"] = norm(taken[name] - formula)
        return values

    def results(self, inner: Tensor, outer: dict[str, Tensor], task: Any) -> dict[str, dict[str, Tensor]]:
        """Both vectors."""
        return {"theta": {"theta": inner}, "phi": {"phi": outer["phi"]}}
