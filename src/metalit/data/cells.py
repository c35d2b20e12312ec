"""Cells of the user's tables: how texts become numbers."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from metalit.data.files import shown
from metalit.errors import InputError

# what R, SAS, Stata, Excel and Python write for a number that is missing, in lower case
MISSING = frozenset(
    ("", ".", "?", "na", "nan", "-nan", "n/a", "<na>", "#n/a", "#na", "null", "none", "missing", "1.#ind", "1.#qnan")
)
LARGEST = float(np.finfo(np.float32).max)
_LEVELS_SHOWN = 12
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
_MAYBE_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")
_MAYBE_THOUSANDS_POINT = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
_DATE = re.compile(r"\d{4}[-/.]\d\d?[-/.]\d\d?\b.*|\d\d?[-/.]\d\d?[-/.]\d{2,4}\b.*")


Categories = Mapping[str, Sequence[str]]  # the levels of inputs that are texts


def input_names(names: Sequence[str], categories: Categories) -> list[str]:
    """The name of each input that columns become: a category is one of 0 or 1 for each of its levels.

    >>> input_names(["age", "sex"], {"sex": ["f", "m"]})
    ['age', 'sex=f', 'sex=m']
    """
    levels = {name: [f"{name}={level}" for level in categories.get(name, ())] for name in names}
    return [column for name in names for column in levels[name] or [name]]


def line_of(frame: pd.DataFrame, row: int) -> int:
    """The line of the file that a row of its table ends in: blank lines and line breaks in quotes count."""
    return int(frame.index[row])


def missing_cells(frame: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Whether cells are empty or hold a word for a missing number, ``[rows, columns]``."""
    return np.stack([frame[name].str.lower().isin(MISSING).to_numpy() for name in names], 1)


def numbers(frame: pd.DataFrame, names: Sequence[str], owner: str, missing: bool = False) -> np.ndarray:
    """Return columns as ``[rows, columns]`` in ``float64``.

    Args:
        missing: whether cells may be empty, or hold ``NA`` and the like; they become NaN.

    Raises:
        InputError: a text, a value that is infinite or beyond single precision, or (unless ``missing``) an empty cell,
            with its line in the file.
    """
    values = np.empty((len(frame), len(names)))
    for column, name in enumerate(names):
        texts = frame[name].tolist()
        comma = decimal_comma(texts, frame.attrs["separator"], f"{owner}: column {name!r}")
        if not comma:
            _check_points(frame, texts, f"{owner}: column {name!r}")
        frame.attrs["decimal"] = "," if comma else frame.attrs["decimal"]
        values[:, column] = [value_of(text, comma) for text in texts]
    large = np.abs(values) > LARGEST  # infinite ones too
    bad = np.isnan(values) | large
    if missing:
        bad &= ~missing_cells(frame, names)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        reason = _reason(frame[names[column]].iloc[row], bool(large[row, column]))
        raise InputError(
            f"{owner}: column {names[column]!r} holds {_cell(frame, names[column], row, int(bad.sum()))}; every cell "
            f"must be a finite number{reason}, so mend or remove the row"
        )
    return values


def value_of(text: str, comma: bool = False) -> float:
    """The number that a text is, NaN if it is none; Python's own would take "1_000" and digits of other scripts."""
    if comma and _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    try:
        return float(text) if text.isascii() and "_" not in text else np.nan
    except ValueError:
        return np.nan


def decimal_comma(texts: Sequence[str], separator: str, owner: str) -> bool:
    """Whether numbers have decimal commas: never where commas separate cells.

    Raises:
        InputError: some have commas and some have points, or all commas may be signs for thousands.
    """
    commas = [] if separator == "," else [text for text in texts if _DECIMAL_COMMA.fullmatch(text)]
    if not commas:
        return False
    point = next((text for text in texts if _DECIMAL_POINT.fullmatch(text)), None)
    if point is not None or all(map(_MAYBE_THOUSANDS.fullmatch, commas)):
        what = f"beside {point!r}, two decimal signs" if point else "whose comma may be that of thousands"
        raise InputError(
            f"{owner} holds {commas[0]!r} {what}; write numbers with a decimal point and without signs for thousands"
        )
    return True


def _check_points(frame: pd.DataFrame, texts: Sequence[str], owner: str) -> None:
    """Raise an :class:`InputError` where "1.000" may be a thousand, since other columns have decimal commas."""
    points = [text for text in texts if _DECIMAL_POINT.fullmatch(text)]
    if frame.attrs["separator"] == "," or not points or not all(map(_MAYBE_THOUSANDS_POINT.fullmatch, points)):
        return
    # by position: an unused column may stand twice
    commas = (_DECIMAL_COMMA.fullmatch(text) for place in range(frame.shape[1]) for text in frame.iloc[:, place])
    other = next(filter(None, commas), None)
    if other:
        raise InputError(
            f"{owner} holds {points[0]!r} whose point may be that of thousands, since other columns hold numbers such "
            f"as {other[0]!r}; write numbers with one decimal sign and without signs for thousands"
        )


def _reason(text: str, large: bool) -> str:
    if large and "inf" not in text.lower():
        return f" of at most {LARGEST:.2g}, the largest of single precision"
    if _DATE.fullmatch(text):
        return " (of a date, the days since a start)"
    if _DECIMAL_COMMA.fullmatch(text):
        return ", with a decimal point"
    return ""


def inputs(frame: pd.DataFrame, names: Sequence[str], categories: Categories, owner: str) -> np.ndarray:
    """Return columns as ``[rows, inputs]`` in ``float64``, those of :func:`input_names`.

    Raises:
        InputError: what :func:`numbers` raises; a category's cell that is none of its levels.
    """
    return np.concatenate(
        [
            _one_hot(frame, name, categories[name], owner) if name in categories else _measured(frame, name, owner)
            for name in names
        ],
        axis=1,
    )


def _one_hot(frame: pd.DataFrame, name: str, levels: Sequence[str], owner: str) -> np.ndarray:
    hot = frame[name].to_numpy()[:, None] == np.array(levels, dtype=object)
    none = np.flatnonzero(~hot.any(1))
    if len(none):
        raise InputError(
            f"{owner}: column {name!r} holds {_cell(frame, name, none[0], len(none))}, which is none of its levels in "
            f"data.tasks.categories={{{name!r}: {list(levels)}}}"
        )
    return hot.astype(np.float64)


def _measured(frame: pd.DataFrame, name: str, owner: str) -> np.ndarray:
    try:
        return numbers(frame, [name], owner)
    except InputError as error:
        levels = sorted(set(frame[name][~frame[name].str.lower().isin(MISSING)]))
        texts = [level for level in levels if np.isnan(value_of(level))]
        few = 2 <= len(texts) == len(levels) <= _LEVELS_SHOWN and not any(map(_DATE.fullmatch, texts))
        hint = f"; if {name!r} is a category, give its levels: data.tasks.categories={{{name!r}: {levels}}}"
        raise InputError(f"{error}{hint if few else ''}") from None


def _cell(frame: pd.DataFrame, name: str, row: int, count: int) -> str:
    """A cell as messages show it, with its line and how many such there are."""
    text = frame[name].iloc[row]
    more = f" ({count} such cells in all)" if count > 1 else ""
    bare = text if np.isinf(value_of(text)) else shown(text, 40)
    return f"{bare if text else 'an empty cell'} in line {line_of(frame, row)}{more}"
