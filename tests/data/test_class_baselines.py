"""What pixels say of classes without meta-learning, beside plain loops and scikit-learn on all pixels."""

import numpy as np
import pytest
import torch
from class_sources import episodes
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from metalit.data import ClassTasks, Episodes, SklearnTable
from metalit.keys import normal
from metalit.problem import Points, Task

NAMES = ("nearest neighbour", "nearest class mean", "logistic regression")


@pytest.fixture(scope="module")
def tasks():
    tasks = ClassTasks(SklearnTable("digits"), val=0, test=0)
    drawn = episodes(tasks, "train", range(3), Episodes(ways=4, shots=3, queries=6))
    return tasks, tasks.load(drawn, torch.device("cpu"))


def test_baselines_are_those_of_a_plain_loop(tasks):
    distribution, loaded = tasks
    found = distribution.baselines(loaded)
    assert tuple(found) == NAMES
    assert {scores.shape for scores in found.values()} == {(3, 24, 4)}
    for task in range(3):
        x, y = loaded.support.x[task].flatten(1).numpy(), loaded.support.y[task].numpy()
        means = np.stack([x[y == label].mean(0) for label in range(4)])
        asked = loaded.query.x[task].flatten(1).numpy()
        near = [y[np.square(x - one).sum(1).argmin()] for one in asked]
        mean = [np.square(means - one).sum(1).argmin() for one in asked]
        assert found[NAMES[0]][task].argmax(-1).tolist() == near
        assert found[NAMES[1]][task].argmax(-1).tolist() == mean
        fitted = LogisticRegression(max_iter=1000, tol=1e-10).fit(x, y).predict_proba(asked)
        assert_close(found[NAMES[2]][task], torch.tensor(fitted), rtol=0, atol=1e-3)
    for scores in found.values():
        assert_close(scores.sum(-1), torch.ones(3, 24, dtype=torch.float64))


@pytest.mark.parametrize(("ways", "shots"), [(1, 2), (2, 1), (3, 30)])
def test_baselines_know_classes_that_lie_apart(ways, shots):
    # of 20 numbers: fewer, and more, than examples
    centres = 100 * normal(torch.arange(2 * ways).reshape(2, ways), 20)

    def points(rows, key):
        labels = torch.arange(ways).repeat_interleave(rows).expand(2, -1)
        noise = normal(torch.tensor([key, key + 1]), ways * rows, 20)
        return Points(centres.gather(1, labels.unsqueeze(-1).expand(-1, -1, 20)) + noise, labels)

    task = Task(points(shots, 50), points(4, 60), torch.arange(2), torch.arange(ways).expand(2, -1))
    for scores in ClassTasks(SklearnTable("digits")).baselines(task).values():
        assert torch.equal(scores.argmax(-1), task.query.y)
        assert scores.dtype == torch.float64
