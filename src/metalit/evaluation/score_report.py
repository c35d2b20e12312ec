"""The report of scores: a row for what was learned, one for each baseline; and what was learned, as tables."""

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from metalit.data.base import Split
from metalit.evaluation.report import Report
from metalit.evaluation.scores import Scores


def score_report(
    scores: Scores, split: Split, when: str = "", results: Mapping[str, pd.DataFrame] | None = None
) -> Report:
    """All scores of all rows.

    Args:
        scores: by row, then by name.
        split: what was evaluated.
        when: words that follow its name in the line above the table.
        results: see :class:`~metalit.evaluation.report.Report`.
    """
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [
        [row, *(f"{found[name]:.4g}" if name in found else "" for name in columns)] for row, found in scores.items()
    ]
    frame = pd.DataFrame.from_dict(scores, orient="index").rename_axis("row").reset_index()
    return Report(
        "scores",
        split,
        ["", *columns],
        [rows],
        [f"scores on {split}{when}"],
        files={split: frame},
        results=results or {},
    )


def results_frames(
    results: Mapping[str, Mapping[str, Tensor]], inputs: Sequence[str] | None
) -> dict[str, pd.DataFrame]:
    """A table for each file of a problem's ``results``; the columns of a matrix are numbered from 1.

    Args:
        results: columns by file and name, ``[rows]`` or ``[rows, ...]``.
        inputs: the names of the input columns, which are those of the rows of ``features``.
    """
    frames = {}
    for file, columns in results.items():
        frame = pd.DataFrame()
        for name, value in columns.items():
            numbers = value.cpu().double() if value.is_floating_point() else value.cpu()
            for number, column in enumerate(numbers.reshape(len(numbers), -1).unbind(1), 1):
                frame[name if value.dim() == 1 else f"{name}{number}"] = column.numpy()
        if inputs is not None and file == "features":
            frame.index = pd.Index(inputs)
        frames[file] = frame.rename_axis("row").reset_index()
    return frames
