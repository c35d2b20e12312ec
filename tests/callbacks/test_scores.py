"""The table of scores, what a bilevel learner found, and the gradient norms of single rows."""

import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from cases import task_at
from fits import Given, bare, blobs, events, last, regression, scalars, trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from metalit.callbacks import FitFigures, LastCheckpoint, ReportWriter, SampleGradientNorms
from metalit.data import BatchDataModule, Episodes, MatrixDataModule, Sine, SplitsDataModule, TaskDataModule
from metalit.data.rows import Rows
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import Direct, Implicit, Unrolled
from metalit.inner import SGD, Newton
from metalit.linsolve import Dense
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, FewShot, LowRank, Ridge


def ridge(features=5, **options):
    return BilevelLearner(Ridge(features), Newton(), Implicit(1, Dense()), **options).double()


def noisy():
    return SplitsDataModule(regression(), noise_columns=2)


def cleaning(rows=60, **options):
    torch.manual_seed(0)
    return BilevelLearner(Cleaning(MLP([4, 3], **options), rows), SGD(0.5), Implicit(5)).double()


def run_of(tmp_path):
    return tmp_path / "run" / "version_0"


def exact(file):
    """A table of numbers to the last digit, which the default parser does not promise."""
    return pd.read_csv(file, index_col="row", dtype=str).map(float)


def table(printed):
    """The cells of the last table that was printed, by row."""
    lines = [line for line in printed.splitlines() if line.startswith(("┃", "│"))]
    start = max(index for index, line in enumerate(lines) if line.startswith("┃"))
    cells = [re.split(r"[┃│]", line)[1:-1] for line in lines[start:]]
    header, *rows = [[cell.strip() for cell in row] for row in cells]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


