"""The user's tables: reading, checking and grouping by task."""

import csv
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from metalit.errors import InputError


class Columns(NamedTuple):
    """The names of the column of the task, of the inputs and of the outputs."""

    task: str
    x: Sequence[str]
    y: Sequence[str]


class Asked(NamedTuple):
    """A table of new tasks: rows with y are support, rows without are asked.

    ``frame`` is the user's table; ``rows`` holds, by task, the positions of its rows, support before asked, and
    ``shots`` the number of support rows; ``x`` and ``y`` are its numbers, ``[rows, columns]``, y NaN where asked.
    """

    frame: pd.DataFrame
    rows: dict[str, list[int]]
    shots: dict[str, int]
    x: np.ndarray
    y: np.ndarray


def read_table(file: str | Path, owner: str, task: str | None) -> pd.DataFrame:
    """Read a CSV file; the names in the column ``task``, if there is one, stay as they are written.

    Raises:
        InputError: no such file, no table in it, no row, or rows of more cells than the header.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{owner}={str(file)!r}: there is no such file (looked in {Path.cwd()})")
    try:
        # na_values: an empty cell is missing; a text such as "NA" may be the name of a task
        frame = pd.read_csv(
            path, keep_default_na=False, na_values=[""], skipinitialspace=True, dtype={task: str} if task else None
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as cause:
        raise InputError(f"{owner}={str(file)!r} is no CSV table: {str(cause).strip()}") from None
    if frame.empty:
        raise InputError(f"{owner}={str(file)!r} has no row below its header")
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes the first column for names of rows then, and shifts all others
        raise InputError(f"{owner}={str(file)!r}: its rows have more cells than its header; mend the commas")
    frame.attrs["file"] = str(path)
    return frame


def line_of(frame: pd.DataFrame, row: int) -> int:
    """The line of the file that a row of its table ends in: blank lines and line breaks in quotes count."""
    with open(frame.attrs["file"], newline="") as handle:
        reader = csv.reader(handle)
        lines = (reader.line_num for record in reader if record)
        return next(islice(lines, row + 1, None))


def check_columns(frame: pd.DataFrame, names: Sequence[str], owner: str) -> None:
    """Raise an :class:`InputError` for a column that the table lacks, naming the nearest one."""
    for name in names:
        if name not in frame.columns:
            near = get_close_matches(name, map(str, frame.columns), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name one of those"
            raise InputError(f"{owner}: there is no column {name!r}, only {list(frame.columns)}; {hint}")


def check_named(frame: pd.DataFrame, task: str, owner: str) -> None:
    """Raise an :class:`InputError` for a row that does not say which task it belongs to."""
    unnamed = np.flatnonzero(frame[task].isna())
    if len(unnamed):
        line = line_of(frame, unnamed[0])
        raise InputError(f"{owner}: column {task!r} holds an empty cell in line {line}; name the task")


def numbers(frame: pd.DataFrame, names: Sequence[str], owner: str, missing: bool = False) -> np.ndarray:
    """Return columns as ``[rows, columns]`` in ``float64``.

    Args:
        missing: whether cells may be empty; they become NaN.

    Raises:
        InputError: a text, an infinite value, or (unless ``missing``) an empty cell, with its line in the file.
    """
    values = frame[list(names)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    empty = frame[list(names)].isna().to_numpy()
    bad = ~np.isfinite(values) & ~(empty if missing else np.zeros_like(empty))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        value = frame[names[column]].iloc[row]
        cell = "an empty cell" if empty[row, column] else repr(value if isinstance(value, str) else float(value))
        more = f" ({bad.sum()} such cells in all)" if bad.sum() > 1 else ""
        raise InputError(
            f"{owner}: column {names[column]!r} holds {cell} in line {line_of(frame, row)}{more}; "
            "every cell must be a finite number, so mend or remove the row"
        )
    return values


def read_asked(file: str | Path, columns: Columns) -> Asked:
    """Read the points of new tasks; without a task column, all rows belong to one task.

    Raises:
        InputError: what :func:`read_table`, :func:`check_columns` and :func:`numbers` raise; a row without its task or
            with only some of its outputs; a task without any row that has y; no row that asks.
    """
    frame = read_table(file, "data.predict_file", columns.task)
    owner = f"data.predict_file={str(file)!r}"
    has_tasks = columns.task in frame.columns
    others = [str(name) for name in frame.columns if name not in (*columns.x, *columns.y)]
    if not has_tasks and get_close_matches(columns.task.lower(), [name.lower() for name in others], n=1):
        check_columns(frame, [columns.task], owner)
    check_columns(frame, [*columns.x, *columns.y], owner)
    x, y = numbers(frame, columns.x, owner), numbers(frame, columns.y, owner, missing=True)
    if has_tasks:
        check_named(frame, columns.task, owner)
    given = ~np.isnan(y)
    partial = np.flatnonzero(given.any(1) & ~given.all(1))
    if len(partial):
        raise InputError(
            f"{owner}: line {line_of(frame, partial[0])} has only some of the outputs {list(columns.y)}; all or none"
        )
    support = given.all(1)
    if support.all():
        raise InputError(f"{owner}: no row asks for a prediction; leave {columns.y[0]!r} empty in the rows to predict")
    names = frame[columns.task] if has_tasks else pd.Series("task", index=frame.index)
    rows, shots = {}, {}
    for name, group in names.groupby(names, sort=False):
        positions = group.index.to_numpy()
        rows[name] = [*positions[support[positions]].tolist(), *positions[~support[positions]].tolist()]
        shots[name] = int(support[positions].sum())
        if not shots[name]:
            raise InputError(
                f"{owner}: task {name!r} has no row with {list(columns.y)}, so there is nothing to adapt to; add one"
            )
    return Asked(frame, rows, shots, x, y)
