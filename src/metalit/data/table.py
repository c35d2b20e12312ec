"""The user's tables: reading, checking and grouping by task."""

from collections.abc import Sequence
from difflib import get_close_matches
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


def read_table(file: str | Path, owner: str) -> pd.DataFrame:
    """Read a CSV file.

    Raises:
        InputError: no such file, no table in it, or no row.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{owner}={str(file)!r}: there is no such file (looked in {Path.cwd()})")
    try:
        # na_values: an empty cell is missing; a text such as "NA" may be the name of a task
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as cause:
        raise InputError(f"{owner}={str(file)!r} is no CSV table: {str(cause).strip()}") from None
    if frame.empty:
        raise InputError(f"{owner}={str(file)!r} has no row below its header")
    return frame


def check_columns(frame: pd.DataFrame, names: Sequence[str], owner: str) -> None:
    """Raise an :class:`InputError` for a column that the table lacks, naming the nearest one."""
    for name in names:
        if name not in frame.columns:
            near = get_close_matches(name, map(str, frame.columns), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name one of those"
            raise InputError(f"{owner}: there is no column {name!r}, only {list(frame.columns)}; {hint}")


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
        cell = "an empty cell" if empty[row, column] else repr(frame[names[column]].iloc[row])
        more = f" ({bad.sum()} such cells in all)" if bad.sum() > 1 else ""
        raise InputError(
            f"{owner}: column {names[column]!r} holds {cell} in line {row + 2}{more}; "
            "every cell must be a finite number, so mend or remove the row"
        )
    return values


def read_asked(file: str | Path, columns: Columns) -> Asked:
    """Read the points of new tasks; without a task column, all rows belong to one task.

    Raises:
        InputError: what :func:`read_table`, :func:`check_columns` and :func:`numbers` raise; a row that has only some
            of its outputs; a task without any row that has y; no row that asks.
    """
    owner = "data.predict_file"
    frame = read_table(file, owner)
    has_tasks = columns.task in frame.columns
    check_columns(frame, [*columns.x, *columns.y], owner)
    x, y = numbers(frame, columns.x, owner), numbers(frame, columns.y, owner, missing=True)
    given = ~np.isnan(y)
    partial = np.flatnonzero(given.any(1) & ~given.all(1))
    if len(partial):
        raise InputError(f"{owner}: line {partial[0] + 2} has only some of the outputs {list(columns.y)}; all or none")
    support = given.all(1)
    if support.all():
        raise InputError(f"{owner}: no row asks for a prediction; leave {columns.y[0]!r} empty in the rows to predict")
    names = frame[columns.task].astype(str) if has_tasks else pd.Series("task", index=frame.index)
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
