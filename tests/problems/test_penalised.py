import math

import pytest
import torch
from cases import draw, tables, task_at
from torch.testing import assert_close
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.regression import R2Score

from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.inner import Newton
from metalit.problem import Points
from metalit.problems import Logistic, Ridge

REAL, CLASSES = task_at(tables(3), 0), task_at(tables(3, classes=2), 0)


def inner(bias=True):
    return {"weight": draw(3, seed=1), **({"bias": draw(seed=2)} if bias else {})}


def ridge(**settings):
    return Ridge(3, **settings).double()


@pytest.mark.parametrize("kind", [Ridge, Logistic])
def test_what_is_made_is_what_was_asked_for(kind):
    problem = kind(4, log_penalty=-1.5)
    assert problem.outer().keys() == {"log_penalty"}
    assert problem.log_penalty.tolist() == [-1.5] * 4
    start = problem.init(problem.outer(), None)
    assert {name: value.tolist() for name, value in start.items()} == {"weight": [0.0] * 4, "bias": 0.0}
    assert kind(4, intercept=False).init(problem.outer(), None).keys() == {"weight"}
    assert kind(2).log_penalty.tolist() == [0.0, 0.0]


def test_the_losses_are_their_formulas():
    problem, at = ridge(), inner()
    problem.log_penalty.data = draw(3, seed=3)
    error = REAL.train.x @ at["weight"] + at["bias"] - REAL.train.y[:, 0]
    penalty = 0.5 * (problem.log_penalty.exp() * at["weight"] ** 2).sum()
    assert_close(problem.inner_loss(at, problem.outer(), REAL, 0), 0.5 * error.square().mean() + penalty)
    error = REAL.val.x @ at["weight"] + at["bias"] - REAL.val.y[:, 0]
    assert_close(problem.outer_loss(at, problem.outer(), REAL), 0.5 * error.square().mean(), rtol=1e-14, atol=0)
    logistic = Logistic(3).double()
    p = torch.sigmoid(CLASSES.val.x @ at["weight"] + at["bias"])
    loss = -torch.where(CLASSES.val.y == 1, p, 1 - p).log().mean()
    assert_close(logistic.outer_loss(at, logistic.outer(), CLASSES), loss, rtol=1e-13, atol=0)


def test_certain_predictions_have_finite_logistic_losses():
    z = torch.tensor([1e3, 1e3, -1e3, -1e3])
    assert Logistic(1).row_losses(z, torch.tensor([1, 0, 1, 0])).tolist() == [0, 1e3, 1e3, 0]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_scores_of_ridge_are_its_loss_and_r2(split, bias):
    problem, at, points = ridge(intercept=bias, outer_batch=2), inner(bias), getattr(REAL, split)
    found = problem.scores(at, problem.outer(), REAL, split)
    prediction = points.x @ at["weight"] + at.get("bias", 0)
    assert_close(found["loss"], 0.5 * (prediction - points.y[:, 0]).square().mean(), rtol=1e-14, atol=0)
    assert_close(found["r2"], R2Score()(prediction, points.y[:, 0]), rtol=1e-12, atol=0)


def test_targets_in_a_row_are_those_in_a_column():
    flat = REAL._replace(val=Points(REAL.val.x, REAL.val.y[:, 0]))
    found, expected = (ridge().scores(inner(), ridge().outer(), task, "val") for task in (flat, REAL))
    assert found == expected


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_scores_of_logistic_regression_are_its_loss_and_accuracy(split):
    problem, at, points = Logistic(3).double(), inner(), getattr(CLASSES, split)
    found = problem.scores(at, problem.outer(), CLASSES, split)
    p = torch.sigmoid(points.x @ at["weight"] + at["bias"])
    assert_close(found["accuracy"], BinaryAccuracy()(p, points.y))
    assert_close(found["loss"], -torch.where(points.y == 1, p, 1 - p).log().mean(), rtol=1e-13, atol=0)
    assert 0 < found["accuracy"] < 1


