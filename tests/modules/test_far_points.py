"""Points that lie far from what was trained on, and tasks that adapting does not fit, are told in one line."""

import warnings
from pathlib import Path

import pytest
import torch
from fits import last, trainer

from metalit.callbacks import PredictionWriter
from metalit.data import Curves, Episodes, Scaling, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

GAPMINDER = Path(__file__).parents[2] / "data" / "gapminder.csv"
KNOWN = Scaling([50.0, 0.5], [20.0, 1.0], [300.0], [80.0], [0.0, 0.0], [100.0, 1.0], [200.0], [500.0])
COLUMNS = {"task": "patient", "x": ["day", "arm"], "y": ["level"]}


def learner_of(scaling, lr=0.05, inputs=2):
    torch.manual_seed(0)
    learner = MetaLearner(FewShot(MLP([inputs, 1])), SGD(lr), Unrolled(1), eval_steps=3)
    learner.scaling = scaling
    return learner


def said(folder, rows, scaling=KNOWN, lr=0.05, tasks=None):
    """What a prediction for these rows warns of."""
    file = folder / "points.csv"
    tasks = tasks or Curves("none.csv", **COLUMNS)
    header = ",".join([tasks.columns.task, *tasks.columns.x, *tasks.columns.y])
    file.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = TaskDataModule(tasks, predict_file=str(file))
        inputs = len(tasks.columns.x)
        trainer(folder, callbacks=[PredictionWriter()]).predict(learner_of(scaling, lr, inputs), data)
    return [str(warning.message) for warning in caught if "/metalit/" in warning.filename]


INSIDE = [("p", 1, 0, 250), ("p", 50, 0, 400), ("p", 109, 0, "")]


def test_points_within_the_range_and_a_little_beyond_are_no_news(tmp_path):
    assert said(tmp_path, INSIDE) == []


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (("q", 50, 0, 12000), "'level' from 250 to 1.2e+04, trained on 200 to 500"),
        (("q", 50, 0, -5), "'level' from -5 to 400, trained on 200 to 500"),
        (("q", 3650, 0, 300), "'day' from 1 to 3650, trained on 0 to 100"),
        (("p", -20, 0, ""), "'day' from -20 to 109, trained on 0 to 100"),
        (("p", 20, 3, ""), "'arm' from 0 to 3, trained on 0 to 1"),
    ],
)
def test_points_far_outside_of_the_training_data_are_told_with_its_range(tmp_path, row, what):
    found = said(tmp_path, [*INSIDE, row])
    assert [line for line in found if "far outside" in line] == [
        f"data.predict_file={str(tmp_path / 'points.csv')!r} lies far outside of the training data: {what}"
    ]


def test_an_old_checkpoint_knows_no_range_and_tells_nothing(tmp_path):
    without = Scaling(KNOWN.x_mean, KNOWN.x_std, KNOWN.y_mean, KNOWN.y_std)
    assert not any("far outside" in line for line in said(tmp_path, [*INSIDE, ("q", 900, 0, 300)], without))


def test_generated_tasks_have_ranges_too(tmp_path):
    scaling = Sine().scaling()
    assert not scaling.changes
    assert said(tmp_path, [("a", 1, 2), ("a", -5, -4), ("a", 5, "")], scaling, tasks=Sine()) == []
    (line,) = said(tmp_path, [("a", 1, 2), ("a", 50, "")], scaling, tasks=Sine())
    assert "'x' from 1 to 50, trained on -5 to 5" in line


def test_tasks_that_adapting_fits_worse_are_told(tmp_path):
    assert said(tmp_path, INSIDE, lr=0.05) == []
    assert said(tmp_path, INSIDE, lr=1e-30) == []  # fitted as before
    (line,) = said(tmp_path, [*INSIDE, ("q", 10, 0, 300), ("q", 90, 0, 310)], lr=3.0)
    assert line.startswith("predict: 2 task(s), first 'p', are fitted worse at their own support points")


def test_python_is_told_too():
    learner = learner_of(KNOWN)
    x, y = torch.tensor([[10.0, 0.0]]), torch.tensor([[5000.0]])
    with pytest.warns(match=r"adapt: the points lie far outside .*'y\[:, 0\]' from 5000 to 5000, trained on 200"):
        learner.adapt(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.adapt(x, y / 20)


def test_the_range_is_kept_with_the_checkpoint(tmp_path):
    data = TaskDataModule(Curves(str(GAPMINDER), "country", ["year"], ["lifeExp"]), *[Episodes(2, 3)] * 3)
    fitted = trainer(tmp_path, 2)
    fitted.fit(learner_of(None, inputs=1), data)
    kept = torch.load(last(tmp_path), weights_only=True)["scaling"]
    assert (kept["x_min"], kept["x_max"]) == ([1952.0], [2007.0])
    assert 20 < kept["y_min"][0] < 40
    assert 75 < kept["y_max"][0] < 90
