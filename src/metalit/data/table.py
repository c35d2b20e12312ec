"""The user's tables: reading, checking and grouping by task."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from metalit.data.cells import Categories, inputs, line_of, missing_cells, numbers, value_of
from metalit.data.files import read_records, shown
from metalit.errors import InputError
from metalit.notices import warn


class Columns(NamedTuple):
    """The names of the column of the task, of the inputs and of the outputs."""

    task: str
    x: Sequence[str]
    y: Sequence[str]


class Asked(NamedTuple):
    """A table of new tasks: rows with y are support, rows without are asked.

    ``frame`` is the user's table; ``rows`` holds, by task, the positions of its rows, support before asked, and
    ``shots`` the number of support rows; ``x`` and ``y`` are its numbers, ``[rows, inputs]`` and ``[rows, outputs]``,
    y NaN where asked.
    """

    frame: pd.DataFrame
    rows: dict[str, list[int]]
    shots: dict[str, int]
    x: np.ndarray
    y: np.ndarray


def read_table(file: str | Path, owner: str) -> pd.DataFrame:
    """Read a file of cells with a header; all cells stay texts, without the spaces around them.

    The index holds the line of the file that each row ends in; ``attrs`` the ``separator``, and the ``decimal`` sign
    once :func:`numbers` has found it.

    Raises:
        InputError: what :func:`~metalit.data.files.read_records` raises; no row, or rows of more cells than the header.
    """
    cells, lines, separator = read_records(file, owner)
    owner = f"{owner}={shown(str(file))}"
    if not cells:
        raise InputError(f"{owner} is no CSV table: it is empty")
    header, *rows = [[cell.strip() for cell in record] for record in cells]
    if not rows:
        raise InputError(f"{owner} has no row below its header")
    width = len(header)
    for line, row in zip(lines[1:], rows, strict=True):
        if len(row) > width:
            raise InputError(
                f"{owner} is no CSV table: expected {width} cells in line {line}, saw {len(row)}: more cells than its "
                "header; mend the commas"
            )
        row.extend([""] * (width - len(row)))
    frame = pd.DataFrame(rows, index=pd.Index(lines[1:], name="line"), columns=header, dtype=object)
    frame.attrs.update(separator=separator, decimal=".")
    return frame


def check_columns(frame: pd.DataFrame, names: Sequence[str], owner: str) -> None:
    """Raise an :class:`InputError` for a column that the table lacks, naming the nearest one, or has twice."""
    present = list(frame.columns)
    for name in names:
        if name not in present:
            near = nearest(name, present)
            hint = f"did you mean {near!r}?" if near else "name one of those"
            raise InputError(f"{owner}: there is no column {name!r}, only {_some(present, 40)}; {hint}")
        if present.count(name) > 1:
            raise InputError(f"{owner}: its header has {present.count(name)} columns {name!r}; rename all but one")


def nearest(name: str, present: Sequence[str]) -> str | None:
    """The name that was meant: the same but for case and spaces, or a similar one."""
    plain = {re.sub(r"[\W_]+", "", other).casefold(): other for other in present if other}
    found = get_close_matches(re.sub(r"[\W_]+", "", name).casefold(), list(plain), n=1)
    return plain[found[0]] if found else None


def check_named(frame: pd.DataFrame, task: str, owner: str) -> None:
    """Check that each row names its task; warn of names that may mean the same one.

    Raises:
        InputError: a row does not.
    """
    unnamed = np.flatnonzero(frame[task] == "")
    if len(unnamed):
        line = line_of(frame, unnamed[0])
        raise InputError(f"{owner}: column {task!r} holds an empty cell in line {line}; name the task")
    spelt: dict[str, list[str]] = {}
    for name in frame[task].unique():
        spelt.setdefault(_spoken(name), []).append(name)
    alike = [names for names in spelt.values() if len(names) > 1]
    if alike:
        more = f", and {len(alike) - 1} more such" if len(alike) > 1 else ""
        warn(f"{owner}: {alike[0]} in column {task!r} are {len(alike[0])} tasks{more}; mend the names if they are one")


def _spoken(name: str) -> str:
    """A name without case, spaces and forms of numbers: "P 1" and "p1", "01" and "1.0" are the same."""
    value = value_of(name)
    return re.sub(r"\s+", "", name).casefold() if np.isnan(value) else f"{value:.15g}"


def read_asked(
    file: str | Path, columns: Columns, categories: Categories | None = None, one_task: bool = False
) -> Asked:
    """Read the points of new tasks.

    Args:
        file: a file as those of :func:`~metalit.data.table.read_table`.
        columns: what its columns are called.
        categories: the levels of those inputs that are texts.
        one_task: there is no column of tasks, and all rows are of one.

    Raises:
        InputError: what :func:`~metalit.data.table.read_table`, ``check_columns`` and ``numbers`` raise; no column of
            tasks, unless ``one_task``; a row without its task or with only some of its outputs; a task without any row
            that has y; no row that asks.
    """
    frame = read_table(file, "data.predict_file")
    owner = f"data.predict_file={str(file)!r}"
    _check_task(frame, columns, one_task, owner)
    check_columns(frame, [*columns.x, *columns.y], owner)
    x = inputs(frame, columns.x, categories or {}, owner)
    y = numbers(frame, columns.y, owner, missing=True)
    if not one_task:
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
    _tell_of_words(frame, columns, owner)
    owners, names = pd.factorize(np.full(len(frame), "task", dtype=object) if one_task else frame[columns.task])
    found = np.split(np.argsort(owners, kind="stable"), np.cumsum(np.bincount(owners))[:-1])
    rows, shots = {}, {}
    for name, positions in zip(names, found, strict=True):
        rows[name] = [*positions[support[positions]].tolist(), *positions[~support[positions]].tolist()]
        shots[name] = int(support[positions].sum())
        if not shots[name]:
            raise InputError(
                f"{owner}: task {name!r} has no row with {list(columns.y)}, so there is nothing to adapt to; add one"
            )
    return Asked(frame, rows, shots, x, y)


def _check_task(frame: pd.DataFrame, columns: Columns, one_task: bool, owner: str) -> None:
    present = list(frame.columns)
    if one_task and columns.task in present:
        raise InputError(f"data.predict_one_task=true: {owner} has the column {columns.task!r} of tasks; leave one out")
    if not one_task and columns.task not in present:
        others = [name for name in present if name not in (*columns.x, *columns.y)]
        near = nearest(columns.task, others)
        hint = f"did you mean {near!r}? R" if near else "r"
        raise InputError(
            f"{owner}: there is no column {columns.task!r}, which tells the tasks apart, only {present}; {hint}ename "
            "that column, or, if all rows are of one task, set data.predict_one_task=true"
        )
    check_columns(frame, [] if one_task else [columns.task], owner)


def _tell_of_words(frame: pd.DataFrame, columns: Columns, owner: str) -> None:
    """Report which words, beside empty cells, were taken for a y that is asked for."""
    cells = frame[list(columns.y)].to_numpy()[missing_cells(frame, columns.y)]
    words = cells[cells != ""]
    if len(words):
        found = sorted(set(words))
        warn(f"{owner}: {len(words)} cell(s) of {list(columns.y)} hold {found}, and are asked like empty ones")


def _some(names: Sequence[str], most: int) -> str:
    """A list of names, cut where it is long."""
    return str(list(names)) if len(names) <= most else f"{str(list(names[:most]))[:-1]}, … {len(names)} in all]"