def test_the_mean_log_penalties_of_noise_and_of_the_rest_are_told_apart():
    problem = ridge()
    problem.log_penalty.data = torch.tensor([1.0, -7.0, 4.0], dtype=torch.float64)
    found = problem.scores(inner(), problem.outer(), REAL, "test")
    assert REAL.noise.tolist() == [False, True, False]
    assert (found["log_penalty_noise"], found["log_penalty_real"]) == (-7, 2.5)
    none = REAL._replace(noise=torch.zeros(3, dtype=torch.bool))
    assert problem.scores(inner(), problem.outer(), none, "test").keys() == {"loss", "r2"}


def test_the_baselines_are_one_penalty_for_all():
    found = ridge().baselines(ridge().outer(), REAL)
    assert list(found) == ["0.00248 for all", "0.0183 for all", "0.135 for all", "1 for all"]
    for (name, (own, task)), value in zip(found.items(), (-6, -4, -2, 0), strict=True):
        assert task is REAL
        assert own["log_penalty"].tolist() == [value] * 3
        assert own["log_penalty"].dtype == torch.float64
        assert math.isclose(float(name.split()[0]), math.exp(value), rel_tol=5e-3)


def test_the_results_are_penalties_and_weights():
    problem = ridge(log_penalty=0.5)
    outer = outer_variable(problem, Newton(), REAL)
    solved = adapt(problem, Newton(), outer, REAL, 1)
    found = problem.results(solved, problem.outer(), REAL)
    assert found.keys() == {"features"}
    assert found["features"].keys() == {"log_penalty", "weight"}
    assert_close(found["features"]["weight"], solved["weight"], rtol=0, atol=0)
    assert found["features"]["log_penalty"].tolist() == [0.5] * 3


@pytest.mark.parametrize("kind", [Ridge, Logistic])
@pytest.mark.parametrize("features", [0, -2])
def test_no_feature_is_refused(kind, features):
    with pytest.raises(InputError) as raised:
        kind(features)
    assert str(raised.value) == f"{kind.__name__}: features={features} must be at least 1"


@pytest.mark.parametrize(("problem", "task"), [(Ridge(2), REAL), (Logistic(5), CLASSES)])
def test_another_number_of_columns_is_refused_with_the_right_one(problem, task):
    with pytest.raises(InputError) as raised:
        problem.check(task)
    name, given = type(problem).__name__, problem.features
    assert str(raised.value) == f"{name}: features={given}, but the data has 3 input columns; set features to 3"


@pytest.mark.parametrize("y", [torch.zeros(6, dtype=torch.long), torch.zeros(6, 2)])
def test_ridge_refuses_classes_and_several_columns(y):
    with pytest.raises(InputError, match=r"^Ridge: the targets must be one column of real numbers; for two classes"):
        Ridge(3).check(REAL._replace(train=Points(REAL.train.x, y)))


@pytest.mark.parametrize("y", [torch.zeros(6), torch.tensor([0, 1, 2, 0, 1, 0])])
def test_logistic_regression_refuses_real_numbers_and_three_classes(y):
    with pytest.raises(
        InputError, match=r"^Logistic: the targets must be the classes 0 and 1, .*; for real numbers there is"
    ):
        Logistic(3).check(CLASSES._replace(train=Points(CLASSES.train.x, y)))


@pytest.mark.parametrize("y", [torch.tensor([-1, 1, 1]), torch.tensor([[0], [1], [1]]), torch.tensor([0, 2, 1])])
def test_logistic_takes_the_classes_0_and_1_alone(y):
    with pytest.raises(InputError, match=r"Logistic: the targets must be the classes 0 and 1"):
        Logistic(2).check_targets(y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_penalty_is_finite(value):
    with pytest.raises(InputError, match="log_penalty="):
        Ridge(2, log_penalty=value)


def test_a_constant_target_is_refused():
    with pytest.raises(InputError, match=r"Ridge: the targets of a split are all 3: nothing can be fitted"):
        Ridge(2).check_targets(torch.full((4, 1), 3.0))
