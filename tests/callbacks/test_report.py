"""The table of errors and its files: means over tasks that are drawn several times, errors task by task, classes."""

import numpy as np
import pandas as pd
import pytest
import torch
from fits import blobs, events, trainer
from test_pictures import classifier
from torch.utils.data import DataLoader

from metalit.callbacks import ReportWriter
from metalit.data import BatchDataModule, Curves, Episodes, Sine, TaskDataModule
from metalit.evaluation.interval import Interval
from metalit.evaluation.report import Report
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import FewShot

PATIENTS = [f"patient {number}" for number in range(10)]


def patients(tmp_path):
    """Levels in milligrams, the names of whose patients are out of order."""
    generator = np.random.default_rng(0)
    rows = [
        (name, day, 100.0 * number + float(generator.normal()))
        for number, name in enumerate(PATIENTS)
        for day in range(6)
    ]
    pd.DataFrame(rows, columns=["who", "day", "mg"]).to_csv(tmp_path / "table.csv", index=False)
    return Curves(str(tmp_path / "table.csv"), "who", ["day"], ["mg"], val=0.3, test=0.4)


@pytest.fixture
def tested(tmp_path, capsys):
    """Test a learner on so many draws of four patients: the learner, what ``test`` returned, files, what is printed."""

    def run(draws):
        torch.manual_seed(0)
        learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=2)
        source = patients(tmp_path)
        data = TaskDataModule(source, Episodes(2, 2), Episodes(3, 2), Episodes(draws, 2))
        run = trainer(tmp_path, callbacks=[ReportWriter()])
        (returned,) = run.test(learner, data, verbose=False)
        folder = tmp_path / "run/version_0"
        files = {name: pd.read_csv(folder / f"{name}.csv") for name in ("test", "test_tasks")}
        return learner, source, returned, files, capsys.readouterr().out

    return run


def interval(values):
    return np.mean(values), 1.96 * np.std(values, ddof=1) / len(values) ** 0.5


class TestTasksThatRepeat:
    def test_count_once(self, tested):
        learner, _, returned, files, printed = tested(14)
        # tasks come in turn: the first two are drawn four times, the others three times
        losses = learner.task_losses[:, 1].double().numpy()
        by_task = [losses[task::4].mean() for task in range(4)]
        mean, half = interval(by_task)
        assert returned["test/loss_step_1"] == pytest.approx(mean, rel=1e-12)
        assert returned["test/loss_step_1_ci95"] == pytest.approx(half, rel=1e-12)
        row = files["test"].iloc[1]
        assert row["loss"] == pytest.approx(mean, rel=1e-12)
        assert row["loss_ci95"] == pytest.approx(half, rel=1e-12)
        assert (row["tasks"], row["draws"]) == (4, 14)
        assert "4 test tasks, 3 to 4 draws of each, adapted to 2 points each" in printed
        assert "over tasks, of which each counts once" in printed

    def test_so_do_baselines_and_differences(self, tested):
        _, _, _, files, printed = tested(8)
        name = "one polynomial for all tasks"
        row = files["test"].set_index("predictor").loc[name]
        one_by_one = files["test_tasks"]
        mean, half = interval(one_by_one["mg_absolute_error_one_polynomial_for_all_tasks"])
        assert (row["mg_absolute_error"], row["mg_absolute_error_ci95"]) == pytest.approx((mean, half), rel=1e-12)
        differ = one_by_one["mg_absolute_error_one_polynomial_for_all_tasks"] - one_by_one["mg_absolute_error_step_2"]
        mean, half = interval(differ)
        assert (
            f"{name}: |error| in mg less the learner's after 2 inner steps, task by task: {mean:.3f} ± {half:.3f}"
            in (printed)
        )

    def test_the_validation_counts_likewise(self, tmp_path):
        learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
        data = TaskDataModule(patients(tmp_path), Episodes(2, 2), Episodes(5, 2), Episodes(4, 2))
        run = trainer(tmp_path, 2, callbacks=[])
        run.fit(learner, data)
        losses = learner.task_losses[:, 1].double().numpy()
        by_task = [losses[task::3].mean() for task in range(3)]
        assert float(run.callback_metrics["val/loss"]) == pytest.approx(np.mean(by_task), rel=1e-6)

    def test_those_that_do_not_are_as_they_were(self, tested):
        *_, printed = tested(4)
        assert (
            "4 test tasks, adapted to 2 points each and judged on all other rows; mean ± 95 % interval over tasks\n"
            in (printed)
        )


