"""Examples of the user's classes, and what is asked which of them it is of."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metalit.data.base import TaskDistribution
from metalit.data.cells import missing_cells, numbers
from metalit.data.classes.arrays import check_rows, class_labels, example_values, load_array, tensor_of
from metalit.data.classes.image_folder import folder_files, read_images
from metalit.data.files import shown
from metalit.data.rows import CsvRows
from metalit.data.table import check_columns, read_table
from metalit.errors import InputError

_FOLDER, _FILE = "data.predict_folder", "data.predict_file"
_ARRAYS = ("support_x", "support_y", "query_x")


class AskedClasses(ABC):
    """One task of classes of the user's.

    Attributes:
        owner: the argument that names it, and its value, for messages.
        source: the folder or the file.
        labels: the class of each example.
        frame: a row for each one that is asked, which answers are written beside.
        answer: the name of the column of answers.
    """

    owner: str
    source: Path
    labels: Sequence[str] | Sequence[int]
    frame: pd.DataFrame
    answer: str = "predicted"

    @abstractmethod
    def values(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The examples and what is asked, each ``[rows, *shape]``, in the user's units.

        Raises:
            InputError: an image that cannot be read; rows that are not of this shape.
        """

    def named(self, row: int) -> str:
        """How one that is asked is called."""
        return str(self.frame.iloc[row, 0])

    def rows(self) -> Sequence[int]:
        """The rows of the frame that are asked, and no examples."""
        return range(len(self.frame))


class AskedPictures(AskedClasses):
    """A folder: its subfolders hold examples of a class each, and the images that lie beside them are asked.

    Args:
        folder: its name.

    Raises:
        InputError: what :func:`~metalit.data.classes.image_folder.folder_files` raises; no image is asked.
    """

    def __init__(self, folder: str) -> None:
        found, self._asked = folder_files(folder, _FOLDER, True)
        self.owner = told = f"{_FOLDER}={shown(folder)}"
        if not self._asked:
            raise InputError(f"{told}: no image lies beside its folders, so none is asked; put those to be named there")
        self.source = Path(folder).resolve()
        self.labels = [name for name, files in found.items() for _ in files]
        self._files = [file for files in found.values() for file in files]
        self.frame = pd.DataFrame({"file": [file.name for file in self._asked]})

    def values(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the images as those that were trained on."""
        if len(shape) != 3:
            raise InputError(f"{self.owner}: what is learned takes rows of {shape[0]} number(s), and no images")
        examples, asked = (read_images(files, shape, _FOLDER) for files in (self._files, self._asked))
        return torch.from_numpy(examples), torch.from_numpy(asked)


class AskedArrays(AskedClasses):
    """A file ``.npz`` of the arrays ``support_x``, examples, ``support_y``, their classes, and ``query_x``, asked.

    x are of any form that :class:`~metalit.data.classes.arrays.Arrays` takes.

    Args:
        file: its name.

    Raises:
        InputError: one is missing, or cannot be used.
    """

    def __init__(self, file: str) -> None:
        arrays = load_array(file, _FILE)
        self.owner = told = f"{_FILE}={shown(file)}"
        missing = [name for name in _ARRAYS if isinstance(arrays, np.ndarray) or name not in arrays]
        if missing:
            there = "a single array" if isinstance(arrays, np.ndarray) else f"the arrays {sorted(arrays)}"
            raise InputError(f"{told} holds {there}, but no {missing[0]!r}; save it with {', '.join(_ARRAYS)}")
        check_rows({name: arrays[name] for name in _ARRAYS}, told)
        examples, labels, asked = (arrays[name] for name in _ARRAYS)
        if len(examples) != len(labels):
            raise InputError(f"{told}: support_x has {len(examples)} example(s) and support_y has {len(labels)}")
        if not len(asked):
            raise InputError(f"{told}: query_x has no row, so nothing is asked")
        self.labels = class_labels(labels, told).tolist()
        self._examples, self._asked = (tensor_of(example_values(values, told)) for values in (examples, asked))
        self.source = Path(file)
        self.frame = pd.DataFrame({"row": range(len(asked))})

    def values(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The arrays."""
        return self._examples, self._asked

    def named(self, row: int) -> str:
        """The number of the row."""
        return f"row {row}"


class AskedRows(AskedClasses):
    """A table whose rows with a class are examples, and whose others are asked; all of them get an answer.

    Args:
        file: a file as those of :func:`~metalit.data.table.read_table`.
        columns: of the inputs.
        target: the column of the class.

    Raises:
        InputError: what that and :func:`~metalit.data.cells.numbers` raise; no example, or none that is asked.
    """

    def __init__(self, file: str, columns: Sequence[str], target: str) -> None:
        self.owner = told = f"{_FILE}={shown(file)}"
        self.frame = read_table(file, _FILE)
        check_columns(self.frame, [*columns, target], told)
        self._x = torch.tensor(numbers(self.frame, columns, told))
        self._given = torch.tensor(~missing_cells(self.frame, [target])[:, 0])
        if not self._given.any() or self._given.all():
            what = "no row asks; leave its cell empty" if self._given.any() else "no row is an example; give its class"
            raise InputError(f"{told}: of the column {target!r} {what} in some of them")
        self.labels = self.frame[target][self._given.numpy()].tolist()
        self.source = Path(file)
        self.answer = f"{target}_predicted"

    def values(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows."""
        return self._x[self._given], self._x

    def named(self, row: int) -> str:
        """The line of the file."""
        return f"line {self.frame.index[row]}"

    def rows(self) -> Sequence[int]:
        """Those without a class."""
        return (~self._given).nonzero().flatten().tolist()


def asked_classes(tasks: TaskDistribution, folder: str | None, file: str | None) -> AskedClasses:
    """Read what is asked of a learner of classes, without the data that it was trained on.

    Args:
        tasks: what it was trained on; of a table it names the columns.
        folder, file: one of them is given.

    Raises:
        InputError: what :class:`AskedPictures`, :class:`AskedArrays` and :class:`AskedRows` raise.
    """
    if folder is not None:
        return AskedPictures(folder)
    assert file is not None
    if Path(file).suffix.lower() == ".npz":
        return AskedArrays(file)
    source = getattr(tasks, "source", None)
    table = source if isinstance(source, CsvRows) else None
    columns = table.x if table else None
    if columns is None and len(tasks.input_shape()) == 3:
        raise InputError(f"{_FILE}={shown(file)}: what is learned takes images; give {_FOLDER}, or an .npz of them")
    return AskedRows(file, columns or tasks.columns.x, table.y if table else tasks.columns.y[0])
