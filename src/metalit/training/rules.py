"""The step of one of torch's optimisers as a pure function, that a program can take many times in a row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class UpdateRule(ABC):
    """A step of an optimiser on all parameters at once, joined to one vector.

    Attributes:
        states: what torch's optimiser keeps of each parameter, of its shape, by its name there.
    """

    states: ClassVar[Sequence[str]]

    @abstractmethod
    def suits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is the rule of an optimiser, with all its options, from where its state is now."""

    @abstractmethod
    def steps_taken(self, state: Mapping[str, Any]) -> int:
        """The number of steps that a parameter's state tells of, as far as the coefficients need it."""

    @abstractmethod
    def count(self, state: dict[str, Any], steps: int) -> None:
        """Note in a parameter's state that so many steps were taken."""

    @abstractmethod
    def coefficients(self, group: Mapping[str, Any], step: int) -> Sequence[float]:
        """The numbers of step number ``step``, counted from 1, of a parameter group; a named tuple."""

    @abstractmethod
    def update(self, parameters: Tensor, states: Sequence[Tensor], gradient: Tensor, each: Tensor) -> list[Tensor]:
        """Take a step.

        Args:
            parameters, gradient: ``[parameters]``.
            states: each ``[parameters]``, in the order of :attr:`states`; zero before the first step.
            each: the coefficients of each parameter, ``[parameters, coefficients]``.

        Returns:
            The parameters after the step, and then the states.
        """


class AdamCoefficients(NamedTuple):
    """Of one step of Adam: all that depends on the options and on the number of the step, and not on the gradient."""

    step_size: Any  # lr / (1 − β₁ᵗ)
    mix_first: Any  # 1 − β₁
    keep_second: Any  # β₂
    mix_second: Any  # 1 − β₂
    correction: Any  # √(1 − β₂ᵗ)
    eps: Any
    weight_decay: Any  # of Adam, added to the gradient
    shrink: Any  # of AdamW, lr · weight decay, apart from the gradient


class AdamRule(UpdateRule):
    """``torch.optim.Adam`` and ``AdamW`` (Kingma, Ba 2015, algorithm 1; weight decay as torch has it).

    m ← m + (1 − β₁)(g − m),  v ← β₂v + (1 − β₂)g²,  φ ← φ − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
    """

    states = ("exp_avg", "exp_avg_sq")

    def suits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is one of the two, without ``amsgrad`` and ``maximize``; all parameters took as many steps."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return False
        plain = not any(group[flag] for group in optimizer.param_groups for flag in ("amsgrad", "maximize"))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return plain and len({self.steps_taken(optimizer.state.get(parameter, {})) for parameter in parameters}) == 1

    def steps_taken(self, state: Mapping[str, Any]) -> int:
        """Torch's own count."""
        return int(state.get("step", 0))

    def count(self, state: dict[str, Any], steps: int) -> None:
        """Add to it; torch keeps it as a tensor of its default type."""
        state["step"] = state.get("step", torch.tensor(0.0)) + steps

    def coefficients(self, group: Mapping[str, Any], step: int) -> AdamCoefficients:
        """Those of Adam."""
        (first, second), rate, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        decoupled = group["decoupled_weight_decay"]
        return AdamCoefficients(
            step_size=rate / (1 - first**step),
            mix_first=1 - first,
            keep_second=second,
            mix_second=1 - second,
            correction=(1 - second**step) ** 0.5,
            eps=group["eps"],
            weight_decay=0.0 if decoupled else decay,
            shrink=rate * decay if decoupled else 0.0,
        )

    def update(self, parameters: Tensor, states: Sequence[Tensor], gradient: Tensor, each: Tensor) -> list[Tensor]:
        """Adam's step."""
        by = AdamCoefficients(*each.unbind(1))
        first, second = states
        gradient = gradient + by.weight_decay * parameters
        first = first + by.mix_first * (gradient - first)
        second = by.keep_second * second + by.mix_second * gradient * gradient
        moved = by.step_size * first / (second.sqrt() / by.correction + by.eps)
        return [parameters - by.shrink * parameters - moved, first, second]


class SGDCoefficients(NamedTuple):
    """Of one step of SGD with momentum."""

    lr: Any
    weight_decay: Any
    keep: Any  # μ, and 0 in the first step
    mix: Any  # 1 − dampening, and 1 in the first step
    direct: Any  # 1 with Nesterov's momentum, else 0
    through: Any  # μ with Nesterov's momentum, else 1


class SGDRule(UpdateRule):
    """``torch.optim.SGD`` with momentum μ, as torch has it.

    b ← μb + (1 − dampening)g (b ← g in the first step),  φ ← φ − lr · b, or φ − lr · (g + μb) with Nesterov's momentum
    """

    states = ("momentum_buffer",)

    def suits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is one, with momentum in every group, without ``maximize``; all parameters, or none, moved yet."""
        if type(optimizer) is not torch.optim.SGD:
            return False
        plain = all(group["momentum"] and not group["maximize"] for group in optimizer.param_groups)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return plain and len({self.steps_taken(optimizer.state.get(parameter, {})) for parameter in parameters}) == 1

    def steps_taken(self, state: Mapping[str, Any]) -> int:
        """0 or 1: only the first step differs from the others."""
        return int(state.get("momentum_buffer") is not None)

    def count(self, state: dict[str, Any], steps: int) -> None:
        """Torch counts none."""

    def coefficients(self, group: Mapping[str, Any], step: int) -> SGDCoefficients:
        """Those of SGD."""
        momentum, nesterov = group["momentum"], group["nesterov"]
        return SGDCoefficients(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            keep=0.0 if step == 1 else momentum,
            mix=1.0 if step == 1 else 1 - group["dampening"],
            direct=float(nesterov),
            through=momentum if nesterov else 1.0,
        )

    def update(self, parameters: Tensor, states: Sequence[Tensor], gradient: Tensor, each: Tensor) -> list[Tensor]:
        """SGD's step."""
        by = SGDCoefficients(*each.unbind(1))
        gradient = gradient + by.weight_decay * parameters
        buffer = by.keep * states[0] + by.mix * gradient
        return [parameters - by.lr * (by.direct * gradient + by.through * buffer), buffer]


RULES: Sequence[UpdateRule] = (AdamRule(), SGDRule())
