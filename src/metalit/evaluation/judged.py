"""What predictors did on the tasks of an evaluation: their rows in the table, and the files."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from torch import Tensor

from metalit.data.base import Split, TaskDistribution
from metalit.evaluation.interval import Interval, mean_with_interval, means_of_tasks

LEARNER = "learner"


class Measure(NamedTuple):
    """What is measured: ``name`` in files, ``heading`` in tables."""

    name: str
    heading: str


LOSS = Measure("loss", "loss")


class Judged(NamedTuple):
    """What one predictor did."""

    name: str
    values: Mapping[Measure, Tensor]  # [draws, steps]; a baseline has one step
    tasks: Tensor  # [draws], the number of the task that each draw is of

    def means(self) -> list[list[Interval]]:
        """By inner step: each measure, over tasks."""
        columns = zip(*(values.unbind(1) for values in self.values.values()), strict=True)
        return [[mean_with_interval(values, self.tasks) for values in row] for row in columns]

    def label(self, step: int) -> str:
        """Of a row of the table."""
        return str(step) if self.name == LEARNER else self.name


def draws_of(tasks: Tensor) -> str:
    """How many tasks there are, and how often each was drawn, in words.

    >>> import torch
    >>> draws_of(torch.tensor([0, 1, 0, 1])), draws_of(torch.tensor([0, 1, 0])), draws_of(torch.tensor([0, 1]))
    (('2', ', 2 draws of each'), ('2', ', 1 to 2 draws of each'), ('2', ''))
    """
    draws = tasks.unique(return_counts=True)[1]
    least, most = int(draws.min()), int(draws.max())
    each = f"{least} to {most}" if least < most else str(most)
    return str(len(draws)), "" if most == 1 else f", {each} draws of each"


def means_frame(judged: Sequence[Judged]) -> pd.DataFrame:
    """A row for each predictor and inner step: means over tasks, with half the widths of their intervals."""
    rows = []
    for predictor in judged:
        for step, intervals in enumerate(predictor.means()):
            row = {"predictor": predictor.name, "inner_steps": step if predictor.name == LEARNER else None}
            for measure, interval in zip(predictor.values, intervals, strict=True):
                row |= {measure.name: interval.mean, f"{measure.name}_ci95": interval.half_width}
            counts = {"tasks": intervals[0].count, "diverged": intervals[0].diverged, "draws": len(predictor.tasks)}
            rows.append(row | counts)
    return pd.DataFrame(rows).astype({"inner_steps": "Int64"})


def tasks_frame(judged: Sequence[Judged], source: TaskDistribution | None, split: Split) -> pd.DataFrame:
    """A row for each task, by its name or number: how often it was drawn, and the means of what predictors did."""
    numbers, draws = judged[0].tasks.cpu().unique(return_counts=True)
    names = [source and source.name(split, number) for number in numbers.tolist()]
    columns = {
        "task": [number if name is None else name for name, number in zip(names, numbers.tolist(), strict=True)],
        "draws": draws.tolist(),
    }
    for predictor in judged:
        for measure, values in predictor.values.items():
            means = means_of_tasks(values.double().cpu(), predictor.tasks.cpu())
            for step, column in enumerate(means.unbind(1)):
                end = f"step_{step}" if predictor.name == LEARNER else re.sub(r"\W+", "_", predictor.name)
                columns[f"{measure.name}_{end}"] = column.tolist()
    return pd.DataFrame(columns)
