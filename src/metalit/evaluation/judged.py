"""What predictors did on the tasks of an evaluation."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from metalit.evaluation.interval import Interval, mean_with_interval

LEARNER = "learner"


class Measure(NamedTuple):
    """What is measured: ``name`` in files and logs, ``heading`` in tables."""

    name: str
    heading: str
    logged: bool = True  # in every validation; else it stands in reports alone


LOSS = Measure("loss", "loss")
ACCURACY = Measure("accuracy", "accuracy")
# of predictions with a standard deviation, by which baselines have none but the first
SQUARED = Measure("squared_error", "squared error")
NLL = Measure("nll", "−log likelihood")
INSIDE = Measure("inside_95", "in 95 % interval")
Z95 = 1.96  # standard deviations of a normal distribution on either side


class Judged(NamedTuple):
    """What one predictor did."""

    name: str
    values: Mapping[Measure, Tensor]  # [draws, steps]; a baseline has one step
    tasks: Tensor  # [draws], the number of the task that each draw is of

    def intervals(self, measure: Measure) -> list[Interval]:
        """The mean over tasks after each number of inner steps."""
        return [mean_with_interval(values, self.tasks) for values in self.values[measure].unbind(1)]

    def means(self) -> list[list[Interval]]:
        """By inner step: each measure, over tasks."""
        return [list(row) for row in zip(*map(self.intervals, self.values), strict=True)]

    @property
    def steps(self) -> int:
        """How many inner steps were taken; a baseline takes none."""
        return next(iter(self.values.values())).shape[1] - 1

    def label(self, step: int) -> str:
        """Of a row of the table."""
        return str(step) if self.name == LEARNER else self.name
