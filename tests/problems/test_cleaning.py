import pytest
import torch
from cases import draw, linear, tables, task_at
from torch import nn
from torch.testing import assert_close
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy

from metalit.errors import InputError
from metalit.networks import MLP
from metalit.problem import Points
from metalit.problems import Cleaning

TASK = task_at(tables(2, classes=3), 0)


def cleaning(bias=True, **settings):
    problem = Cleaning(linear(2, 3, bias), 6, **settings).double()
    problem.logit.data = draw(6, seed=7)
    return problem


def test_what_is_made_is_what_was_asked_for():
    network = linear(2, 3)
    network.bias.requires_grad_(False)
    problem = Cleaning(network, 4, logit=1.5)
    assert problem.outer().keys() == {"logit"}
    assert problem.logit.tolist() == [1.5] * 4
    start = problem.init(problem.outer(), TASK)
    # frozen parameters stay as they are
    assert start.keys() == {"weight"}
    assert_close(start["weight"], network.weight, rtol=0, atol=0)
    assert Cleaning(linear(2, 3), 2).logit.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bias", [False, True])
def test_the_losses_are_their_formulas(bias):
    problem = cleaning(bias, decay=0.3)
    at = {name: draw(*value.shape, seed=9) for name, value in problem.init(problem.outer(), TASK).items()}
    losses = {}
    for split in ("train", "val"):
        points = getattr(TASK, split)
        p = (points.x @ at["weight"].T + at.get("bias", 0)).softmax(1)
        losses[split] = -p[torch.arange(len(p)), points.y].log()
    decay = 0.15 * sum(value.square().sum() for value in at.values())
    expected = (torch.sigmoid(problem.logit) * losses["train"]).sum() / 6 + decay
    assert_close(problem.inner_loss(at, problem.outer(), TASK, 0), expected, rtol=1e-13, atol=0)
    assert_close(problem.outer_loss(at, problem.outer(), TASK), losses["val"].mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_scores_are_loss_accuracy_and_the_f1_of_what_was_found(split, seed):
    problem, points = cleaning(outer_batch=2), getattr(TASK, split)
    problem.logit.data = draw(6, seed=seed)
    at = {"weight": draw(3, 2, seed=seed), "bias": draw(3)}
    found = problem.scores(at, problem.outer(), TASK, split)
    prediction = points.x @ at["weight"].T + at["bias"]
    assert_close(found["loss"], nn.functional.cross_entropy(prediction, points.y), rtol=1e-13, atol=0)
    assert_close(found["accuracy"], MulticlassAccuracy(3, average="micro")(prediction, points.y))
    expected = BinaryF1Score()((problem.logit < 0).long(), TASK.corrupted.long())
    assert_close(found["f1"], expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("logit", "f1"),
    [
        ([1, -1, 1, 1, -1, 1], 1.0),
        ([1, 1, 1, 1, 1, 1], 0.0),
        ([-1, -1, -1, -1, -1, -1], 0.5),
        ([1, -1, 1, 1, 0, 1], 2 / 3),
        ([-1, 1, 1, 1, 1, 1], 0.0),
    ],
)
def test_the_f1_of_finding_the_corrupted_examples(logit, f1):
    assert TASK.corrupted.tolist() == [False, True, False, False, True, False]
    problem = cleaning()
    problem.logit.data = torch.tensor(logit, dtype=torch.float64)
    assert_close(problem.scores(problem.init({}, TASK), problem.outer(), TASK, "val")["f1"].item(), f1)


def test_without_corrupted_examples_there_is_nothing_to_find():
    clean, problem = TASK._replace(corrupted=torch.zeros(6, dtype=torch.bool)), cleaning()
    assert problem.scores(problem.init({}, clean), problem.outer(), clean, "test").keys() == {"loss", "accuracy"}
    assert problem.baselines(problem.outer(), clean).keys() == {"all examples alike"}


def test_the_baselines_are_all_examples_and_the_clean_ones():
    problem = cleaning()
    found = problem.baselines(problem.outer(), TASK)
    assert list(found) == ["all examples alike", "the clean examples alone"]
    for name, rows in (("all examples alike", [0, 1, 2, 3, 4, 5]), ("the clean examples alone", [0, 2, 3, 5])):
        own, task = found[name]
        assert own.keys() == {"logit"}
        assert_close(torch.sigmoid(own["logit"]).tolist(), [1.0] * len(rows), rtol=0, atol=1e-16)
        assert torch.equal(task.train.x, TASK.train.x[rows])
        assert torch.equal(task.train.y, TASK.train.y[rows])
        assert task.val is TASK.val
        assert task.test is TASK.test


def test_the_bar_of_the_clean_examples_is_the_mean_over_them():
    problem = cleaning()
    own, task = problem.baselines(problem.outer(), TASK)["the clean examples alone"]
    theta = problem.init({}, TASK)
    rows = problem.row_losses(problem.predict(theta, TASK.train.x), TASK.train.y)[~TASK.corrupted]
    found = problem.inner_loss(theta, own, task, 0)
    assert_close(found, rows.mean() + problem.penalty(theta, own), rtol=1e-12, atol=0)


def test_the_results_are_weights_labels_and_what_was_corrupted():
    problem = cleaning()
    found = problem.results(problem.init({}, TASK), problem.outer(), TASK)
    assert found.keys() == {"examples"}
    assert_close(found["examples"]["weight"], 1 / (1 + (-problem.logit).exp()), rtol=1e-14, atol=0)
    assert torch.equal(found["examples"]["label"], TASK.train.y)
    assert torch.equal(found["examples"]["corrupted"], TASK.corrupted)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Cleaning(linear(2, 3), 0), "Cleaning: examples=0 must be at least 1"),
        (lambda: Cleaning(linear(2, 3), 6, decay=-0.1), "Cleaning: decay=-0.1 must be a finite number"),
        (lambda: Cleaning(linear(2, 3), 6, decay=float("nan")), "Cleaning: decay=nan must be a finite number"),
        (lambda: Cleaning(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 6), "Cleaning: BatchNorm mixes the rows"),
        (lambda: Cleaning(nn.Tanh(), 6), "Cleaning: network has no trainable parameter; unfreeze one"),
        (lambda: Cleaning(linear(2, 3).requires_grad_(False), 6), "Cleaning: network has no trainable parameter"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize(
    ("problem", "task", "told"),
    [
        (
            Cleaning(linear(2, 3), 7),
            TASK,
            "Cleaning: examples=7, but the data has 6 training rows; set examples to 6",
        ),
        (
            cleaning(),
            TASK._replace(train=Points(TASK.train.x, draw(6))),
            "Cleaning: the targets must be classes, ",
        ),
        (Cleaning(linear(3, 3), 6), TASK, "Cleaning: network cannot take rows of 2 columns: mat1 and mat2"),
        (
            Cleaning(linear(2, 2), 6),
            TASK,
            "Cleaning: network returned shape (2, 2) for two rows; it must be [rows, classes] for at least 3 classes",
        ),
        (
            Cleaning(nn.Sequential(linear(2, 3), nn.Flatten(0)), 6),
            TASK,
            "Cleaning: network returned shape (6,) for two rows; it must be [rows, classes] for at least 3 classes",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(problem, task, told):
    assert TASK.train.y.max() == 2
    with pytest.raises(InputError) as raised:
        problem.check(task)
    assert str(raised.value).startswith(told)


def test_deep_networks_and_spare_classes_are_fine():
    Cleaning(MLP([2, 4, 5]).double(), 6).check(TASK)


def test_dropout_is_refused():
    with pytest.raises(InputError, match="Cleaning: dropout"):
        Cleaning(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), 3)


def test_targets_with_a_column_are_no_classes():
    with pytest.raises(InputError, match=r"Cleaning: the targets must be classes, \[rows\]"):
        Cleaning(nn.Linear(2, 2), 3).check_targets(torch.tensor([[0], [1]]))
