"""Classes from arrays of NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalit.data.classes.base import Classes, ClassSource, class_numbers
from metalit.data.files import check_file, shown
from metalit.errors import InputError

_OWNER = "data.tasks.source.file"
_CHANNELS = (1, 3)
_BLOCK_BYTES = 2**24
_TAKEN_AS_THEY_ARE = [np.dtype(name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "f2", "f4", "f8")]


@dataclass(frozen=True)
class Arrays(ClassSource):
    """A file ``.npz`` with the arrays ``x``, the examples, and ``y``, the class of each; or a pair of ``.npy``.

    x is ``[examples, height, width]``, ``[examples, channels, height, width]``, ``[examples, height, width, channels]``
    where there are 1 or 3 channels, or ``[examples, inputs]`` of numbers. y are whole numbers or names. A ``.npy`` is
    read by memory map, so that it may be larger than memory; it is fastest where examples of a class lie together.

    Args:
        file: the ``.npz``, or the ``.npy`` of x.
        y: the ``.npy`` of y, beside one of x.

    Raises:
        InputError: from :meth:`read_classes`, with the way out: no such file or array; arrays of another form, of
            different lengths or of objects; a number that is not finite.
    """

    file: str
    y: str | None = None

    def read_classes(self) -> Classes:
        """Read y, and x where it is not mapped."""
        x, y = self._opened()
        owner = f"{_OWNER}={shown(self.file)}"
        check_rows({"x": x, "y": y}, owner)
        if len(x) != len(y):
            raise InputError(f"{owner}: x has {len(x)} example(s) and y has {len(y)}; each example has one class")
        names, numbers = class_numbers(class_labels(y, owner))
        return Classes.of(names, numbers, example_values(x, owner))

    def shape(self) -> Sequence[int]:
        """That of x, whose numbers are not looked at."""
        return _formed(self._opened()[0], f"{_OWNER}={shown(self.file)}").shape[1:]

    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        found = load_array(self.file, _OWNER)
        owner = f"{_OWNER}={shown(self.file)}"
        if isinstance(found, np.ndarray):
            if self.y is None:
                raise InputError(f"{owner} holds x alone; name the file of y in data.tasks.source.y")
            labels = load_array(self.y, "data.tasks.source.y")
            if not isinstance(labels, np.ndarray):
                raise InputError(f"data.tasks.source.y={self.y!r} must be a .npy file of one array")
            return found, labels
        if self.y is not None:
            raise InputError(f"data.tasks.source.y={self.y!r}: {owner} holds x and y; leave it out")
        missing = [name for name in ("x", "y") if name not in found]
        if missing:
            raise InputError(f"{owner} holds the arrays {sorted(found)}, but no {missing[0]!r}; save it with x and y")
        return found["x"], found["y"]


def load_array(file: str, owner: str) -> Any:
    """Map the array of a ``.npy``, or read those of a ``.npz`` by name; objects are never unpickled.

    Raises:
        InputError: there is no such file, or none of these.
    """
    path, told = check_file(file, owner), f"{owner}={shown(str(file))}"
    try:
        mapped = np.load(path, allow_pickle=False, mmap_mode="r")
        return mapped if isinstance(mapped, np.ndarray) else {name: mapped[name] for name in mapped.files}
    except Exception as cause:  # damage comes as any error of NumPy, of zipfile, of zlib, of tokenize
        if "Object arrays" in str(cause) or "Python objects" in str(cause):
            raise InputError(
                f"{told} holds Python objects, which may run any program when read; save x as numbers and y as numbers "
                "or texts"
            ) from None
        pickled = "pickled data" in str(cause)  # as which NumPy takes whatever it does not know
        why = "it begins like neither" if pickled else f"{type(cause).__name__}: {cause}"
        raise InputError(f"{told} is no .npz or .npy file that can be read: {why}") from None


def check_rows(arrays: Mapping[str, np.ndarray], owner: str) -> None:
    """Check that each array has rows.

    Raises:
        InputError: one is a single value.
    """
    single = [name for name, array in arrays.items() if array.ndim == 0]
    if single:
        raise InputError(f"{owner}: {single[0]} is a single value; save it as an array with a row for each example")


def class_labels(y: np.ndarray, owner: str) -> np.ndarray:
    """The class of each example, ``[examples]`` whole numbers or texts.

    Raises:
        InputError: it is neither.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise InputError(f"{owner}: y is {list(y.shape)}; it must be [examples], one class for each")
    if y.dtype.kind == "S":
        try:
            y = np.char.decode(y, "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{owner}: y holds bytes that are no text in UTF-8; save it as texts or numbers") from None
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.floor(y)).all():
        y = y.astype(np.int64)
    if y.dtype.kind not in "biuU":
        raise InputError(f"{owner}: y is of {y.dtype}; a class is a whole number or a text")
    return y


def example_values(x: np.ndarray, owner: str) -> np.ndarray:
    """Examples as ``[examples, channels, height, width]`` or ``[examples, inputs]``, of numbers that are finite.

    Raises:
        InputError: they are of another form, or no such numbers.
    """
    values = _formed(x, owner)
    size = max(1, _BLOCK_BYTES // max(1, x[0].nbytes))
    for first in range(0, len(x) if x.dtype.kind == "f" else 0, size):
        bad = ~np.isfinite(x[first : first + size]).reshape(len(x[first : first + size]), -1).all(1)
        if bad.any():
            raise InputError(f"{owner}: example {first + int(bad.argmax())} of x holds a number that is not finite")
    return values


def tensor_of(values: np.ndarray) -> Tensor:
    """Numbers as a tensor of their own type, or of float64 where torch has none such, or not all of its operations."""
    values = np.ascontiguousarray(values)
    # unsigned, or of another machine's order, or longer
    return torch.from_numpy(values if values.dtype in _TAKEN_AS_THEY_ARE else values.astype(np.float64))


def _formed(x: np.ndarray, owner: str) -> np.ndarray:
    if x.dtype.kind not in "biuf":
        raise InputError(f"{owner}: x is of {x.dtype}; it must hold numbers")
    if not (2 <= x.ndim <= 4 and x.size):
        raise InputError(
            f"{owner}: x is {list(x.shape)}; it must be [examples, height, width], [examples, channels, height, width] "
            "or [examples, inputs]"
        )
    if x.ndim == 3:
        return x[:, None]
    last = x.ndim == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS
    return x.transpose(0, 3, 1, 2) if last else x
