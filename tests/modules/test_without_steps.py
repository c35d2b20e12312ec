"""Learners that are adapted without an inner step, and predictions with a standard deviation."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from fits import bare, scalars, trainer
from repository import ROOT
from torch.testing import assert_close

from metalit.callbacks import FitFigures, PredictionWriter, ReportWriter
from metalit.callbacks.errors import draw_errors
from metalit.callbacks.figures import draw_fits
from metalit.callbacks.predictions import draw_predictions
from metalit.data import Columns, Curves, Episodes, Sine, TaskDataModule
from metalit.data.table import read_asked
from metalit.errors import InputError
from metalit.evaluation.task_scores import likelihoods
from metalit.hypergradients import Direct, Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points
from metalit.problems import BayesianHead, FewShot, NeuralProcess, RidgeHead

PROBLEMS = {
    "ridge": lambda: RidgeHead(MLP([1, 8, 6], "Tanh")),
    "bayes": lambda: BayesianHead(1, 1, 2, MLP([1, 8, 6], "Tanh")),
    "curve": lambda: BayesianHead(1, 1, 2, train_on="curve"),
    "process": lambda: NeuralProcess(1, 1, 8),
    "attention": lambda: NeuralProcess(1, 1, 8, attention=True),
}
SPREAD = [name for name in PROBLEMS if name != "ridge"]


def learner(name, **options):
    torch.manual_seed(0)
    return MetaLearner(PROBLEMS[name](), **options)


def sine():
    return TaskDataModule(Sine(noise=0.1), Episodes(4, 5, 6), Episodes(6, 5, 7), Episodes(6, 5, 7))


def curves(**episodes):
    """A real table in units of its own, of curves of unequal length."""
    source = Curves(str(ROOT / "data/gapminder.csv"), task="country", x=["year"], y=["lifeExp"], test=0.3)
    return TaskDataModule(source, *[Episodes(8, 3, "all")] * 3, **episodes)


class TestArguments:
    def test_neither_an_inner_optimiser_nor_a_hypergradient_is_needed(self):
        module = learner("ridge")
        assert module.hypergradient == Direct()
        assert module.eval_steps == 0

    def test_steps_may_follow(self):
        module = learner("ridge", inner_optimizer=SGD(0.1), hypergradient=Unrolled(2))
        assert module.eval_steps == 2
        assert learner("ridge", inner_optimizer=SGD(0.1), eval_steps=3).eval_steps == 3

    def test_what_takes_steps_has_ten_of_them(self):
        for trained, evaluated in ((1, 10), (12, 12)):
            assert MetaLearner(FewShot(MLP([1, 1])), SGD(0.1), Unrolled(trained)).eval_steps == evaluated

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: MetaLearner(FewShot(MLP([1, 1])), SGD(0.1)),
                "model.hypergradient: FewShot learns through inner steps; name how, such as Unrolled",
            ),
            (
                lambda: MetaLearner(FewShot(MLP([1, 1])), hypergradient=Direct()),
                "model.inner_optimizer: 0 inner step(s) are trained and 10 evaluated; name what takes them, such as "
                "SGD",
            ),
            (
                lambda: learner("ridge", hypergradient=Unrolled(2)),
                "model.inner_optimizer: 2 inner step(s) are trained and 2 evaluated; name what takes them, such as SGD",
            ),
            (
                lambda: learner("ridge").adapt(torch.zeros(2, 1), torch.zeros(2, 1), steps=1),
                "inner_optimizer: there is none, so no inner step can be taken; give one, such as SGD",
            ),
            (
                lambda: learner("ridge").adapt(torch.zeros(2, 1), torch.zeros(2, 1)).interval(torch.zeros(1, 1)),
                "spread: RidgeHead predicts no standard deviation; BayesianHead and NeuralProcess do",
            ),
        ],
    )
    def test_what_is_missing_is_said(self, make, message):
        with pytest.raises(InputError) as raised:
            make()
        assert str(raised.value) == message


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (BayesianHead(2, 1), "BayesianHead: inputs=2, but the data has 1 columns of inputs; set inputs to 1"),
        (NeuralProcess(1, 3, 4), "NeuralProcess: outputs=3, but the data has 1 columns of outputs; set outputs to 1"),
    ],
)
def test_data_of_other_columns_is_refused(problem, message, tmp_path):
    with pytest.raises(InputError) as raised:
        bare(tmp_path).fit(MetaLearner(problem), sine())
    assert str(raised.value) == message


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_learns_validates_and_tests(name, tmp_path):
    module, data = learner(name), sine()
    run = trainer(
        tmp_path, 4, precision="64-true", callbacks=[ReportWriter(), FitFigures(2)], enable_checkpointing=False
    )
    run.fit(module, data)
    (found,) = run.test(module, data, verbose=False)
    assert math.isfinite(found["test/loss_step_0"])
    assert "test/loss_step_1" not in found
    written = pd.read_csv(tmp_path / "run/version_0/test.csv")
    assert list(written["predictor"]) == ["learner", "one curve for all tasks"]
    spread = ["squared_error", "nll", "inside_95"]
    assert [column for column in spread if column in written] == (spread if name in SPREAD else [])
    if name in SPREAD:
        # a baseline is compared by what it has
        assert written[["loss", "nll", "inside_95"]].iloc[1].isna().all()
        assert written["squared_error"].notna().all()
        assert math.isclose(written["nll"][0], found["test/nll_step_0"], rel_tol=1e-9)
        assert (math.isclose(written["nll"][0], written["loss"][0], rel_tol=1e-9)) == (name != "curve")
    report = module.report("test")
    assert report.sections[0][0][0] == "0"
    assert len(report.sections[0]) == 1
    # a likelihood is drawn once
    assert ("loss" in report.chart) == (name == "ridge")
    figure = draw_errors(report.chart)
    for axes, (curve, *baselines) in zip(figure.axes, map(list, map(dict.values, report.chart.values())), strict=False):
        (bar,) = axes.collections[0].get_segments()
        assert bar[1, 1] - bar[0, 1] == pytest.approx(2 * curve[0].half_width)
        assert len(axes.patches) == len(baselines)
    named = figure.legends[0].get_texts()
    assert [text.get_text() for text in named] == ["learner", "one curve for all tasks"]
    measure = "loss" if name == "ridge" else "squared error"
    assert report.after[0].startswith(f"one curve for all tasks: {measure} less the learner's, task by task:")
    assert (tmp_path / "run/version_0/figures/test.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", PROBLEMS)
def test_chunked_and_fused_steps_are_those_of_all_tasks_at_once(name, tmp_path):
    found = []
    for options in ({}, {"tasks_per_chunk": 3}, {"fused_steps": 2}):
        module = learner(name, **options)
        bare(tmp_path, 4, precision="64-true", limit_val_batches=0, log_every_n_steps=2).fit(module, sine())
        found.append(module.problem.state_dict())
    for other in found[1:]:
        assert_close(dict(other), dict(found[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["bayes"])
def test_compiled_steps_are_those_without_the_compiler(name, tmp_path):
    found = []
    for compile in (False, True):
        module = learner(name, compile=compile, fused_steps=2)
        bare(tmp_path, 4, precision="64-true", limit_val_batches=0, log_every_n_steps=2).fit(module, sine())
        assert module.is_compiled == compile
        found.append(module.problem.state_dict())
    assert_close(dict(found[1]), dict(found[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": SGD(0.1), "hypergradient": Unrolled(1)}])
def test_what_is_solved_in_init_has_no_gradient_left(options, tmp_path):
    trainer(tmp_path, 2, precision="64-true", log_every_n_steps=1, callbacks=[]).fit(
        learner("ridge", **options), sine()
    )
    assert all(value < 1e-12 for _, value in scalars(tmp_path)["train/inner_grad_ratio"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_half_precision_learns_what_single_precision_does(name, precision, tmp_path):
    losses = []
    for kind in ("32-true", precision):
        module = learner(name)
        run = bare(tmp_path, 4, precision=kind)
        run.fit(module, sine())
        losses.append(run.validate(module, sine(), verbose=False)[0]["val/loss"])
    assert math.isfinite(losses[1])
    assert math.isclose(*losses, rel_tol=0.1, abs_tol=0.1)


@pytest.mark.parametrize("name", SPREAD)
def test_measures_are_those_of_what_is_predicted(name, tmp_path):
    module, data = learner(name), curves()
    run = bare(tmp_path, 2, precision="64-true")
    run.fit(module, data)
    (found,) = run.test(module, data, verbose=False)
    scaling, seen = data.tasks.scaling(), {"squared_error": [], "nll": [], "inside_95": []}
    for batch in data.test_dataloader():
        for index in range(len(batch.support.x)):
            real = batch.query.mask[index] if batch.query.mask is not None else slice(None)
            x, y = (part[index][real] for part in batch.query[:2])
            asked, true = scaling.restore_x(x), scaling.restore_y(y)
            adapted = module.adapt(scaling.restore_x(batch.support.x[index]), scaling.restore_y(batch.support.y[index]))
            unit = scaling.y_std[0]
            mean, (low, high) = adapted(asked), adapted.interval(asked)
            errors, std = (true - mean) / unit, adapted.spread(asked) / unit
            seen["squared_error"].append(errors.square().mean())
            seen["nll"].append(-torch.distributions.Normal(0, std).log_prob(errors).mean())
            seen["inside_95"].append(((low <= true) & (true <= high)).double().mean())
    for measure, values in seen.items():
        assert_close(found[f"test/{measure}_step_0"], torch.stack(values).mean().item(), rtol=1e-7, atol=1e-9)


def test_padding_counts_for_nothing():
    y = torch.tensor([[[0.0], [9.0]]]).double()
    query = Points(y, y, torch.tensor([[True, False]]))
    mean, std = torch.tensor([[[[1.0], [0.0]]]]).double(), torch.full((1, 1, 2, 1), 0.5).double()
    found = {measure.name: values.item() for measure, values in likelihoods(query, mean, std).items()}
    assert found["squared_error"] == 1
    assert found["inside_95"] == 0
    assert math.isclose(found["nll"], 2 + math.log(0.5) + 0.5 * math.log(2 * math.pi))


class TestBands:
    @pytest.fixture
    def points(self, tmp_path):
        file = tmp_path / "points.csv"
        file.write_text("country,year,lifeExp\nmine,1952,40\nmine,1972,50\nmine,2002,\nother,1962,60\nother,1982,\n")
        return file

    def test_bounds_are_written_in_the_units_of_the_user(self, points, tmp_path):
        module, data = learner("bayes"), curves(predict_file=str(points))
        run = bare(tmp_path, 2, precision="64-true", callbacks=[PredictionWriter()])
        run.fit(module, data)
        for _ in range(2):  # the second replaces the first
            run.predict(module, data)
        written = pd.read_csv(tmp_path / "points_predicted.csv")
        names = ["lifeExp_predicted", "lifeExp_lower", "lifeExp_upper"]
        assert list(written.columns[-3:]) == names
        adapted = module.adapt(torch.tensor([[1952.0], [1972.0]]), torch.tensor([[40.0], [50.0]]))
        asked = torch.tensor([[1952.0], [1972.0], [2002.0]])
        low, high = adapted.interval(asked)
        expected = torch.cat([adapted(asked), low, high], 1)
        assert_close(torch.tensor(written[names].to_numpy()[:3]), expected, rtol=1e-9, atol=0)
        std = data.tasks.scaling().y_std[0]
        inner, x = adapted.inner, data.tasks.scaling().normalise_x(asked)
        plain = module.problem.spread(inner, module.constants()["problem"], x)
        assert_close(high - low, 2 * 1.96 * std * plain, rtol=1e-9, atol=0)
        assert (tmp_path / "points_predicted.png").stat().st_size > 5_000

    def test_the_picture_of_predictions_has_a_band(self, points):
        asked = read_asked(points, Columns("country", ["year"], ["lifeExp"]))
        values, curve = torch.tensor([[40.0], [50.0], [55.0]]), torch.linspace(40, 60, 9)[:, None]
        answer = ("mine", values, curve, (values - 3, values + 3), (curve - 3, curve + 3))
        axes = draw_predictions(asked, Columns("country", ["year"], ["lifeExp"]), [answer]).axes[0]
        (band,) = axes.collections
        assert band.get_label() == "95 % interval"
        y = band.get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == (37, 63)

    @pytest.mark.parametrize(("name", "bands"), [("bayes", 1), ("ridge", 0)])
    def test_fits_have_a_band_where_there_is_a_deviation_and_are_adapted_without_a_step(self, name, bands, tmp_path):
        module, data = learner(name), curves()
        bare(tmp_path, 2).fit(module, data)
        figure = draw_fits(module, data.pictured("val", 2), data.tasks, (0, 1, 5))
        labels = figure.axes[0].get_legend_handles_labels()[1]
        assert "adapted" in labels
        assert "before adapting" not in labels
        assert len(figure.axes[0].collections) == bands
        assert ("95 % interval" in labels) == bool(bands)

    def test_a_band_is_seen_where_it_is_not_far_wider_than_the_truth(self, tmp_path):
        module, data = learner("bayes"), sine()
        bare(tmp_path, 1).fit(module, data)
        figure = draw_fits(module, data.pictured("val", 4), data.tasks, (0,))
        for axes in figure.axes:
            truth = np.concatenate([line.get_ydata() for line in axes.lines])
            band = axes.collections[0].get_paths()[0].vertices[:, 1]
            low, high = axes.get_ylim()
            room = 0.5 * (truth.max() - truth.min())
            assert low <= max(band.min(), truth.min() - room)
            assert high >= min(band.max(), truth.max() + room)

    def test_several_inputs_have_bars(self, tmp_path):
        torch.manual_seed(0)
        module = MetaLearner(BayesianHead(2, 1, 1))
        source = Curves(
            str(ROOT / "data/gapminder.csv"), task="country", x=["year", "gdpPercap"], y=["lifeExp"], test=0.3
        )
        data = TaskDataModule(source, *[Episodes(8, 3, "all")] * 3)
        bare(tmp_path, 2).fit(module, data)
        figure = draw_fits(module, data.pictured("val", 2), source, (0,))
        assert len(figure.axes[0].collections) == 1


def test_a_checkpoint_gives_the_same_answers(metalit, tmp_path):
    status, output = metalit("fit", "configs/sine_bayes.yaml", "--figures.tasks=2")
    assert status == 0, output
    status, output = metalit("test", "configs/sine_bayes.yaml")
    assert status == 0, output
    assert "−log likelihood" in output
    points = tmp_path / "points.csv"
    points.write_text("task,x,y\nnew,-2.0,2.0\nnew,1.0,3.0\nnew,0.5,\n")
    status, output = metalit("predict", "configs/sine_bayes.yaml", f"--data.predict_file={points}")
    assert status == 0, output
    assert "inner steps: 0, BayesianHead adapts without" in output
    module = MetaLearner.load_from_checkpoint(tmp_path / "lightning_logs/sine_bayes/version_0/checkpoints/best.ckpt")
    adapted = module.adapt(torch.tensor([[-2.0], [1.0]]), torch.tensor([[2.0], [3.0]]))
    low, high = adapted.interval(torch.tensor([[0.5]]))
    written = pd.read_csv(tmp_path / "points_predicted.csv")
    np.testing.assert_allclose(written[["y_lower", "y_upper"]].to_numpy()[-1], [low.item(), high.item()], rtol=1e-5)
