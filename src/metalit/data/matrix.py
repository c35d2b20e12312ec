"""A matrix, generated or the user's own, which is the task of each outer step."""

import math
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from metalit.data.base import Split, task_keys
from metalit.data.cells import LARGEST, MISSING, decimal_comma, value_of
from metalit.data.draws import DrawsDataModule, expanded
from metalit.data.files import check_file, read_records, shown
from metalit.errors import InputError
from metalit.keys import fold, normal, permutation
from metalit.problem import Matrix


class MatrixDataModule(DrawsDataModule):
    """One matrix in each outer step, expanded and never copied; after :meth:`setup` it is ``matrix``.

    A generated matrix is A = G, or A = L Rᵀ + ``noise`` · G where ``rank`` is given; the entries of G ``[rows,
    columns]``, L ``[rows, rank]`` and R ``[columns, rank]`` are standard normal.

    Args:
        file: the user's matrix instead: a NumPy file (``.npy``) or a table of numbers without names of rows (``.csv``;
            a first line of texts alone is a header, blank lines are none). Empty cells, NA and NaN are missing.
        rows, columns, rank, noise: the matrix that is generated without a file.
        hide: the fraction of the observed entries that are hidden at random, ``round(hide · entries)`` of them.
        missing: whether entries of the file may be missing; they are not observed.
        seed: the seed of the generated matrix, of what is hidden, and of the draws' keys.

    Raises:
        InputError: from :meth:`setup`, with the way out: a number beyond its range; settings of a generated matrix
            beside a file; a file that is no matrix of numbers, or holds infinite or unexpectedly missing ones; a row
            or a column of which nothing is observed; more than one process.
    """

    matrix: Matrix

    def __init__(
        self,
        file: str | None = None,
        rows: int = 2,
        columns: int = 5,
        rank: int | None = None,
        noise: float = 0.0,
        hide: float = 0.0,
        missing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(1, None, seed)
        self.file = file
        self.shape = {"rows": rows, "columns": columns}
        self.rank = rank
        self.noise = noise
        self.hide = hide
        self.missing = missing

    def prepare(self) -> None:
        """Read or generate the matrix, and hide some of it."""
        self._check()
        key = fold(torch.tensor(self.seed), len(get_args(Split)))
        values = self._generated(key) if self.file is None else read_matrix(self.file, self.missing)
        observed = self._shown(~values.isnan(), fold(key, 4))
        self.matrix = Matrix(torch.where(observed, values, 0.0), observed, key)

    def draw(self, split: Split, index: Tensor) -> Matrix:
        """Return the matrix once for each index, ``[n]``."""
        return expanded(self.matrix, task_keys(self.seed, split, index))

    def _generated(self, key: Tensor) -> Tensor:
        rows, columns = self.shape.values()
        if self.rank is None:
            return normal(fold(key, 0), rows, columns)
        left, right = normal(fold(key, 1), rows, self.rank), normal(fold(key, 2), columns, self.rank)
        return left @ right.T + self.noise * normal(fold(key, 3), rows, columns)

    def _shown(self, observed: Tensor, key: Tensor) -> Tensor:
        """``observed`` less what is hidden."""
        order = permutation(key, observed.numel(), allowed=observed.flatten())
        shown = observed.flatten().scatter(0, order[: round(self.hide * int(observed.sum()))], False)
        shown = shown.reshape(observed.shape)
        for name, dim in (("row", 1), ("column", 0)):
            unseen = (~shown.any(dim)).nonzero().flatten().tolist()
            if unseen:
                hidden = bool(observed.any(dim)[unseen[0]])
                owner = f"data.hide={self.hide}" if hidden else f"data.file={self.file!r}"
                way_out = "hide less or change data.seed" if hidden else f"remove that {name}"
                raise InputError(
                    f"{owner}: {name} {unseen[0] + 1} has no observed entry, so that nothing determines its factor "
                    f"({len(unseen)} such {name}(s), counted from 1); {way_out}"
                )
        return shown

    def _check(self) -> None:
        for name, value in {**self.shape, "rank": self.rank}.items():
            if not (isinstance(value, int) and value >= 1) and not (name == "rank" and value is None):
                raise InputError(f"data.{name}={value!r} must be a whole number, at least 1")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise InputError(f"data.noise={self.noise} must be a finite standard deviation, at least 0")
        if not 0 <= self.hide < 1:
            raise InputError(f"data.hide={self.hide} must be a fraction, at least 0 and below 1")
        if self.noise and self.rank is None:
            raise InputError(
                f"data.noise={self.noise} is added to a product of factors; give their data.rank or leave it out"
            )
        if self.file is not None and self.rank is not None:
            raise InputError(
                f"data.rank={self.rank} is that of a generated matrix, beside data.file={self.file!r}; "
                "leave one of them out"
            )


def read_matrix(file: str, missing: bool) -> Tensor:
    """Read a matrix, ``[rows, columns]`` in ``float64``, NaN where an entry is missing.

    Args:
        file: a ``.npy`` or a ``.csv`` file.
        missing: whether entries may be missing.

    Raises:
        InputError: no such file, another kind of file, no matrix of real numbers, an infinite entry, or (unless
            ``missing``) one that is missing.
    """
    owner, path = f"data.file={file!r}", Path(file)
    reader = {".npy": _read_npy, ".csv": _read_csv}.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{owner}: the suffix {path.suffix!r} is neither '.npy' nor '.csv'; save it as one of those")
    check_file(file, "data.file")
    values = reader(path, owner)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{owner} has shape {list(values.shape)}; give a matrix [rows, columns] of one entry at least")
    for what, bad, way_out in (
        ("infinite", np.isinf(values), "mend it"),
        (f"beyond ±{LARGEST:.2g}, the largest of single precision", np.abs(values) > LARGEST, "change the units"),
        ("missing (NaN)", np.isnan(values) & (not missing), "mend it, or set data.missing=true to leave it unobserved"),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0] + 1
            raise InputError(
                f"{owner}: the entry in row {row}, column {column} (counted from 1) is {what}, {bad.sum()} in all; "
                f"{way_out}"
            )
    return torch.from_numpy(values)


def _read_npy(path: Path, owner: str) -> np.ndarray:
    try:
        # never unpickle: a pickle runs whatever its author wished
        values = np.load(path, allow_pickle=False)
    except Exception as cause:  # a broken header fails in many ways, down to Python's tokeniser
        raise InputError(f"{owner} is no array of numbers: {str(cause).partition(chr(10))[0]}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        found = f"values of type {values.dtype}" if isinstance(values, np.ndarray) else "an archive of arrays"
        raise InputError(f"{owner} holds {found}; save one array of real numbers")
    return np.array(values, dtype=np.float64, order="C")


def _read_csv(path: Path, owner: str) -> np.ndarray:
    cells, lines, separator = read_records(path, "data.file")
    comma = decimal_comma([cell.strip() for record in cells for cell in record], separator, owner)
    rows: list[list[float]] = []
    for position, (line, record) in enumerate(zip(lines, cells, strict=True)):
        values = [value_of(cell.strip(), comma) for cell in record]
        texts = [
            cell
            for cell, value in zip(record, values, strict=True)
            if np.isnan(value) and cell.strip().lower() not in MISSING
        ]
        if position == 0 and len(texts) == len(record):
            continue  # a header
        if texts:
            raise InputError(
                f"{owner}: line {line} holds {shown(texts[0], 40)}; every cell must be a number, so remove names of "
                "rows and mend the others"
            )
        if rows and len(values) != len(rows[0]):
            raise InputError(
                f"{owner}: line {line} has {len(values)} cell(s) and the first row {len(rows[0])}; mend the commas"
            )
        rows.append(values)
    return np.array(rows, dtype=np.float64)
