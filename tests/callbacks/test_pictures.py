"""Pictures and tables show names of the user's as they are written, and never end a run."""

import csv
import gc
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fits import blobs, events, regression, told_once, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import meta

from metalit.callbacks import FitFigures, PredictionWriter, ReportWriter, SampleGradientNorms
from metalit.callbacks.drawing import literal, pixels
from metalit.callbacks.errors import draw_errors
from metalit.callbacks.figures import _limits, draw_fits
from metalit.callbacks.predictions import draw_predictions
from metalit.callbacks.screen import show, table
from metalit.callbacks.tensorboard import write_table
from metalit.data import (
    BatchDataModule,
    Columns,
    Curves,
    Episodes,
    Scaling,
    Sine,
    SplitsDataModule,
    TaskDataModule,
    TaskDistribution,
)
from metalit.data.table import read_asked
from metalit.errors import InputError
from metalit.evaluation.judged import LOSS, Judged
from metalit.evaluation.task_report import chart_of
from metalit.hypergradients import Implicit, Unrolled
from metalit.inner import SGD, Newton
from metalit.keys import fold, normal
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot, Ridge

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
        run = trainer(tmp_path, callbacks=[FitFigures(2), ReportWriter()])
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
        def fails(*_):
            raise OSError("disk full")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", fails)
        bilevel = BilevelLearner(Ridge(3), Newton(), Implicit(1)).double()
        plain = SupervisedLearner(torch.nn.Linear(4, 3))
        for learner, data, callback in (
            (bilevel, SplitsDataModule(regression()), ReportWriter()),
            (plain, BatchDataModule(blobs(), batch_size=8), SampleGradientNorms()),
        ):
            run = trainer(tmp_path, callbacks=[callback])
            assert "disk full" in told_once(lambda run=run, of=learner, on=data: run.fit(of, on), "not drawn")
            assert run.global_step == 4


class TestNamesOfTheUser:
    def test_stand_in_the_table_and_in_the_files(self, tmp_path, capsys):
        run = trainer(tmp_path, 2, callbacks=[FitFigures(10), ReportWriter()])
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
        run = trainer(tmp_path, 2, callbacks=[ReportWriter()])
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
        shown = figure._supylabel
        assert shown._preprocess_math(shown.get_text()) == (literal(Y, 40).replace(r"\$", "$"), False)
        assert figure.axes[1].title._preprocess_math(figure.axes[1].title.get_text()) == ("$\\nosuch$", False)
        assert not list(recwarn)

    @pytest.mark.parametrize("name", [*NAMES, X, Y, "a\\$b", "", "\x00\x07"])
    def test_any_of_them_is_one_line_of_plain_text(self, name):
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
        assert figure.get_suptitle() == "the first 12 of 40 tasks"
        assert not self.predicted(tmp_path, ["one", "two"]).get_suptitle()

    def test_of_several_inputs_are_drawn_over_whole_lines_of_the_file(self, tmp_path):
        file = tmp_path / "points.csv"
        file.write_text("task,a,b,c\nt,0,1,2\nt,1,1,3\nt,2,1,\n")
        columns = Columns("task", ["a", "b"], ["c"])
        values = torch.ones(3, 1).double()
        axes = draw_predictions(read_asked(file, columns), columns, [("t", values, values)]).axes[0]
        assert axes.get_xlabel() == "line of the file"
        assert all(tick == round(tick) for tick in axes.get_xticks())

    def test_that_are_not_finite_are_an_error_and_no_file(self, tmp_path):
        torch.manual_seed(0)  # a network all of whose units are dead would stay as it is
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


class Known:
    """Stands for a learner whose fits are known, ``[tasks, steps, queries, 1]``."""

    def __init__(self, fits):
        self.fits, self.eval_steps = fits, fits.shape[1] - 1
        self.scaling = Scaling.identity(1, 1)
        self.problem = SimpleNamespace(adapts_in_init=False)

    def query_predictions(self, tasks):
        return self.fits

    def query_deviations(self, tasks):
        return None


def fitted(*fits, inputs=1):
    """The axes of one task, y from 0 to 1, whose fits after 0, 1, … steps are constants or rise from one to another."""
    x = torch.linspace(0, 1, 5).reshape(1, 5, 1)
    points = Points(x.expand(1, 5, inputs), x)
    values = torch.stack([torch.linspace(*(fit if isinstance(fit, tuple) else (fit, fit)), 5) for fit in fits])
    source = SimpleNamespace(columns=Columns("task", ["a", "b"][:inputs], ["c"]), noisy=False)
    task = Task(points, points, torch.zeros(1, dtype=torch.long))
    figure = draw_fits(Known(values.reshape(1, -1, 5, 1)), task, source, range(len(fits)), ["Chad"])
    pixels(figure)
    return figure.axes[0]


