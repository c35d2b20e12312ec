"""The report of a meta-learner: errors over tasks after each number of inner steps, beside those of baselines."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metalit.data.base import Split, TaskDistribution
from metalit.data.module import TaskDataModule
from metalit.evaluation.confusion import Confusion
from metalit.evaluation.interval import mean_with_interval, means_of_tasks
from metalit.evaluation.judged import LEARNER, LOSS, NLL, SQUARED, Judged, Measure
from metalit.evaluation.report import Chart, Report


def task_report(
    judged: Sequence[Judged], split: Split, data: TaskDataModule | None, confusion: Confusion | None = None
) -> Report:
    """Means with 95 % intervals, for each measure of each predictor.

    Args:
        judged: the learner, then the baselines.
        split: whose tasks they are.
        data: where the tasks come from, if that is known.
        confusion: which classes were taken for which, if that was counted.
    """
    learner, *baselines = judged
    source = None if data is None else data.tasks
    rows = [_rows(predictor, learner.values) for predictor in judged]
    return Report(
        "errors",
        split,
        ["inner steps", *(measure.heading for measure in learner.values)],
        [rows[0], [row for part in rows[1:] for row in part]],
        [_protocol(data, learner.tasks, split)],
        [*(_comparison(learner, baseline) for baseline in baselines), *(confusion.lines() if confusion else [])],
        {
            split: means_frame(judged),
            f"{split}_tasks": tasks_frame(judged, source, split),
            **({f"{split}_confusion": confusion.frame()} if confusion else {}),
        },
        chart=chart_of(judged),
    )


def chart_of(judged: Sequence[Judged]) -> Chart:
    """The learner's curve over inner steps and the values of baselines, for each measure of the learner.

    A loss that is a likelihood is drawn once.
    """
    return {
        measure.heading: {
            predictor.name: predictor.intervals(measure) for predictor in judged if measure in predictor.values
        }
        for measure in judged[0].values
        if not (measure == LOSS and NLL in judged[0].values)
    }


def draws_of(tasks: Tensor) -> tuple[str, str]:
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
            steps = step if predictor.name == LEARNER else None
            row: dict[str, Any] = {"predictor": predictor.name, "inner_steps": steps}
            for measure, interval in zip(predictor.values, intervals, strict=True):
                row |= {measure.name: interval.mean, f"{measure.name}_ci95": interval.half_width}
            counts = {"tasks": intervals[0].tasks, "diverged": intervals[0].diverged, "draws": len(predictor.tasks)}
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


def _rows(predictor: Judged, measures: Iterable[Measure]) -> list[list[str]]:
    """The table's row for each inner step; a cell is empty where the predictor has no such measure."""
    columns = [predictor.intervals(measure) if measure in predictor.values else None for measure in measures]
    return [
        [predictor.label(step), *("" if column is None else str(column[step]) for column in columns)]
        for step in range(predictor.steps + 1)
    ]


def _protocol(data: TaskDataModule | None, tasks: Tensor, split: Split) -> str:
    count, draws = draws_of(tasks)
    over = "over tasks, of which each counts once" if draws else "over tasks"
    sizes = ""
    if data is not None and data.tasks.class_names(split) is not None:
        episodes, classes = data.episodes[split], data.draw(split, torch.arange(1)).classes
        ways = "" if classes is None else f" {classes.shape[-1]}-way"
        queries = "all others" if episodes.queries == "all" else episodes.queries
        sizes = f",{ways} {episodes.shots}-shot, judged on {queries} queries of each class"
    elif data is not None:
        episodes = data.episodes[split]
        queries = "all other rows" if episodes.queries == "all" else f"{episodes.queries} points"
        sizes = f", adapted to {episodes.shots} points each and judged on {queries}"
    return f"{count} {split} tasks{draws}{sizes}; mean ± 95 % interval {over}"


def _comparison(learner: Judged, baseline: Judged) -> str:
    """Both saw the same tasks: task by task, their difference is far surer than the two means are."""
    first = next(iter(baseline.values))
    measure = next((measure for measure in baseline.values if measure not in (LOSS, SQUARED)), first)
    difference = baseline.values[measure][:, -1] - learner.values[measure][:, -1]
    after = f" after {learner.steps} inner steps" if learner.steps else ""
    interval = mean_with_interval(difference, learner.tasks)
    return f"{baseline.name}: {measure.heading} less the learner's{after}, task by task: {interval}"
