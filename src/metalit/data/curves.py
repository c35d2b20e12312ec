"""Tasks from the user's own table of curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metalit.data.base import Episodes, Split, TaskDistribution, check_no_ways, task_keys
from metalit.data.cells import Categories, inputs, numbers
from metalit.data.curve_baselines import Polynomials
from metalit.data.held_out import HeldOut, Partition
from metalit.data.scaling import Scaling
from metalit.data.table import Columns, check_columns, check_named, read_table
from metalit.errors import InputError
from metalit.keys import fold, permutation, uniform
from metalit.notices import warn
from metalit.problem import Points, Task

_CHOICE_TASKS = 1024  # drawn from the validation split to choose the degrees of the baselines by


class _Curves(NamedTuple):
    names: list[str]
    x: Tensor  # [tasks, longest, inputs], padded with zeros
    y: Tensor  # [tasks, longest, outputs]
    length: Tensor  # [tasks]


@dataclass(frozen=True)
class Curves(TaskDistribution):
    """Each task is one curve of a table: few of its rows are support, the rest are query.

    Tasks are split into train, val and test by task, never by row; means and standard deviations of the columns come
    from the training tasks alone. A training task is drawn with replacement; validation and test tasks come in turn.
    The rows of the support set are drawn anew for every index. Rows without y are left out.

    Args:
        file: a file of cells with a header, as :func:`~metalit.data.files.read_records` reads it.
        task: the column that tells the curves apart.
        x: the columns of the inputs.
        y: the columns of the outputs.
        val, test: what is held out for validation and test: a fraction of the tasks (0 for none, 1 for all, for a
            learner that was trained on other data), a list of their names, or a text file of names, one a line.
        split_seed: the seed of the split.
        folds, fold: test on part number ``fold`` (from 0) of ``folds`` equal parts of the tasks, in place of ``test``.
        categories: the levels of each column of x that holds texts: each level becomes an input of 0 or 1.
        skip_short: leave out tasks with fewer rows than ``shots`` and one to be judged on.

    Raises:
        InputError: from :meth:`prepare` and :meth:`check`, with the way out: no such file or column, an empty table,
            a cell that is no number or no level, a split without a task, a task with too few rows.
    """

    file: str
    task: str
    x: Sequence[str]
    y: Sequence[str]
    val: HeldOut = 0.2
    test: HeldOut = 0.2
    split_seed: int = 0
    folds: int | None = None
    fold: int = 0
    categories: dict[str, list[str | int | float]] = field(default_factory=dict)
    skip_short: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.x, str) or isinstance(self.y, str) or not self.x or not self.y:
            raise InputError(f"data.tasks: x={self.x!r} and y={self.y!r} must each be a list of a column at least")
        named = [self.task, *self.x, *self.y]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise InputError(f"data.tasks: {twice} stand twice among task, x and y; each column has one role")
        for name, levels in self.categories.items():
            if name not in self.x or isinstance(levels, str) or len({*map(str, levels)}) < max(2, len(levels)):
                raise InputError(
                    f"data.tasks.categories={{{name!r}: {levels!r}}} must be a column of x={list(self.x)} and a list "
                    "of its different levels, two at least"
                )
        if not {*self.x} - {*self.categories}:
            raise InputError(f"data.tasks.categories: x={list(self.x)} needs a column of numbers beside categories")
        self._partition.check()

    @property
    def columns(self) -> Columns:
        """The user's own."""
        return Columns(self.task, list(self.x), list(self.y))

    @property
    def levels(self) -> Categories:
        """Those of ``categories``, as texts."""
        return {name: [str(level) for level in levels] for name, levels in self.categories.items()}

    def needs(self, sizes: Mapping[Split, Episodes]) -> None:
        """Leave out shorter tasks, with ``skip_short``: each needs a row beside its shots, to be judged on."""
        rows = {split: size.shots + 1 for split, size in sizes.items()}
        if self.skip_short and self.__dict__.get("_least") != rows:
            self.__dict__.update(_least=rows)
            for found in ("_raw", "_own_scaling", "splits", "_polynomials"):
                self.__dict__.pop(found, None)

    def prepare(self) -> None:
        """Read the table."""
        self._own_scaling  # noqa: B018

    def check(self, split: Split, size: Episodes) -> None:
        """Every curve needs ``shots`` rows and one to be judged on."""
        check_no_ways(self, split, size)
        shots = size.shots
        curves = self._raw[split]
        if not curves.names:
            return
        shortest = int(curves.length.argmin())
        rows, short = int(curves.length[shortest]), int((curves.length < shots + 1).sum())
        if short:
            raise InputError(
                f"data.{split}.shots={shots}: the task {curves.names[shortest]!r} of {self.file!r} has only {rows} "
                f"row(s), and {shots + 1} are needed ({short} such task(s) of {len(curves.names)}): lower the shots, "
                "or leave short tasks out with data.tasks.skip_short=true"
            )

    def count(self, split: Split) -> int | None:
        """None for training tasks, which are drawn without an end; of the others, the number that was held out."""
        there_are = len(self._raw[split].names)
        return None if split == "train" and there_are else there_are

    def name(self, split: Split, index: int) -> str | None:
        """The text of its cells in the column ``task``; None for training tasks, which are drawn."""
        names = self._raw[split].names
        return None if split == "train" else names[index % len(names)]

    @cached_property
    def _raw(self) -> dict[Split, _Curves]:
        owner = f"data.tasks.file={self.file!r}"
        frame = read_table(self.file, "data.tasks.file")
        check_columns(frame, [self.task, *self.x, *self.y], owner)
        y = numbers(frame, self.y, owner, missing=True)
        complete = ~np.isnan(y).any(1)
        if not complete.all():
            if not complete.any():
                raise InputError(f"{owner}: no row has a number in each of {list(self.y)}; name other columns as y")
            where = " or ".join(map(repr, self.y))
            warn(f"{owner}: {(~complete).sum()} of {len(complete)} rows have no number in {where}, and are left out")
        frame, y = frame[complete], y[complete]
        check_named(frame, self.task, owner)
        x = inputs(frame, self.x, self.levels, owner)
        rows = frame.groupby(self.task).indices
        chosen = self._partition.of(sorted(rows), owner)
        if self.skip_short:
            chosen = self._long_enough(chosen, rows)
        return {split: _gather(names, rows, x, y) for split, names in chosen.items()}

    @property
    def _partition(self) -> Partition:
        return Partition(self.val, self.test, self.split_seed, self.folds, self.fold)

    def _long_enough(self, chosen: dict[Split, list[str]], rows: dict[str, np.ndarray]) -> dict[Split, list[str]]:
        least = self.__dict__.get("_least", {})
        long = {
            split: [name for name in names if len(rows[name]) >= least.get(split, 0)] for split, names in chosen.items()
        }
        for split, names in chosen.items():
            if names and not long[split]:
                raise InputError(
                    f"data.tasks.skip_short=true leaves no task for {split}: none of {len(names)} has {least[split]} "
                    f"rows; lower data.{split}.shots"
                )
        short = [name for split, names in chosen.items() for name in names if name not in set(long[split])]
        if short:
            some = ", ".join(map(repr, short[:5])) + (", …" if len(short) > 5 else "")
            warn(f"data.tasks.skip_short=true: {len(short)} of {len(rows)} tasks have too few rows: {some}")
        return long

    @cached_property
    def _own_scaling(self) -> Scaling | None:
        curves = self._raw["train"]
        if not curves.names:
            return None
        real = _real_rows(curves)
        hot = [name in self.levels for name in self.x for _ in self.levels.get(name, (None,))]
        return Scaling.of(curves.x[real], curves.y[real], torch.tensor(hot))

    @cached_property
    def splits(self) -> dict[Split, _Curves]:
        """The normalised curves of each split."""
        scaling = self.used_scaling
        return {
            split: curves._replace(x=scaling.normalise_x(curves.x), y=scaling.normalise_y(curves.y))
            for split, curves in self._raw.items()
        }

    def scaling(self) -> Scaling | None:
        """The scaling of the training tasks, None without any."""
        return self._own_scaling

    def take_scaling(self, scaling: Scaling) -> None:
        """Normalise so, from now on."""
        super().take_scaling(scaling)
        self.__dict__.pop("splits", None)

    def sample(self, split: Split, index: Tensor, key: Tensor, shots: int, queries: int | None) -> Task:
        """Choose a curve, shuffle its rows, and cut them into support and query; padding is masked."""
        curves = self.splits[split]
        tasks, longest = curves.x.shape[:2]
        chosen = (uniform(fold(key, 0)) * tasks).long() if split == "train" else index % tasks
        length = curves.length[chosen].unsqueeze(-1)
        real = torch.arange(longest) < length
        order = permutation(fold(key, 1), longest, allowed=real)
        asked = longest - shots if queries is None else min(queries, longest - shots)
        order = order[:, : shots + asked].unsqueeze(-1)
        x = curves.x[chosen].take_along_dim(order, dim=1)
        y = curves.y[chosen].take_along_dim(order, dim=1)
        mask = None
        if bool((curves.length < shots + asked).any()):
            mask = torch.arange(shots, shots + asked) < length
        query = Points(x[:, shots:], y[:, shots:], mask)
        return Task(Points(x[:, :shots], y[:, :shots]), query, fold(key, 2))

    def baselines(self, tasks: Task) -> dict[str, Tensor]:
        """Polynomials (:class:`~metalit.data.curve_baselines.Polynomials`), whose degrees are chosen on val.

        Without validation tasks, the degrees are chosen on the training tasks. Without those, there are no baselines.
        """
        if not self._raw["train"].names:
            return {}
        return self._polynomials.predictions(tasks, self._choice_tasks(tasks.support.x.shape[1]))

    @cached_property
    def _polynomials(self) -> Polynomials:
        curves = self.splits["train"]
        return Polynomials(Points(curves.x, curves.y, _real_rows(curves)))

    def _choice_tasks(self, shots: int) -> Task:
        index = torch.arange(_CHOICE_TASKS)
        split: Split = "val" if self.splits["val"].names else "train"
        shots = min(shots, int(self.splits[split].length.min()) - 1)
        return self.sample(split, index, task_keys(self.split_seed, split, index), shots, None)


def _real_rows(curves: _Curves) -> Tensor:
    return torch.arange(curves.x.shape[1]) < curves.length.unsqueeze(-1)


def _gather(names: list[str], rows: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> _Curves:
    length = torch.tensor([len(rows[name]) for name in names], dtype=torch.int64)
    longest = int(length.max()) if names else 0
    padded_x, padded_y = (torch.zeros(len(names), longest, values.shape[1], dtype=torch.float64) for values in (x, y))
    for task, name in enumerate(names):
        for target, values in ((padded_x, x), (padded_y, y)):
            target[task, : length[task]] = torch.from_numpy(values[rows[name]])
    return _Curves(names, padded_x, padded_y, length)
