"""Tables of scores: one row for what was learned, one for each baseline."""

from collections.abc import Sequence
from statistics import fmean

LEARNED = "learned"

Scores = dict[str, dict[str, float]]  # by row, then by name


def means(tables: Sequence[Scores]) -> Scores:
    """The mean of every score over tables of equal rows.

    >>> means([{"learned": {"loss": 1.0}}, {"learned": {"loss": 3.0}}])
    {'learned': {'loss': 2.0}}
    """
    first = tables[0]
    return {row: {name: fmean(table[row][name] for table in tables) for name in first[row]} for row in first}