class TestScores:
    def test_at_the_end_of_a_fit(self, tmp_path, capsys):
        module, data = ridge(), noisy()
        trainer(tmp_path, precision="64-true", callbacks=[ReportWriter()]).fit(module, data)
        printed = capsys.readouterr().out
        assert "scores on val after 4 outer steps" in printed
        names = ["learned", "0.00248 for all", "0.0183 for all", "0.135 for all", "1 for all"]
        assert list(module.scores) == list(table(printed)) == names
        shown = {row: {name: f"{value:.4g}" for name, value in scores.items()} for row, scores in module.scores.items()}
        assert table(printed) == shown
        # every digit is in the file
        frame = exact(run_of(tmp_path) / "val.csv")
        assert frame.to_dict("index") == module.scores
        assert f"features:        {run_of(tmp_path)}" in printed.replace("\n", "")

    def test_what_was_found_is_a_file_of_full_precision(self, tmp_path):
        module, data = ridge(), noisy()
        trainer(tmp_path, precision="64-true", callbacks=[ReportWriter()]).fit(module, data)
        frame = exact(run_of(tmp_path) / "results/features.csv")
        assert list(frame.index) == ["x0", "x1", "x2", "noise1", "noise2"]
        assert list(frame.columns) == ["log_penalty", "weight"]
        assert (frame["log_penalty"].to_numpy() == module.problem.log_penalty.detach().numpy()).all()
        weight = module.solve(task_at(data.draw("val", torch.arange(1)), 0))["weight"]
        assert (frame["weight"].to_numpy() == weight.numpy()).all()

    def test_rows_are_not_named_by_columns(self, tmp_path):
        # as many rows as columns
        rows = Rows(torch.randn(8, 4).double(), torch.arange(8) % 2, list("abcd"), "y", ["0", "1"])
        data = SplitsDataModule(Given(rows), corrupt=0.5)
        torch.manual_seed(0)
        module = BilevelLearner(Cleaning(MLP([4, 2]), 4), SGD(0.5), Unrolled(1))
        trainer(tmp_path, callbacks=[ReportWriter()]).fit(module, data)
        frame = pd.read_csv(run_of(tmp_path) / "results/examples.csv", index_col="row")
        assert list(frame.index) == [0, 1, 2, 3]
        assert frame["corrupted"].tolist() == data.splits.corrupted.tolist()
        assert frame["label"].tolist() == data.splits.train.y.tolist()
        assert frame["weight"].to_numpy() == pytest.approx(torch.sigmoid(module.problem.logit.detach()).numpy())

    def test_columns_of_matrices_are_numbered(self, tmp_path):
        torch.manual_seed(0)
        module = BilevelLearner(LowRank(3, 4, 2), SGD(), Direct())
        trainer(tmp_path, callbacks=[ReportWriter()]).fit(module, MatrixDataModule(rows=3, columns=4))
        frame = pd.read_csv(run_of(tmp_path) / "results/u.csv", index_col="row")
        assert list(frame.columns) == ["u1", "u2"]
        np.testing.assert_allclose(frame.to_numpy(), module.problem.u.detach().numpy(), rtol=1e-6)
        assert list(pd.read_csv(run_of(tmp_path) / "val.csv")["row"]) == ["learned"]

    def test_half_precision_has_a_file_too(self, tmp_path):
        torch.manual_seed(0)
        module = BilevelLearner(LowRank(3, 4, 2), SGD(), Direct())
        data = MatrixDataModule(rows=3, columns=4)
        trainer(tmp_path, precision="bf16-true", callbacks=[ReportWriter()]).fit(module, data)
        frame = pd.read_csv(run_of(tmp_path) / "results/u.csv", index_col="row")
        assert (frame.to_numpy() == module.problem.u.detach().double().numpy()).all()

    def test_what_is_not_finite_has_no_table(self, tmp_path, capsys):
        torch.manual_seed(0)
        module = BilevelLearner(LowRank(3, 4), SGD(), Direct(), optimizer=partial(torch.optim.SGD, lr=3e38))
        run = trainer(tmp_path, 1, callbacks=[ReportWriter()])
        with pytest.raises(NonFiniteError, match="at outer step 1"):
            run.fit(module, MatrixDataModule(rows=3, columns=4))
        assert "scores on val" not in capsys.readouterr().out
        assert not list(tmp_path.rglob("*.csv"))

    def test_after_validate_and_test(self, tmp_path, capsys):
        module, data = ridge(), noisy()
        run = trainer(tmp_path, precision="64-true", callbacks=[ReportWriter(), LastCheckpoint()])
        for split, judge in (("val", run.validate), ("test", run.test)):
            judge(module, data, verbose=False)
            printed = capsys.readouterr().out
            assert f"scores on {split}\n" in printed
            assert list(table(printed)) == list(module.scores)
            assert len(module.scores) == 5
            frame = exact(run_of(tmp_path) / f"{split}.csv")
            assert frame.to_dict("index") == module.scores
        # from a checkpoint, at its step
        run.fit(module, data)
        run = trainer(tmp_path, precision="64-true", callbacks=[ReportWriter()])
        run.test(ridge(), data, ckpt_path=last(tmp_path), verbose=False)
        assert [step for step, _ in scalars(tmp_path)["test/loss"]] == [0, 4]

    def test_of_a_supervised_learner(self, tmp_path, capsys):
        torch.manual_seed(0)
        module, data = SupervisedLearner(MLP([4, 3])), BatchDataModule(blobs())
        run = trainer(tmp_path, callbacks=[ReportWriter()])
        run.fit(module, data)
        assert "scores" not in capsys.readouterr().out
        assert not (run_of(tmp_path) / "results").exists()
        run.test(module, data, verbose=False)
        assert list(table(capsys.readouterr().out)["learned"]) == ["loss", "accuracy"]
        assert (run_of(tmp_path) / "test.csv").read_text().startswith("row,loss,accuracy\nlearned,")

    def test_histograms_of_the_outer_variable(self, tmp_path):
        module = ridge()
        trainer(tmp_path, precision="64-true", callbacks=[ReportWriter()]).fit(module, noisy())
        found = events(tmp_path)
        assert found.Tags()["histograms"] == ["outer/problem.log_penalty"]
        drawn = found.Histograms("outer/problem.log_penalty")
        assert [event.step for event in drawn] == [2, 4]
        final = module.problem.log_penalty.detach()
        assert drawn[-1].histogram_value.min == pytest.approx(float(final.min()))
        assert drawn[-1].histogram_value.sum == pytest.approx(float(final.sum()))

    def test_without_a_logger_and_with_another_one(self, tmp_path, capsys):
        bare(tmp_path, precision="64-true", callbacks=[ReportWriter()]).fit(ridge(), noisy())
        assert "scores on val after 4 outer steps" in capsys.readouterr().out
        logger = CSVLogger(tmp_path, "csv", version=0)
        trainer(tmp_path, logger=logger, precision="64-true", callbacks=[ReportWriter()]).fit(ridge(), noisy())
        written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.csv")}
        tables = {"val.csv", "results/features.csv"}
        assert written == tables | {f"csv/version_0/{name}" for name in (*tables, "metrics.csv")}


