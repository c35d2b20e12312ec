"""Normalisation of inputs and outputs, and the way back to the user's units."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """Each column's mean and standard deviation: ``normalised = (value − mean) / std``, in ``float64``.

    >>> scaling = Scaling(x_mean=[10.0], x_std=[2.0], y_mean=[0.0], y_std=[1.0])
    >>> scaling.normalise_x(torch.tensor([[14.0]]))
    tensor([[2.]], dtype=torch.float64)
    """

    x_mean: Sequence[float]
    x_std: Sequence[float]
    y_mean: Sequence[float]
    y_std: Sequence[float]

    @classmethod
    def identity(cls, inputs: int, outputs: int) -> "Scaling":
        """The scaling that changes nothing."""
        return cls([0.0] * inputs, [1.0] * inputs, [0.0] * outputs, [1.0] * outputs)

    @property
    def changes(self) -> bool:
        """Whether it is not the identity."""
        return self != Scaling.identity(len(self.x_mean), len(self.y_mean))

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Scaling":
        """The scaling of ``[rows, columns]`` values; a constant column is only centred."""

        def spread(values: Tensor) -> list[float]:
            std = values.std(0, correction=0)
            # a constant column has a deviation of rounding errors
            constant = values.amax(0) == values.amin(0)
            return torch.where(constant, torch.ones_like(std), std).tolist()

        return cls(x.mean(0).tolist(), spread(x), y.mean(0).tolist(), spread(y))

    def normalise_x(self, x: Tensor) -> Tensor:
        """From the user's units, ``[..., inputs]``."""
        return (x.double() - _like(x, self.x_mean)) / _like(x, self.x_std)

    def normalise_y(self, y: Tensor) -> Tensor:
        """From the user's units, ``[..., outputs]``."""
        return (y.double() - _like(y, self.y_mean)) / _like(y, self.y_std)

    def restore_x(self, x: Tensor) -> Tensor:
        """To the user's units, ``[..., inputs]``."""
        return x.double() * _like(x, self.x_std) + _like(x, self.x_mean)

    def restore_y(self, y: Tensor) -> Tensor:
        """To the user's units, ``[..., outputs]``."""
        return y.double() * _like(y, self.y_std) + _like(y, self.y_mean)

    def state(self) -> dict[str, list[float]]:
        """Plain lists of numbers, safe to keep in a checkpoint; ``Scaling(**state)`` is the way back."""
        return {name: [float(value) for value in values] for name, values in asdict(self).items()}


def _like(values: Tensor, numbers: Sequence[float]) -> Tensor:
    return values.new_tensor(numbers, dtype=torch.float64)
