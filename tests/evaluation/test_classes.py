"""Few-shot tasks of classes: judged by accuracy, with the confusions of classes that have names."""

import numpy as np
import pandas as pd
import pytest
import torch
from fits import bare, last, scalars, trainer
from kinds import NAMES, Kinds, namer
from torch import nn

from metalit.callbacks import BestCheckpoint, LastCheckpoint, ReportWriter
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.evaluation.confusion import Confusion, Confusions
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot


def data(*shape, spread=1.0, **sizes):
    given = {"train": Episodes(4, 2, 3), "val": Episodes(6, 2, 5), "test": Episodes(10, 2, 4), **sizes}
    return TaskDataModule(Kinds(*shape, spread=spread), **given)


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A learner that was trained and tested, its data, its folder, its metrics, and what was printed."""
    root = tmp_path_factory.mktemp("kinds")
    learner, tasks = namer(), data()
    callbacks = [BestCheckpoint(), LastCheckpoint(), ReportWriter()]
    run = trainer(root, 8, val_check_interval=2, callbacks=callbacks)
    run.fit(learner, tasks)
    found = dict(run.callback_metrics)
    (returned,) = run.test(learner, tasks, verbose=False)
    return learner, tasks, root, found, returned, callbacks[0]


def right(learner, tasks, split, steps):
    """The share of right answers in each task, by a loop."""
    drawn = tasks.loaded(split, torch.arange(tasks.episodes[split].tasks))
    answers = learner.query_predictions(drawn)[:, steps].argmax(-1)
    return [float((own == true).double().mean()) for own, true in zip(answers, drawn.query.y, strict=True)]


def test_accuracies_stand_beside_losses(tested):
    learner, tasks, root, found, returned, _ = tested
    shares = torch.tensor(right(learner, tasks, "test", 2)).double()
    assert returned["test/accuracy_step_2"] == pytest.approx(float(shares.mean()))
    assert returned["test/accuracy_step_2_ci95"] == pytest.approx(1.96 * float(shares.std()) / 10**0.5)
    assert float(found["val/accuracy"]) == pytest.approx(np.mean(right(learner, tasks, "val", 1)))
    assert found["val/accuracy"] == found["val/accuracy_step_1"]
    assert [step for step, _ in scalars(root)["val/accuracy"]] == [2, 4, 6, 8]


def test_the_progress_bar_shows_the_accuracy(tmp_path):
    shown = {}

    class Bar(ReportWriter):
        def on_train_end(self, trainer, pl_module):
            shown.update(trainer.progress_bar_metrics)

    bare(tmp_path, 2, callbacks=[Bar()]).fit(namer(), data())
    assert {"val/loss", "val/accuracy"} <= shown.keys()


def test_baselines_are_judged_by_accuracy_alone(tested):
    learner, tasks, root, *_ = tested
    table = pd.read_csv(root / "run/version_0/test.csv").set_index("predictor")
    drawn = tasks.loaded("test", torch.arange(10))
    shares = []
    for task in range(10):
        means = [drawn.support.x[task][drawn.support.y[task] == label].mean(0) for label in range(3)]
        nearest = [int(np.argmin([(row - mean).norm() for mean in means])) for row in drawn.query.x[task]]
        shares.append(np.mean([label == int(true) for label, true in zip(nearest, drawn.query.y[task], strict=True)]))
    assert table["accuracy"]["nearest class mean"] == pytest.approx(np.mean(shares))
    assert np.isnan(table["loss"]["nearest class mean"])
    own = np.array(right(learner, tasks, "test", 3))
    lines = learner.report("test").after
    difference = np.array(shares) - own
    assert lines[0].startswith("nearest class mean: accuracy less the learner's after 3 inner steps, task by task: ")
    assert lines[0].endswith(f"{difference.mean():.3f} ± {1.96 * difference.std(ddof=1) / 10**0.5:.3f}")


def test_the_table_says_of_what_size_the_tasks_are(tested):
    (line,) = tested[0].report("test").before
    assert line.startswith("10 test tasks, 3-way 2-shot, judged on 4 queries of each class;")


def test_the_best_checkpoint_has_the_highest_accuracy(tested):
    *_, root, _, _, best = tested
    values = [value for _, value in scalars(root)["val/accuracy"]]
    assert (best.monitor, best.mode) == ("val/accuracy", "max")
    assert float(best.best_model_score) == pytest.approx(max(values))
    kept = torch.load(best.best_model_path, weights_only=True)["global_step"]
    assert kept == [2, 4, 6, 8][values.index(max(values))], "of equal ones, the first stays"


def test_that_of_curves_has_the_lowest_loss(tmp_path):
    best = BestCheckpoint()
    learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.1), Unrolled(1), eval_steps=1)
    trainer(tmp_path, 2, callbacks=[best]).fit(learner, TaskDataModule(Sine(), *[Episodes(2, 2, 2)] * 3))
    assert (best.monitor, best.mode) == ("val/loss", "min")


@pytest.mark.parametrize("given", [{"monitor": "val/loss"}, {"mode": "min"}])
def test_a_metric_that_is_named_is_taken(given, tmp_path):
    best = BestCheckpoint(**given)
    trainer(tmp_path, 2, callbacks=[best]).fit(namer(), data())
    assert (best.monitor, best.mode) == ("val/loss", "min")


def test_a_resumed_run_remembers_the_best_accuracy(tested, tmp_path):
    whole = tested[-1]
    for until in (4, 8):
        best = BestCheckpoint()
        run = trainer(tmp_path, until, val_check_interval=2, callbacks=[best, LastCheckpoint(), ReportWriter()])
        run.fit(namer(), data(), ckpt_path=last(tmp_path) if until == 8 else None)
    assert best.best_model_score == whole.best_model_score
    names = ("state_dict", "global_step", "best_steps")
    one, other = (torch.load(path, weights_only=True) for path in (best.best_model_path, whole.best_model_path))
    assert all(str(one[name]) == str(other[name]) for name in names)


def test_the_number_of_steps_is_that_of_the_highest_accuracy(tmp_path):
    learner = namer(lr=3.0, eval_steps=4)
    run = bare(tmp_path, 2)
    run.fit(learner, data())
    means = [float(run.callback_metrics[f"val/accuracy_step_{k}"]) for k in range(5)]
    losses = [float(run.callback_metrics[f"val/loss_step_{k}"]) for k in range(5)]
    assert learner.prediction_steps == min(range(5), key=lambda k: (-means[k], losses[k]))
    assert means[learner.prediction_steps] == max(means)


def confusion(counts, steps):
    true, taken = np.nonzero(counts)
    return Confusion([*"abcdef"], true, taken, np.asarray(counts, dtype=int)[true, taken], steps)


class TestConfusions:
    def test_are_counted_in_a_test(self, tested):
        learner, tasks, root, *_ = tested
        drawn = tasks.loaded("test", torch.arange(10))
        answers = learner.query_predictions(drawn)[:, learner.prediction_steps].argmax(-1)
        expected = np.zeros((6, 6), dtype=int)
        for classes, true, own in zip(drawn.classes, drawn.query.y, answers, strict=True):
            for label, answer in zip(true, own, strict=True):
                expected[classes[label], classes[answer]] += 1
        table = pd.read_csv(root / "run/version_0/test_confusion.csv", index_col="true class")
        assert list(table.index) == list(table.columns) == NAMES
        np.testing.assert_array_equal(table.to_numpy(), expected)
        lines = learner.report("test").after
        assert any(line.startswith("most often taken for another class") for line in lines)

    def test_that_are_most_frequent_are_told_with_their_share(self):
        assert confusion([[6, 3, 1], [0, 10, 0], [5, 0, 5]], 2).lines() == [
            "most often taken for another class after 2 inner steps:",
            "  c taken for a: 5 of 10 (50 %)",
            "  a taken for b: 3 of 10 (30 %)",
            "  a taken for c: 1 of 10 (10 %)",
        ]
        assert confusion(np.eye(2), 1).lines() == ["no class was taken for another after 1 inner step"]

    def test_leave_out_classes_that_were_not_asked(self):
        counts = np.zeros((4, 4), dtype=int)
        counts[1, 3] = 2
        frame = confusion(counts, 0).frame()
        assert frame.to_dict("list") == {"true class": ["b"], "b": [0], "d": [2]}

    def test_of_many_thousand_classes_take_no_memory(self):
        names = [str(number) for number in range(100_000)]
        classes = torch.tensor([[99_999, 7, 500]])
        points = Points(torch.zeros(1, 4, 1), torch.tensor([[0, 1, 2, -100]]))
        counts = Confusions(names, 1, torch.device("cpu"))
        counts.add(
            None,
            torch.eye(4)[None, None, [1, 1, 2, 2], :3].expand(1, 2, 4, 3),
            Task(points, points, torch.zeros(1), classes),
        )
        assert counts.finish().frame().to_dict("list") == {
            "true class": ["7", "500", "99999"],
            **{"7": [1, 0, 1], "500": [0, 1, 0], "99999": [0, 0, 0]},
        }

    def test_of_what_is_not_known_to_answer_are_none(self):
        tasks = Kinds().of_size("test", torch.arange(2), torch.zeros(2, dtype=torch.long), Episodes(2, 1, 1, 2))
        counts = Confusions(NAMES, 0, torch.device("cpu"))
        counts.add(nn.PoissonNLLLoss(), torch.zeros(2, 1, 2, 1), tasks)
        assert counts.finish() is None

    def test_a_head_with_more_outputs_than_classes_answers_by_those_in_use(self, tmp_path):
        learner, tasks = namer(outputs=7), data()
        with torch.no_grad():
            learner.problem.network[1].out.bias[5] += 100.0
        (found,) = bare(tmp_path, logger=False).test(learner, tasks, verbose=False)
        drawn = tasks.loaded("test", torch.arange(10))
        answers = learner.query_predictions(drawn)[:, 0, :, :3].argmax(-1)
        expected = float((answers == drawn.query.y).double().mean())
        assert found["test/accuracy_step_0"] == pytest.approx(expected)
        assert found["test/accuracy_step_0"] > 0
