"""Sources of classes: a number of examples of each, images or rows of numbers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Classes(NamedTuple):
    """Examples by class, in the user's units.

    The examples of class c are the rows ``rows[start[c]:start[c + 1]]`` of ``values``.

    Attributes:
        names: of the classes, each once.
        start: ``[classes + 1]``
        rows: ``[examples]``
        values: ``[rows, channels, height, width]`` of images or ``[rows, inputs]`` of numbers; it may be a memory map.
        groups: what each class is one of, as a character is of an alphabet; its name is ``group/class`` then. None
            where there are no such groups.
        columns: the names of the inputs, or of the channels.
    """

    names: Sequence[str]
    start: Tensor
    rows: Tensor
    values: np.ndarray
    groups: Sequence[str] | None
    columns: Sequence[str]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        numbers: Tensor,
        values: np.ndarray,
        groups: Sequence[str] | None = None,
        columns: Sequence[str] = (),
    ) -> "Classes":
        """The classes of rows of which each has the ``[rows]`` number of its class."""
        start = torch.cat([numbers.new_zeros(1), numbers.bincount(minlength=len(names)).cumsum(0)])
        return cls(names, start, numbers.argsort(stable=True), values, groups, columns or _channels(values.shape[1]))

    @property
    def counts(self) -> Tensor:
        """The number of examples of each class, ``[classes]``."""
        return self.start.diff()


class ClassSource(ABC):
    """Where classes come from."""

    @abstractmethod
    def read_classes(self) -> Classes:
        """Read and check all examples.

        Raises:
            InputError: they cannot be used.
        """

    def shape(self) -> Sequence[int]:
        """The shape of one example, without reading them all where that can be."""
        return self.read_classes().values.shape[1:]


def _channels(count: int) -> list[str]:
    """What the channels of images are called."""
    known = {1: ["grey"], 3: ["red", "green", "blue"]}
    return known.get(count, [f"channel {number}" for number in range(count)])


def class_numbers(labels: Sequence[str] | np.ndarray) -> tuple[list[str], Tensor]:
    """The different labels, sorted, and the number of each one's among them."""
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return [str(name) for name in names], torch.from_numpy(numbers.astype(np.int64))