class TestErrorsByTask:
    def test_have_the_names_of_the_tasks(self, tested):
        learner, source, _, files, _ = tested(8)
        table = files["test_tasks"]
        assert list(table["task"]) == [source.name("test", number) for number in range(4)]
        assert list(table["draws"]) == [2] * 4
        losses = learner.task_losses.double().numpy()
        for step in range(3):
            np.testing.assert_allclose(table[f"loss_step_{step}"], (losses[:4, step] + losses[4:, step]) / 2)
        # in the user's units: normalised levels have a deviation of 1
        assert (table["mg_absolute_error_step_0"] > table["loss_step_0"].pow(0.5) * 50).all()
        assert {
            f"loss_{name}" for name in ("one_polynomial_for_all_tasks", "a_polynomial_for_each_support_set")
        } <= set(table.columns)

    def test_tasks_without_a_name_have_a_number(self, tmp_path):
        learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
        data = TaskDataModule(Sine(), *[Episodes(5, 2, 2)] * 3)
        trainer(tmp_path, callbacks=[ReportWriter()]).validate(learner, data, verbose=False)
        assert list(pd.read_csv(tmp_path / "run/version_0/val_tasks.csv")["task"]) == [0, 1, 2, 3, 4]

    def test_of_a_loader_of_ones_own(self, tmp_path):
        learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
        batches = list(TaskDataModule(Sine(), *[Episodes(3, 2, 2)] * 3).test_dataloader()) * 2
        loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
        trainer(tmp_path, callbacks=[ReportWriter()]).test(learner, loader, verbose=False)
        assert list(pd.read_csv(tmp_path / "run/version_0/test_tasks.csv")["task"]) == list(range(6))


class TestClasses:
    def test_have_an_accuracy(self, tmp_path, capsys):
        learner, data = classifier(2)
        run = trainer(tmp_path, callbacks=[ReportWriter()])
        run.fit(learner, data)
        assert {"val/accuracy_step_0", "val/accuracy_step_2"} <= set(run.callback_metrics)
        (returned,) = run.test(learner, data, verbose=False)
        tasks = data.draw("test", torch.arange(4))
        right = learner.query_predictions(tasks)[:, 2].argmax(-1) == tasks.query.y
        assert returned["test/accuracy_step_2"] == pytest.approx(float(right.double().mean()))
        table = pd.read_csv(tmp_path / "run/version_0/test.csv")
        assert table["accuracy"][2] == pytest.approx(float(right.double().mean()))
        np.testing.assert_allclose(
            pd.read_csv(tmp_path / "run/version_0/test_tasks.csv")["accuracy_step_2"], right.double().mean(1)
        )
        assert "accuracy" in capsys.readouterr().out

    def test_rows_that_do_not_count_and_scores_that_are_none(self):
        from metalit.evaluation.task_scores import accuracies
        from metalit.problem import Points

        scores = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])[None, None]  # says 0, 1, 0, 1
        y, mask = torch.tensor([[0, 0, -100, 0]]), torch.tensor([[True, True, True, False]])
        assert accuracies(None, scores, Points(scores[0, 0], y)).item() == pytest.approx(1 / 3)
        assert accuracies(None, scores, Points(scores[0, 0], y, mask)).item() == 0.5
        # one score is none for each of two classes
        assert accuracies(None, scores[..., :1], Points(scores[0, 0], y)) is None


class Own(SupervisedLearner):
    """Reports what it likes."""

    def report(self, split):
        numbers = pd.DataFrame({"part": ["head [/b]"], "rate": [0.1 + 0.2]})
        chart = {"rate": {"mine": [Interval(0.3, 0.1, 0, 4), Interval(0.2, 0.1, 0, 4)]}}
        rows = [["head [/b]", "0.3"]]
        return Report("rates", split, ["part", "rate"], [rows], ["before"], ["after"], {"rates": numbers}, chart=chart)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_learner_reports_what_it_likes_by_one_method(split, tmp_path, capsys):
    run = trainer(tmp_path, callbacks=[ReportWriter()])
    evaluate = {"val": run.validate, "test": run.test}[split]
    evaluate(Own(MLP([4, 3])), BatchDataModule(blobs()), verbose=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (row,) = [line for line in lines if "head [/b]" in line]
    assert "0.3" in row
    assert lines.index("before") < lines.index(row) < lines.index("after")
    folder = tmp_path / "run/version_0"
    assert (folder / "rates.csv").read_text() == f"part,rate\nhead [/b],{0.1 + 0.2}\n"
    assert (folder / f"figures/{split}_rates.png").exists()
    assert f"rates/{split}/text_summary" in events(tmp_path).Tags()["tensors"]
    assert events(tmp_path).Tags()["images"] == [f"pictures/rates_{split}"]
