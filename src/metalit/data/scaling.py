"""Normalisation of inputs and outputs, and the way back to the user's units."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from metalit.errors import InputError

_MARGIN = 0.1  # of the range, beyond which is far


@dataclass(frozen=True)
class Scaling:
    """Each column's mean and standard deviation: ``normalised = (value − mean) / std``, in ``float64``.

    Of images, ``x_shape`` is ``[channels, height, width]``, and a column of x is a channel. ``x_min`` … ``y_max`` are
    the range of the training data, where it is known; they scale nothing.

    >>> scaling = Scaling(x_mean=[10.0], x_std=[2.0], y_mean=[0.0], y_std=[1.0])
    >>> scaling.normalise_x(torch.tensor([[14.0]]))
    tensor([[2.]], dtype=torch.float64)
    """

    x_mean: Sequence[float]
    x_std: Sequence[float]
    y_mean: Sequence[float]
    y_std: Sequence[float]
    x_min: Sequence[float] = field(default=(), compare=False)
    x_max: Sequence[float] = field(default=(), compare=False)
    y_min: Sequence[float] = field(default=(), compare=False)
    y_max: Sequence[float] = field(default=(), compare=False)
    x_shape: Sequence[int] = ()

    @classmethod
    def identity(cls, inputs: int, outputs: int) -> "Scaling":
        """The scaling that changes nothing."""
        return cls([0.0] * inputs, [1.0] * inputs, [0.0] * outputs, [1.0] * outputs)

    @classmethod
    def restored(cls, state: Any) -> "Scaling":
        """The scaling of this :meth:`state`.

        Raises:
            InputError: it is of no scaling.
        """
        names = {each.name for each in fields(cls)}
        least = {"x_mean", "x_std", "y_mean", "y_std"}
        numbers = isinstance(state, dict) and all(
            isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
            for values in state.values()
        )
        if not (numbers and least <= state.keys() <= names):
            raise InputError(f"ckpt_path: the checkpoint's scaling {state} is none; use another checkpoint")
        return cls(**state)

    @property
    def changes(self) -> bool:
        """Whether it is not the identity."""
        return self != Scaling.identity(len(self.x_mean), len(self.y_mean))

    @classmethod
    def of(cls, x: Tensor, y: Tensor, plain: Tensor | None = None) -> "Scaling":
        """The scaling of ``[rows, columns]`` values; a constant column is only centred.

        Args:
            x, y: the values.
            plain: ``[inputs]``, whether a column of x stays as it is, as those of 0 and 1 do.
        """

        def spread(values: Tensor) -> Tensor:
            std = values.std(0, correction=0)
            # a constant column has a deviation of rounding errors
            constant = values.amax(0) == values.amin(0)
            return torch.where(constant, torch.ones_like(std), std)

        plain = torch.zeros(x.shape[1], dtype=torch.bool) if plain is None else plain
        x_mean, x_std = torch.where(plain, 0.0, x.mean(0)), torch.where(plain, 1.0, spread(x))
        ranges = (values.tolist() for side in (x, y) for values in (side.amin(0), side.amax(0)))
        return cls(x_mean.tolist(), x_std.tolist(), y.mean(0).tolist(), spread(y).tolist(), *ranges)

    def difference(self, kept: "Scaling") -> str | None:
        """The name of the first part in which another scaling differs; None where it is this one, but for the rounding
        errors of other machines.
        """
        if list(self.x_shape) != list(kept.x_shape):
            return "x_shape"
        for name, units in (
            ("x_mean", self.x_std),
            ("y_mean", self.y_std),
            ("x_std", self.x_std),
            ("y_std", self.y_std),
        ):
            own, other = getattr(self, name), getattr(kept, name)
            pairs = zip(own, other, units, strict=False)
            if len(own) != len(other) or any(abs(a - b) > 1e-9 * (abs(a) + unit) for a, b, unit in pairs):
                return name
        return None

    def normalise_x(self, x: Tensor) -> Tensor:
        """From the user's units, ``[..., inputs]`` or ``[..., channels, height, width]``."""
        return (x.double() - self._of_x(x, self.x_mean)) / self._of_x(x, self.x_std)

    def normalise_y(self, y: Tensor) -> Tensor:
        """From the user's units, ``[..., outputs]``."""
        return (y.double() - _like(y, self.y_mean)) / _like(y, self.y_std)

    def restore_x(self, x: Tensor) -> Tensor:
        """To the user's units, likewise."""
        return x.double() * self._of_x(x, self.x_std) + self._of_x(x, self.x_mean)

    def restore_y(self, y: Tensor) -> Tensor:
        """To the user's units, ``[..., outputs]``."""
        return y.double() * _like(y, self.y_std) + _like(y, self.y_mean)

    def restore_deviation(self, deviation: Tensor) -> Tensor:
        """Standard deviations of outputs to the user's units, ``[..., outputs]``."""
        return deviation.double() * _like(deviation, self.y_std)

    def outside(self, x: Tensor, y: Tensor, x_names: Sequence[str], y_names: Sequence[str]) -> str | None:
        """Say which columns lie far outside of the training data's range, more than a tenth of it beyond either end.

        Args:
            x, y: ``[rows, inputs]`` and ``[rows, outputs]`` in the user's units; what is NaN is asked, and inside.
            x_names, y_names: how the columns are called.

        Returns:
            A list such as "'dose' from 5 to 70, trained on 0 to 20", or None.
        """
        found = []
        sides = ((x, x_names, self.x_min, self.x_max), (y, y_names, self.y_min, self.y_max))
        for values, names, lows, highs in sides:
            for column, name, low, high in zip(values.double().unbind(1), names, lows, highs, strict=False):
                given, beyond = column[~column.isnan()].tolist(), _MARGIN * (high - low)
                if given and (min(given) < low - beyond or max(given) > high + beyond):
                    spread = f"from {min(given):.4g} to {max(given):.4g}"
                    found.append(f"{name!r} {spread}, trained on {low:.4g} to {high:.4g}")
        return "; ".join(found) or None

    def state(self) -> dict[str, list[float] | list[int]]:
        """Plain lists of numbers, safe to keep in a checkpoint; ``Scaling(**state)`` is the way back."""
        kept = {name: [*values] for name, values in asdict(self).items()}
        shape = kept.pop("x_shape")
        return {**kept, "x_shape": shape} if shape else kept

    def _of_x(self, x: Tensor, numbers: Sequence[float]) -> Tensor:
        return _like(x, numbers).reshape(-1, *[1] * (len(self.x_shape) - 1))


def known(scaling: Scaling | None) -> Scaling:
    """This scaling.

    Raises:
        InputError: it is None, since nothing was trained on.
    """
    if scaling is None:
        raise InputError(
            "data.tasks: all is held out, so how to normalise it is what a trained learner knows; give its checkpoint "
            "with --ckpt_path"
        )
    return scaling


def _like(values: Tensor, numbers: Sequence[float]) -> Tensor:
    return values.new_tensor(numbers, dtype=torch.float64)