@pytest.mark.parametrize("kind", ["meta", "supervised"])
def test_a_fit_that_leaves_nothing_but_weights_has_no_report(kind, tmp_path, capsys):
    torch.manual_seed(0)
    module, data = {
        "meta": lambda: (
            MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1),
            TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3),
        ),
        "supervised": lambda: (SupervisedLearner(MLP([4, 3])), BatchDataModule(blobs())),
    }[kind]()
    trainer(tmp_path, callbacks=[ReportWriter()]).fit(module, data)
    printed = capsys.readouterr().out
    assert not [sign for sign in ("scores", "┃") if sign in printed]
    assert not list(tmp_path.rglob("*.csv"))


def test_the_pictures_of_few_shot_learning_are_silent_for_others(tmp_path):
    torch.manual_seed(0)
    for number, (module, data) in enumerate(
        [(ridge(), noisy()), (SupervisedLearner(MLP([4, 3])), BatchDataModule(blobs()))]
    ):
        run = trainer(tmp_path / str(number), callbacks=[ReportWriter(), FitFigures()])
        run.fit(module.float(), data)
        run.validate(module, data, verbose=False)
        run.test(module, data, verbose=False)
    assert not list(tmp_path.rglob("*.png"))


def norms_by_hand(losses, point):
    """One row after the other."""
    slopes = [torch.autograd.grad(loss, point, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in slope]).norm() for slope in slopes])


