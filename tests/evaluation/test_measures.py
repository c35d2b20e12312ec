"""A measure that a meta-learner collects beside its loss is logged, returned, tabled and written by its name."""

import pandas as pd
import pytest
import torch
from fits import trainer

from metalit.callbacks import ReportWriter
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.evaluation.judged import Measure
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

WORST = Measure("worst", "worst error")


class Worst(MetaLearner):
    """Collects the largest error of a task too."""

    def measures(self, tasks):
        errors = (self.query_predictions(tasks) - self.cast(tasks.query.y).unsqueeze(1)).abs()
        return super().measures(tasks) | {WORST: errors.amax((2, 3))}


def test_one_entry_makes_a_measure(tmp_path, capsys):
    torch.manual_seed(0)
    learner = Worst(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=2)
    data = TaskDataModule(Sine(), *[Episodes(5, 2, 3)] * 3)
    run = trainer(tmp_path, 2, callbacks=[ReportWriter()])
    run.fit(learner, data)
    assert {"val/worst_step_0", "val/worst_step_2"} <= set(run.callback_metrics)
    (returned,) = run.test(learner, data, verbose=False)
    tasks = data.draw("test", torch.arange(5))
    expected = (learner.query_predictions(tasks)[:, 2] - tasks.query.y).abs().amax((1, 2)).double().mean()
    assert returned["test/worst_step_2"] == pytest.approx(float(expected))
    table = pd.read_csv(tmp_path / "run/version_0/test.csv")
    assert table["worst"][2] == returned["test/worst_step_2"]
    assert "worst_step_2" in pd.read_csv(tmp_path / "run/version_0/test_tasks.csv")
    printed = capsys.readouterr().out.splitlines()
    (headings,) = [line for line in printed if "inner steps" in line and "worst error" in line]
    (baseline,) = [line for line in printed if line.startswith("│ one curve for all tasks")]
    assert len(headings) == len(baseline)  # whose cell is empty
