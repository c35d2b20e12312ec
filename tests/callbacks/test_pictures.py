"""Pictures and tables show names of the user's as they are written, and never end a run."""

import csv
import re

import numpy as np
import pandas as pd
import pytest
import torch
from fits import told_once, trainer

from metalit.callbacks import FitFigures, PredictionWriter, Report, SampleGradientNorms, ScoreTable
from metalit.callbacks.drawing import literal, pixels
from metalit.callbacks.figures import draw_fits
from metalit.callbacks.predictions import draw_predictions
from metalit.callbacks.screen import show, table
from metalit.data import Columns, Curves, Episodes, Sine, TaskDataModule, TaskDistribution
from metalit.errors import InputError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.keys import fold, normal
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot

# a style of Rich, the end of one, half a formula, a whole one, an unknown command, a letter that no font has
X, Y, TASK = "time [day]", "dose [/day] $x_1^2$ 5 $ \\frac_^", "who [red]"
NAMES = ["a [/b]", "$\\nosuch$", "x_{y^", "line\nbreak", "🦉 [i]", "&%#~ $", "long, " * 30 + ".", "[bold]", "\\", "$$"]


class Digits(TaskDistribution):
    """Which of three classes: of pictures, or of rows of two columns."""

    columns = Columns("task", ["a", "b"], ["kind"])

    def __init__(self, *shape):
        self.shape = shape

    def sample(self, split, index, key, shots, queries):
        x = normal(fold(key, 0), shots + queries, *self.shape)
        y = x.flatten(2).argmax(-1) % 3
        return Task(Points(x[:, :shots], y[:, :shots]), Points(x[:, shots:], y[:, shots:]), fold(key, 1))


def classifier(*shape):
    torch.manual_seed(0)
    size = int(np.prod(shape))
    network = torch.nn.Sequential(torch.nn.Flatten(-len(shape)), MLP([size, 8, 3]))
    learner = MetaLearner(FewShot(network), SGD(0.1), Unrolled(1), eval_steps=2)
    return learner, TaskDataModule(Digits(*shape), *[Episodes(4, 3, 6)] * 3)


def curves(tmp_path, rows=5):
    """Ten curves under names that are no plain text."""
    generator = np.random.default_rng(0)
    found = [(name, day, float(generator.normal())) for name in NAMES for day in range(rows)]
    file = tmp_path / "table.csv"
    pd.DataFrame(found, columns=[TASK, X, Y]).to_csv(file, index=False)
    return Curves(str(file), TASK, [X], [Y])


def regressor():
    torch.manual_seed(0)
    return MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=2)


class TestNeverEndARun:
    @pytest.mark.parametrize("shape", [(2,), (3, 4)], ids=["columns", "images"])
    def test_classes_are_trained_and_tested_without_a_warning(self, shape, tmp_path, recwarn):
        learner, data = classifier(*shape)
        run = trainer(tmp_path, callbacks=[FitFigures(2), Report()])
        run.fit(learner, data)
        (found,) = run.test(learner, data, verbose=False)
        assert "test/loss_step_2" in found
        assert not [warning for warning in recwarn if "not drawn" in str(warning.message)]

    def test_what_fails_is_told_once_in_one_line(self, tmp_path, monkeypatch):
        def fails(*_):
            raise ValueError("no\npicture")

        monkeypatch.setattr("metalit.callbacks.figures.draw_fits", fails)
        learner, data = regressor(), TaskDataModule(Sine(), *[Episodes(4, 3, 6)] * 3)
        run = trainer(tmp_path, callbacks=[FitFigures(2)])
        told = told_once(lambda: run.fit(learner, data), "not drawn")
        assert "ValueError: no picture" in told
        assert "\n" not in told
        assert run.global_step == 4

    def test_nor_do_histograms(self, tmp_path, monkeypatch):
        from fits import blobs, regression

        from metalit.data import BatchDataModule, SplitsDataModule
        from metalit.hypergradients import Implicit
        from metalit.inner import Newton
        from metalit.modules import BilevelLearner, SupervisedLearner
        from metalit.problems import Ridge

        def fails(*_):
            raise OSError("disk full")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", fails)
        bilevel = BilevelLearner(Ridge(3), Newton(), Implicit(1)).double()
        plain = SupervisedLearner(torch.nn.Linear(4, 3))
        for learner, data, callback in (
            (bilevel, SplitsDataModule(regression()), ScoreTable()),
            (plain, BatchDataModule(blobs(), batch_size=8), SampleGradientNorms()),
        ):
            run = trainer(tmp_path, callbacks=[callback])
            assert "disk full" in told_once(lambda run=run, of=learner, on=data: run.fit(of, on), "not drawn")
            assert run.global_step == 4


