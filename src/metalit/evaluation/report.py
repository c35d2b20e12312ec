"""What a learner reports of an evaluation: plain data, which callbacks print, write and draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from metalit.data.base import Split
from metalit.evaluation.interval import Interval

Chart = Mapping[str, Mapping[str, Sequence[Interval]]]  # by measure, then by predictor: a curve, or a single value


@dataclass(frozen=True)
class Report:
    """A table of texts, and the files of its numbers.

    Args:
        name: what it is of, such as ``errors`` or ``scores``.
        split: what was evaluated.
        headings: of the columns; all but the first are numbers.
        sections: rows of cells, with a line between sections.
        before, after: lines of text around the table.
        files: tables for the folder of the run, by the names of their files without ``.csv``.
        results: likewise for its folder ``results``; the user is told where each of them lies.
        chart: what is drawn of it, if anything.
    """

    name: str
    split: Split
    headings: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    files: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    results: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    chart: Chart | None = None
