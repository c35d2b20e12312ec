"""Gradient descent whose step sizes are learned, one for each entry of the inner variable."""

from dataclasses import dataclass

from metalit.inner.learned import RATE, Domain, Learned, Number, check_number
from metalit.inner.sgd import SGD


@dataclass(frozen=True)
class MetaSGD(SGD):
    """Meta-SGD: θ ← θ − α ⊙ ∇θ L(θ), with α an outer parameter of θ's shape (Li et al. 2017, eq. 2).

    It is :class:`SGD` with ``lr=Learned(lr, per="entry")``. After one step, ∂L_query/∂α = −∇L_support(θ) ⊙
    ∇L_query(θ′). The learned α may become negative, as in the paper.

    Args:
        lr: the value that every entry of α starts from.
        momentum, nesterov, weight_decay, schedule, clip_norm: see :class:`SGD`.

    Raises:
        InputError: see :class:`SGD`.
    """

    lr: float = 0.01

    def hyperparameters(self) -> dict[str, tuple[Number, Domain]]:
        """Those of SGD, with a rate of each entry."""
        check_number("MetaSGD", "lr", self.lr, RATE)
        return {**super().hyperparameters(), "lr": (Learned(self.lr, "entry"), RATE)}