class TestNamesOfTheUser:
    def test_stand_in_the_table_and_in_the_files(self, tmp_path, capsys):
        run = trainer(tmp_path, 2, callbacks=[FitFigures(10), Report()])
        learner, data = regressor(), TaskDataModule(curves(tmp_path), *[Episodes(2, 2)] * 3)
        run.fit(learner, data)
        run.test(learner, data, verbose=False)
        printed = capsys.readouterr().out
        assert f"|error| in {Y}" in printed
        with (tmp_path / "run/version_0/test.csv").open() as handle:
            assert f"{Y}_absolute_error" in next(csv.reader(handle))
        assert (tmp_path / "run/version_0/figures/test.png").exists()

    def test_are_written_to_the_file_before_they_are_printed(self, tmp_path, monkeypatch):
        def fails(*_):
            raise UnicodeEncodeError("ascii", "±", 0, 1, "no such letter")

        learner, data = regressor(), TaskDataModule(Sine(), *[Episodes(2, 2, 2)] * 3)
        run = trainer(tmp_path, 2, callbacks=[Report()])
        run.fit(learner, data)
        monkeypatch.setattr("metalit.callbacks.report.show", fails)
        with pytest.raises(UnicodeEncodeError):
            run.test(learner, data, verbose=False)
        assert (tmp_path / "run/version_0/test.csv").exists()

    def test_are_drawn_as_they_are_written(self, tmp_path, recwarn):
        source = curves(tmp_path)
        data = TaskDataModule(source, *[Episodes(2, 2)] * 3)
        learner = regressor()
        learner.scaling = source.scaling()
        figure = draw_fits(learner, data.pictured("val", 2), source, (0, 1), NAMES[:2])
        pixels(figure)
        shown = figure.axes[0].yaxis.label
        assert shown._preprocess_math(shown.get_text()) == (literal(Y, 40).replace(r"\$", "$"), False)
        assert figure.axes[1].title._preprocess_math(figure.axes[1].title.get_text()) == ("$\\nosuch$", False)
        assert not list(recwarn)

    @pytest.mark.parametrize("name", [*NAMES, X, Y, "a\\$b", "", "\x00\x07"])
    def test_any_of_them_is_one_line_of_plain_text(self, name):
        from matplotlib.figure import Figure

        figure = Figure()
        text = figure.text(0, 0, literal(name, 200))
        pixels(figure)
        plain, formula = text._preprocess_math(text.get_text())
        assert not formula
        assert plain == " ".join(re.sub(r"[\x00\x07]", " ", name).split())

    def test_long_ones_are_cut(self):
        assert literal("abcdef", 4) == "abc…"

    def test_are_no_styles_on_the_screen(self, capsys):
        show([f"runs [1] {X}", table([TASK, Y], [[X, "[/b]"]])])
        printed = capsys.readouterr().out
        assert all(text in printed for text in (f"runs [1] {X}", TASK, Y, X, "[/b]"))


class TestPredictions:
    def asked(self, tmp_path, names, x=(0.0, 1.0)):
        file = tmp_path / "points.csv"
        rows = [(name, value, 0.5 if value == 0.0 else None) for name in names for value in x]
        pd.DataFrame(rows, columns=["task", "x", "y"]).to_csv(file, index=False)
        return TaskDataModule(Sine(), *[Episodes(2, 2, 2)] * 3, predict_file=str(file))

    def predicted(self, tmp_path, names):
        data = self.asked(tmp_path, names)
        data.setup("predict")
        answers = [(name, torch.ones(2, 1).double(), torch.ones(50, 1).double()) for name in names]
        return draw_predictions(data.asked, data.tasks.columns, answers)

    def test_of_many_tasks_say_how_many_are_drawn(self, tmp_path):
        figure = self.predicted(tmp_path, [f"t{number}" for number in range(40)])
        assert len(figure.axes) == 12
        assert "the first 12 of 40 tasks" in figure._supxlabel.get_text()
        assert self.predicted(tmp_path, ["one", "two"])._supxlabel is None

    def test_that_are_not_finite_are_an_error_and_no_file(self, tmp_path):
        data = self.asked(tmp_path, ["a [/b]"])
        learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(1e30), Unrolled(1), eval_steps=2)
        run = trainer(tmp_path, logger=False, callbacks=[PredictionWriter()])
        with pytest.raises(InputError, match=r"'a \[/b\]', are not finite.*model\.eval_steps"):
            run.predict(learner, data)
        assert not list(tmp_path.glob("points_predicted*"))

    def test_have_the_separator_and_the_decimal_sign_of_the_points(self, tmp_path):
        file = tmp_path / "points.csv"
        file.write_text("task;x;y\na;1,5;0,25\na;2,5;\n")
        data = TaskDataModule(Sine(), *[Episodes(2, 2, 2)] * 3, predict_file=str(file))
        trainer(tmp_path, logger=False, callbacks=[PredictionWriter()]).predict(regressor(), data)
        written = pd.read_csv(tmp_path / "points_predicted.csv", sep=";", decimal=",")
        assert written[["x", "y"]].to_numpy()[0].tolist() == [1.5, 0.25]
        assert written["y_predicted"].dtype == float

    def test_are_written_where_the_picture_cannot_be(self, tmp_path, monkeypatch, capsys):
        def fails(*_):
            raise RuntimeError

        monkeypatch.setattr("metalit.callbacks.predictions.draw_predictions", fails)
        run = trainer(tmp_path, logger=False, callbacks=[PredictionWriter()])
        data = self.asked(tmp_path, NAMES)
        assert "RuntimeError" in told_once(lambda: run.predict(regressor(), data), "not drawn")
        assert list(pd.read_csv(tmp_path / "points_predicted.csv")["task"].unique()) == NAMES
        assert "picture" not in capsys.readouterr().out
