"""Sources of rows: a table of inputs and of one target, real or a class."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metalit.data.cells import MISSING, line_of, numbers
from metalit.data.classes.base import Classes, ClassSource
from metalit.data.table import check_columns, read_table
from metalit.errors import InputError


class Rows(NamedTuple):
    """A table in the user's units.

    ``x`` is ``[rows, inputs]`` in ``float64``; ``y`` is ``[rows, 1]`` in ``float64``, or ``[rows]`` numbers of
    ``classes``, which are none where the target is real; ``columns`` names the inputs.
    """

    x: Tensor
    y: Tensor
    columns: Sequence[str]
    target: str
    classes: Sequence[str]


class RowSource(ClassSource):
    """Where rows come from; those of a class are its examples."""

    @abstractmethod
    def read(self) -> Rows:
        """Read and check the table.

        Raises:
            InputError: it cannot be used.
        """

    def read_classes(self) -> Classes:
        """Read the table, whose target must be a class.

        Raises:
            InputError: it is not.
        """
        try:
            rows = self.read()
        except InputError as error:
            raise InputError(str(error).replace("data.rows", "data.tasks.source")) from None
        if not rows.classes:
            raise InputError(
                f"data.tasks.source: {rows.target!r} is a real number; name a table whose target is a class"
            )
        return Classes.of(rows.classes, rows.y, rows.x.numpy(), columns=rows.columns)


SklearnName = Literal["diabetes", "breast_cancer", "digits"]
_TARGETS = {"diabetes": "progression", "breast_cancer": "diagnosis", "digits": "digit"}


@dataclass(frozen=True)
class SklearnTable(RowSource):
    """A real table that comes with scikit-learn, in its units of measurement.

    =================  ======  ========  =======================================================
    ``diabetes``       442     10        a measure of the disease's progression in a year (real)
    ``breast_cancer``  569     30        malignant or benign (2 classes)
    ``digits``         1,797   64        the digit of an 8 × 8 picture of values 0 … 16 (10 classes)
    =================  ======  ========  =======================================================

    >>> rows = SklearnTable("breast_cancer").read()
    >>> tuple(rows.x.shape), rows.target, rows.classes
    ((569, 30), 'diagnosis', ['malignant', 'benign'])
    """

    name: SklearnName

    def read(self) -> Rows:
        """Read the copy in scikit-learn's own folder.

        Raises:
            InputError: there is no such table.
        """
        if self.name not in get_args(SklearnName):
            raise InputError(f"data.rows.name={self.name!r} is none of {list(get_args(SklearnName))}; choose one")
        # late: it takes as long to import as torch
        from sklearn import datasets

        # scikit-learn's scaled diabetes is scaled by all rows, those of the test too
        options = {"scaled": False} if self.name == "diabetes" else {}
        table = getattr(datasets, f"load_{self.name}")(**options)
        classes = [str(name) for name in table.get("target_names", ())]
        y = torch.tensor(table.target, dtype=torch.int64 if classes else torch.float64)
        x = torch.tensor(table.data, dtype=torch.float64)
        columns = [str(name) for name in table.feature_names]
        return Rows(x, y if classes else y.unsqueeze(-1), columns, _TARGETS[self.name], classes)

    def read_classes(self) -> Classes:
        """Read the table; digits as images ``[1, 8, 8]``."""
        classes = super().read_classes()
        if self.name != "digits":
            return classes
        values = classes.values.reshape(-1, 1, 8, 8).astype(np.uint8)
        return classes._replace(values=values, columns=["grey"])


@dataclass(frozen=True)
class CsvRows(RowSource):
    """The rows of the user's CSV file.

    Args:
        file: a CSV file with a header.
        y: the column of the target.
        x: the columns of the inputs; all others if not given.
        classes: whether the target is a class: its distinct values, sorted, become the numbers 0, 1, …. Where all of
            them are numbers, they are sorted as numbers, and 1 and 1.0 are one.

    Raises:
        InputError: from :meth:`read`, with the way out: no such file or column, a column in two roles, an empty table,
            a cell that is no finite number, a row without its class, a single class.
    """

    file: str
    y: str
    x: Sequence[str] | None = None
    classes: bool = False

    def read(self) -> Rows:
        """Read and check the file."""
        if self.x is not None and (isinstance(self.x, str) or not self.x):
            raise InputError(f"data.rows.x={self.x!r} must be a list of a column at least; leave it out to take all")
        named = [self.y, *(self.x or ())]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise InputError(f"data.rows: {twice} stand twice among x and y; each column has one role")
        owner = f"data.rows.file={self.file!r}"
        frame = read_table(self.file, "data.rows.file")
        check_columns(frame, named, owner)
        columns = list(self.x) if self.x else _all_inputs(frame, self.y, owner)
        if not columns:
            raise InputError(f"{owner}: there is no column but the target {self.y!r}; add a column of inputs")
        hint = "" if self.x else ", or name the columns of inputs in data.rows.x"
        x = torch.tensor(_numbers(frame, columns, owner, hint))
        if self.classes:
            y, names = _classes(frame, self.y, owner)
            return Rows(x, y, columns, self.y, names)
        hint = ", or set data.rows.classes=true if the target is a class"
        return Rows(x, torch.tensor(_numbers(frame, [self.y], owner, hint)), columns, self.y, [])

    def read_classes(self) -> Classes:
        """Read the file; ``y`` is the column of the class, whatever ``classes`` says."""
        return super(CsvRows, replace(self, classes=True)).read_classes()


def _numbers(frame: pd.DataFrame, names: Sequence[str], owner: str, hint: str) -> np.ndarray:
    try:
        return numbers(frame, names, owner)
    except InputError as error:
        raise InputError(f"{error}{hint}") from None


def _all_inputs(frame: pd.DataFrame, target: str, owner: str) -> list[str]:
    """All columns but the target; those without a name and without a cell, as trailing commas make them, are none."""
    columns = [name for position, name in enumerate(frame.columns) if name or (frame.iloc[:, position] != "").any()]
    if "" in columns:
        raise InputError(
            f"{owner}: column {columns.index('') + 1} has no name, as numbers of rows have none; name it if it is an "
            "input, or name the columns of inputs in data.rows.x"
        )
    columns = [name for name in columns if name != target]
    check_columns(frame, columns, owner)
    return columns


def _classes(frame: pd.DataFrame, column: str, owner: str) -> tuple[Tensor, list[str]]:
    """The number of each row's class, ``[rows]``, and the names of the classes."""
    texts = frame[column]
    parsed = pd.to_numeric(texts, errors="coerce").to_numpy()  # whole numbers keep all their digits
    real = np.isfinite(parsed)
    empty = (texts == "").to_numpy()
    odd = texts.str.lower().isin(MISSING).to_numpy() | np.isinf(parsed)
    # among numbers, a "NaN" is a missing label and no class of its own
    absent = odd if real.any() and (real | odd).all() else empty
    if absent.any():
        row = int(np.flatnonzero(absent)[0])
        cell = "an empty cell" if empty[row] else repr(texts.iloc[row])
        more = f" ({absent.sum()} such cells in all)" if absent.sum() > 1 else ""
        raise InputError(
            f"{owner}: column {column!r} holds {cell} in line {line_of(frame, row)}{more}; "
            "every row must have a class, so give it or remove the row"
        )
    values = parsed if real.all() else texts.to_numpy(dtype=object)
    found, number = np.unique(values, return_inverse=True)
    names = [f"{value:.15g}" if isinstance(value, float) else str(value) for value in found.tolist()]
    if len(names) < 2:
        raise InputError(
            f"{owner}: column {column!r} holds a single class, {names[0]!r}; add rows of another or name another column"
        )
    return torch.from_numpy(number.astype(np.int64)), names
