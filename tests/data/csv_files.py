"""Small tables for the tests of data, and how to tell apart and compare what is drawn from them."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from metalit.data import Curves
from metalit.data.base import task_keys
from metalit.errors import InputError

GAPMINDER = Path(__file__).parents[2] / "data" / "gapminder.csv"


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def written(folder, text):
    """A file of exactly this text or these bytes."""
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def told(call, *fragments):
    """``call`` raises one InputError of one line that says all the ``fragments``."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert "\n" not in message


def ragged_rows(lengths=(4, 6, 9, 5, 7, 8, 4, 6, 9, 5)):
    """Curves y = x² of task t at x = 100t, 100t + 1, …: x tells the task and the row."""
    return [
        (f"t{task}", 100 * task + row, (100 * task + row) ** 2) for task, n in enumerate(lengths) for row in range(n)
    ]


def curves_of(folder, rows, x=("x",), y=("y",), **options):
    """The distribution of a table with the columns task, *x, *y."""
    file = write_csv(folder / "curves.csv", ["task", *x, *y], rows)
    return Curves(file, "task", list(x), list(y), **options)


def sampled(distribution, split, count, shots, queries, seed=0):
    """The first ``count`` tasks of a split."""
    index = torch.arange(count)
    return distribution.sample(split, index, task_keys(seed, split, index), shots, queries)


def concatenated(batches):
    return tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *batches)


def same_bits(one, other):
    """Whether two batches of tasks are equal in every bit, shape and dtype, and in having a mask."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)