class TestFits:
    @pytest.mark.parametrize("inputs", [1, 2])
    def test_before_adapting_is_within_the_limits(self, inputs):
        low, high = fitted((-7.0, 5.0), 0.5, inputs=inputs).get_ylim()
        assert low < -7.0
        assert high > 5.0

    @pytest.mark.parametrize("inputs", [1, 2])
    @pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
    def test_one_that_diverges_does_not_squeeze_the_others(self, value, inputs):
        low, high = fitted(0.5, value, inputs=inputs).get_ylim()
        assert -1 < low < 0
        assert 1 < high < 2

    def test_a_constant_truth_that_is_met_has_room(self):
        axes = fitted(0.0)
        axes.set_ylim(*_limits(torch.full((3,), 5e8), None, []))
        assert axes.get_ylim()[0] < 5e8 < axes.get_ylim()[1]

    def test_the_true_values_have_limits_of_their_own(self):
        low, high = fitted((-7.0, 5.0), inputs=2).get_xlim()
        assert -0.5 < low < 0
        assert 1 < high < 1.5

    def test_have_titles_and_look_different(self):
        axes = fitted(*range(6))
        assert axes.get_title() == "Chad"
        looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        colours = {line.get_color() for line in axes.lines}
        assert len(looks) == len(colours) == len(axes.lines) == 1 + 6 + 1

    def test_tasks_are_drawn_once_under_their_names(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr("metalit.callbacks.figures.draw_fits", lambda *given: seen.append(given[-1]))
        source = curves(tmp_path)
        data = TaskDataModule(source, *[Episodes(2, 2)] * 3)
        trainer(tmp_path, callbacks=[FitFigures(4)]).test(regressor(), data, verbose=False)
        assert seen == [[source.name("test", 0), source.name("test", 1)]]


class TestTensorBoard:
    def test_opens_on_the_losses_and_has_no_card_of_a_single_dot(self, metalit, tmp_path):
        metalit("fit", "configs/curves_gapminder.yaml", "--figures.tasks=2")
        metalit("test", "configs/curves_gapminder.yaml", "--figures.tasks=2")
        found = EventAccumulator(str(tmp_path / "lightning_logs/curves_gapminder/version_0"), {"tensors": 0})
        found.Reload()
        tags = found.Tags()
        cards = sorted(tags["scalars"] + tags["images"])
        assert cards[:5] == [
            *("loss/train", "loss/val"),
            *("pictures/errors_test", "pictures/fits_test", "pictures/fits_val"),
        ]
        assert not [card for card in cards if "test" in card and "pictures" not in card]
        assert [event.value for event in found.Scalars("loss/val")] == [
            event.value for event in found.Scalars("val/loss")
        ]
        # wider than high, as its cards are
        picture = found.Images("pictures/fits_val")[0]
        assert picture.width > 1.5 * picture.height
        text = found.Tensors("errors/test/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| in 95 % interval | \\|error\\| in lifeExp |" in text
        assert "| a polynomial for each support set |" in text

    def test_names_in_its_tables_are_no_markdown(self, tmp_path):
        logger = TensorBoardLogger(tmp_path, "run", 0)
        write_table(logger, "table", ["a|b_c_", "x"], [["<b>*", "1"]], 3, ["one `line`\nof two", "after"])
        logger.experiment.flush()
        (event,) = events(tmp_path).Tensors("table/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert text == "one \\`line\\` of two\n\n| a\\|b\\_c\\_ | x |\n| --- | --- |\n| \\<b\\>\\* | 1 |\n\nafter"

    def test_has_the_scores_of_others_as_a_table(self, metalit, tmp_path):
        metalit("fit", "configs/sgd_digits.yaml")
        metalit("test", "configs/sgd_digits.yaml")
        found = EventAccumulator(str(tmp_path / "lightning_logs/sgd_digits/version_0"), {"tensors": 0})
        found.Reload()
        assert not [tag for tag in found.Tags()["scalars"] if tag.startswith("test/")]
        assert "| learned |" in found.Tensors("scores/test/text_summary")[0].tensor_proto.string_val[0].decode()


class TestErrors:
    def chart(self, losses, baseline):
        tasks = torch.arange(len(losses))
        learner = Judged("learner", {LOSS: losses}, tasks)
        return chart_of([learner, Judged("a [b] $ line", {LOSS: baseline}, tasks)])

    def test_are_a_curve_in_a_band_beside_lines(self):
        losses = torch.tensor([[4.0, 2.0, 1.0], [6.0, 2.0, 3.0]])
        figure = draw_errors(self.chart(losses, torch.tensor([[3.0], [5.0]])))
        pixels(figure)
        (axes,) = figure.axes
        curve, line = axes.lines
        np.testing.assert_allclose(curve.get_ydata(), [5.0, 2.0, 2.0])
        assert list(line.get_ydata()) == [4.0, 4.0]
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(5.0 + 1.96)
        assert axes.get_ylim()[1] > 5.0 + 1.96

    @pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
    def test_where_steps_diverge_the_rest_is_to_be_seen(self, value):
        losses = torch.tensor([[4.0, 2.0, value], [6.0, 2.0, value]])
        figure = draw_errors(self.chart(losses, torch.tensor([[3.0], [5.0]])))
        pixels(figure)
        assert figure.axes[0].get_ylim() == (0, pytest.approx(1.05 * 6.96))

    def test_of_one_task(self):
        pixels(draw_errors(self.chart(torch.tensor([[4.0, 2.0]]), torch.tensor([[3.0]]))))


def test_no_figure_is_left_in_memory(tmp_path):
    def figures():
        return sum(type(thing) is Figure for thing in gc.get_objects())

    gc.collect()
    before = figures()
    data = TaskDataModule(Sine(), Episodes(2, 3, 3), Episodes(2, 3, 3), Episodes(2, 3, 3))
    run = trainer(tmp_path, callbacks=[FitFigures(1)])
    run.fit(meta(), data)
    assert (tmp_path / "run/version_0/figures/val.png").exists()
    assert figures() == before
