"""Tables of scores: one row for what was learned, one for each baseline."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from metalit.errors import InputError

LEARNED = "learned"

Scores = dict[str, dict[str, float]]  # by row, then by name


def means(tables: Sequence[Scores]) -> Scores:
    """The mean of every score over tables of equal rows.

    >>> means([{"learned": {"loss": 1.0}}, {"learned": {"loss": 3.0}}])
    {'learned': {'loss': 2.0}}
    """
    first = tables[0]
    return {row: {name: fmean(table[row][name] for table in tables) for name in first[row]} for row in first}


def as_numbers(scores: Mapping[str, Tensor | float], owner: str) -> dict[str, float]:
    """Scores as plain numbers.

    Args:
        scores: by name.
        owner: who gave them, for messages.

    Raises:
        InputError: there is no ``loss`` among them; one is no scalar.
    """
    if "loss" not in scores:
        raise InputError(f"{owner} returned {sorted(scores)}; 'loss' must be among them")
    for name, value in scores.items():
        shape = tuple(torch.as_tensor(value).shape)
        if math.prod(shape) != 1:
            raise InputError(f"{owner}: {name!r} has shape {shape}; it must be a scalar")
    return {name: float(value) for name, value in scores.items()}
