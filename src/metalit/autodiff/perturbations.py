"""How weights are perturbed: by noise, or towards a higher loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalit.autodiff.names import matching
from metalit.errors import InputError, check_not_negative
from metalit.keys import fold, normal

Parameters = dict[str, Tensor]


class Perturbation(ABC):
    """What is added to the weights before the gradient is taken."""

    @abstractmethod
    def __call__(self, parameters: Parameters, gradient: Callable[[], Parameters], key: Tensor | None) -> Parameters:
        """Return α for each parameter; one that is left out is not perturbed.

        Args:
            parameters: the trainable weights w by name.
            gradient: returns ∇L(w) by name; it is computed when this is first called.
            key: a key of :mod:`metalit.keys` for what is random.
        """


@dataclass(frozen=True)
class WeightNoise(Perturbation):
    """Gaussian noise, ``α ~ scale · N(0, 1)`` for each entry, as a function of the key.

    Args:
        scale: the standard deviation, in the units of the weights.
        names: shell patterns of the parameters that get noise.

    Raises:
        InputError: a scale that is negative or not finite; on a call, no key, a pattern that matches nothing, or a
            complex parameter.

    >>> noise = WeightNoise(0.1, names="*.weight")
    >>> parameters = {"out.weight": torch.zeros(2), "out.bias": torch.zeros(1)}
    >>> noise(parameters, dict, torch.tensor(7))
    {'out.weight': tensor([0.0774, 0.0576])}
    """

    scale: float
    names: str | Sequence[str] = ("*",)

    def __post_init__(self) -> None:
        check_not_negative("WeightNoise", "scale", self.scale)

    def __call__(self, parameters: Parameters, gradient: Callable[[], Parameters], key: Tensor | None) -> Parameters:
        if key is None:
            raise InputError("key: None, but WeightNoise draws from a key of metalit.keys; give key=torch.tensor(0)")
        chosen = matching(parameters, self.names)
        if bad := [name for name in chosen if parameters[name].is_complex()]:
            raise InputError(f"WeightNoise: {bad[0]!r} is complex, and noise is drawn for real numbers; leave it out")
        # numbered among all names, so that a choice of names does not change the draws
        places = {name: index for index, name in enumerate(parameters)}
        draws = {name: normal(fold(key, places[name]), *parameters[name].shape) for name in chosen}
        return {name: self.scale * draw.to(parameters[name]) for name, draw in draws.items()}


@dataclass(frozen=True)
class SAM(Perturbation):
    """The step to the highest loss within a ball, to first order: ``ε = ρ g/‖g‖`` with the norm over all parameters.

    The gradient at ``w + ε`` leads to flat minima (Foret et al. 2021, "Sharpness-aware minimization for efficiently
    improving generalization", equation 2). A zero gradient gives ε = 0.

    Args:
        rho: the radius ρ, in the units of the weights; 0 gives the plain gradient.

    Raises:
        InputError: a radius that is negative or not finite.

    >>> SAM(rho=0.5)({"w": torch.ones(2)}, lambda: {"w": torch.tensor([3.0, 4.0])}, None)
    {'w': tensor([0.3000, 0.4000])}
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        check_not_negative("SAM", "rho", self.rho)

    def __call__(self, parameters: Parameters, gradient: Callable[[], Parameters], key: Tensor | None) -> Parameters:
        return _towards(gradient(), self.rho) if self.rho else _zero(parameters)


@dataclass(frozen=True)
class AdaptiveSAM(Perturbation):
    """SAM in a ball that scales with the weights: ``ε = ρ T²g/‖Tg‖`` with ``T = |w| + η`` for each entry.

    Kwon et al. 2021, "ASAM: Adaptive sharpness-aware minimization for scale-invariant learning of deep neural
    networks".

    Args:
        rho: the radius ρ, relative to the weights; 0 gives the plain gradient.
        eta: η, by which weights near zero move as well.

    Raises:
        InputError: a value that is negative or not finite.

    >>> AdaptiveSAM(rho=1.0, eta=0.0)({"w": torch.tensor([-3.0, 2.0])}, lambda: {"w": torch.tensor([1.0, 2.0])}, None)
    {'w': tensor([1.8000, 1.6000])}
    """

    rho: float = 0.5
    eta: float = 0.01

    def __post_init__(self) -> None:
        check_not_negative("AdaptiveSAM", "rho", self.rho)
        check_not_negative("AdaptiveSAM", "eta", self.eta)

    def __call__(self, parameters: Parameters, gradient: Callable[[], Parameters], key: Tensor | None) -> Parameters:
        if not self.rho:
            return _zero(parameters)
        size = {name: parameter.abs() + self.eta for name, parameter in parameters.items()}
        step = _towards({name: size[name] * value for name, value in gradient().items()}, self.rho)
        return {name: size[name] * part for name, part in step.items()}


def _towards(direction: Parameters, length: float) -> Parameters:
    """``length · direction/‖direction‖``; zero stays zero."""
    # at least in float32: the squares of half-precision gradients overflow
    wide = {name: part.to(torch.promote_types(part.dtype, torch.float32)) for name, part in direction.items()}
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in wide.values()]))
    total = total.where(total != 0, torch.ones_like(total))
    return {name: (part / total * length).to(direction[name].dtype) for name, part in wide.items()}


def _zero(parameters: Parameters) -> Parameters:
    return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
