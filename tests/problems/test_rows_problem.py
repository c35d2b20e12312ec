"""The scores of a problem of the user's own on the rows of a table: never of what is no answer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metalit.problem import Points, Splits
from metalit.problems.rows import RowsProblem


class Mine(RowsProblem):
    """A linear model of ``outputs`` columns, none for ``[rows]``."""

    def __init__(self, outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.outputs = outputs

    def init(self, outer, task):
        return {"w": torch.linspace(-1, 1, 3 * max(1, self.outputs)).reshape(3, -1)}

    def predict(self, inner, x):
        scores = x @ inner["w"]
        return scores if self.outputs else scores[:, 0]

    def row_losses(self, prediction, y):
        return prediction.flatten(1).sum(1) if prediction.dim() > 1 else prediction


class Signs(Mine):
    def answers(self, prediction):
        return (prediction[:, 0] > 0).long()


def scored(problem, y):
    torch.manual_seed(0)
    points = Points(torch.randn(6, 3), y)
    task = Splits(points, points, points, torch.zeros(3, dtype=torch.bool), torch.zeros(6), torch.tensor(0))
    found = problem.scores(problem.init({}, task), problem.outer(), task, "val")
    found.pop("loss")
    return found, problem.predict(problem.init({}, task), points.x)


CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])


@pytest.mark.parametrize("outputs", [0, 1])
def test_one_column_says_no_class_unless_the_problem_says_how(outputs):
    assert scored(Mine(outputs), CLASSES)[0] == {}
    if outputs:
        found, prediction = scored(Signs(1), CLASSES)
        assert found["accuracy"] == ((prediction[:, 0] > 0) == CLASSES).float().mean()


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_classes_in_a_column_are_not_broadcast(shape):
    found, prediction = scored(Mine(2), CLASSES.reshape(shape))
    assert found["accuracy"] == (prediction.argmax(1) == CLASSES).float().mean()


def test_several_labels_have_no_accuracy_and_other_numbers_no_r2():
    assert scored(Mine(2), torch.ones(6, 2, dtype=torch.int64))[0] == {}
    assert scored(Mine(2), torch.randn(6, 1))[0] == {}


def test_r2_is_about_the_mean_of_each_column():
    y = torch.randn(6, 2) + torch.tensor([0.0, 100.0])
    found, prediction = scored(Mine(2), y)
    assert torch.equal(found["r2"], 1 - (prediction - y).square().sum() / (y - y.mean(0)).square().sum())
    assert F.mse_loss(prediction, y) > 100
