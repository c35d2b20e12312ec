"""The scaling of examples of classes, which may be larger than memory."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from metalit.data.classes.base import Classes
from metalit.data.scaling import Scaling
from metalit.errors import InputError

_BLOCK_BYTES = 2**24
_MOST_BYTES = 2**30


def class_scaling(classes: Classes, numbers: Tensor) -> Scaling:
    """The mean and standard deviation of each channel, or input, over the examples of some classes.

    Of more than a GiB, every second or third and so on is taken.

    Args:
        classes: all of them.
        numbers: which of them; the training ones.

    Raises:
        InputError: they are too large.
    """
    blocks = list(_examples(classes, numbers))
    shape = classes.values.shape[1:]
    axes = (0, *range(2, len(shape) + 1))
    count = sum(len(rows) for rows in blocks) * int(np.prod(shape[1:]))
    sums = [classes.values[rows].sum(axes, dtype=np.float64) for rows in blocks]
    mean = np.sum(sums, 0) / count
    centre = mean.reshape(-1, *[1] * (len(shape) - 1))
    with np.errstate(over="ignore"):
        squares = [np.square(classes.values[rows] - centre).sum(axes) for rows in blocks]
    std = np.sqrt(np.sum(squares, 0) / count)
    if not np.isfinite(std).all():
        raise InputError(
            "data.tasks.source: numbers so large that their variance is infinite; give them in other units"
        )
    std = np.where(std <= 1e-12 * np.abs(mean), 1.0, std)  # a constant has a deviation of rounding errors
    images = len(shape) == 3
    return Scaling(mean.tolist(), std.tolist(), [0.0], [1.0], x_shape=list(shape) if images else ())


def _examples(classes: Classes, numbers: Tensor) -> Iterator[np.ndarray]:
    """The rows of the examples of some classes, in blocks that fit well in memory."""
    rows = np.concatenate([classes.rows[classes.start[n] : classes.start[n + 1]].numpy() for n in numbers.tolist()])
    size = max(1, _BLOCK_BYTES // max(1, int(np.prod(classes.values.shape[1:])) * 8))
    rows.sort()  # as they lie on the disk
    rows = rows[:: 1 + len(rows) * classes.values[0].nbytes // _MOST_BYTES]
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