class TestSampleGradientNorms:
    def fit(self, tmp_path, module, data, **options):
        options = {"precision": "64-true", "callbacks": [SampleGradientNorms()], **options}
        trainer(tmp_path, **options).fit(module, data)
        return events(tmp_path)

    def test_tell_corrupted_rows_of_a_supervised_learner(self, tmp_path):
        torch.manual_seed(0)
        network = MLP([4, 8, 3], dropout=0.5)
        module, data = SupervisedLearner(network).double(), BatchDataModule(blobs(), corrupt=0.3)
        found = self.fit(tmp_path, module, data)
        network.eval()
        points, corrupted = data.splits.train, data.splits.corrupted
        losses = F.cross_entropy(network(points.x), points.y, reduction="none")
        norms = norms_by_hand(losses, list(network.parameters()))
        torch.testing.assert_close(module.sample_gradient_norms(None)[0], norms, rtol=1e-10, atol=1e-12)
        expected = roc_auc_score(corrupted, norms)
        logged = scalars(tmp_path)["sample_gradients/auroc"]
        assert [step for step, _ in logged] == [2, 4]
        assert logged[-1][1] == pytest.approx(expected, abs=1e-6)
        assert set(found.Tags()["histograms"]) == {"sample_gradients/clean", "sample_gradients/corrupted"}
        for name, chosen in (("corrupted", norms[corrupted]), ("clean", norms[~corrupted])):
            drawn = found.Histograms(f"sample_gradients/{name}")
            assert [event.step for event in drawn] == [2, 4]
            assert drawn[-1].histogram_value.num == len(chosen)
            assert drawn[-1].histogram_value.sum == pytest.approx(float(chosen.detach().sum()))

    def test_of_a_bilevel_learner_are_those_of_the_inner_variable(self, tmp_path):
        module, data = cleaning(), SplitsDataModule(blobs(), corrupt=0.4)
        module.eval_steps = 30
        self.fit(tmp_path, module, data)
        task = task_at(data.draw("val", torch.arange(1)), 0)
        inner = {name: value.requires_grad_() for name, value in module.solve(task).items()}
        scores = task.train.x @ inner["out.weight"].T + inner["out.bias"]
        losses = F.cross_entropy(scores, task.train.y, reduction="none")
        norms = norms_by_hand(losses, list(inner.values()))
        torch.testing.assert_close(
            module.sample_gradient_norms(data.draw("val", torch.arange(1)))[0], norms, rtol=1e-10, atol=1e-12
        )
        expected = roc_auc_score(data.splits.corrupted, norms)
        assert scalars(tmp_path)["sample_gradients/auroc"][-1][1] == pytest.approx(expected, abs=1e-6)
        assert expected > 0.6

    def test_the_auroc_is_that_of_large_norms_too(self, tmp_path):
        class Large(SupervisedLearner):
            def sample_gradient_norms(self, _):
                norms, corrupted = super().sample_gradient_norms(_)
                return 1e3 + norms, corrupted

        torch.manual_seed(0)
        module, data = Large(MLP([4, 3])), BatchDataModule(blobs(), corrupt=0.3)
        self.fit(tmp_path, module.double(), data)
        norms, corrupted = module.sample_gradient_norms(None)
        logged = scalars(tmp_path)["sample_gradients/auroc"][-1][1]
        assert logged == pytest.approx(roc_auc_score(corrupted, norms), abs=1e-6)
        assert abs(logged - 0.5) > 0.01

    def test_clean_rows_are_one_histogram(self, tmp_path):
        found = self.fit(tmp_path, ridge(3), SplitsDataModule(regression()))
        assert found.Tags()["histograms"] == ["sample_gradients/all"]
        assert "sample_gradients/auroc" not in scalars(tmp_path)

    def test_does_nothing_without_tensorboard_or_outside_of_a_fit(self, tmp_path):
        run = bare(tmp_path, callbacks=[SampleGradientNorms()], precision="64-true")
        module, data = cleaning(), SplitsDataModule(blobs(), corrupt=0.4)
        run.fit(module, data)
        module.sample_gradient_norms = None
        run.validate(module, data, verbose=False)
        assert not list(tmp_path.rglob("events*"))

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_refused_before_training(self, sanity, tmp_path):
        few_shot = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
        low_rank = BilevelLearner(LowRank(2, 5), SGD(), Direct())
        rows = [(torch.randn(8, 4), torch.randn(8, 1))]
        batchnorm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
        cases = [
            (few_shot, TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3), "MetaLearner has no rows"),
            (low_rank, MatrixDataModule(), "LowRank does not fit rows"),
            (SupervisedLearner(MLP([4, 1])), torch.utils.data.DataLoader(rows, batch_size=None), "BatchDataModule"),
            (SupervisedLearner(batchnorm), BatchDataModule(blobs()), "BatchNorm mixes the rows"),
        ]
        for module, data, told in cases:
            run = bare(tmp_path, callbacks=[SampleGradientNorms()], num_sanity_val_steps=sanity)
            loaders = (data, data) if isinstance(data, torch.utils.data.DataLoader) else (data,)
            with pytest.raises(InputError, match=told):
                run.fit(module, *loaders)
            assert sanity == 0 or run.global_step == 0

    def test_an_outer_variable_without_a_row_gradient(self, tmp_path):
        # every row is fitted exactly: no gradient, and no rank among them
        class Zero(SupervisedLearner):
            def sample_gradient_norms(self, _):
                norms, corrupted = super().sample_gradient_norms(_)
                return 0.0 * norms, corrupted

        torch.manual_seed(0)
        self.fit(tmp_path, Zero(MLP([4, 3])).double(), BatchDataModule(blobs(), corrupt=0.3))
        assert scalars(tmp_path)["sample_gradients/auroc"][-1][1] == 0.5
        assert not math.isnan(scalars(tmp_path)["sample_gradients/auroc"][0][1])
