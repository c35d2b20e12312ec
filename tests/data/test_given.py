"""Batches of tasks from loaders of the user's, in any form that has an obvious meaning."""

import pytest
import torch
from cases import draw
from fits import bare
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from metalit.data.given import tasks_of, with_classes
from metalit.errors import InputError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.problem import Points, Task
from metalit.problems import FewShot, Prototypes

SUPPORT = [(draw(5, 3, seed=n), draw(5, 1, seed=n + 9)) for n in range(4)]
QUERY = [(draw(7, 3, seed=n + 20), draw(7, 1, seed=n + 30)) for n in range(4)]
KEY = torch.tensor(3)
FORMS = {
    "pairs of pairs": list(zip(SUPPORT, QUERY, strict=True)),
    "torchmeta": [{"train": s, "test": q} for s, q in zip(SUPPORT, QUERY, strict=True)],
    "dictionaries": [{"support": s, "query": q} for s, q in zip(SUPPORT, QUERY, strict=True)],
    "tasks": [Task(Points(*s), Points(*q), n) for n, (s, q) in enumerate(zip(SUPPORT, QUERY, strict=True))],
}


def test_every_form_means_the_same_tasks():
    first, *others = (tasks_of(next(iter(DataLoader(rows, 3))), KEY) for rows in FORMS.values())
    assert first.support.x.shape == (3, 5, 3)
    assert first.support.mask is None
    assert_close(first.query.y, torch.stack([y for _, y in QUERY[:3]]))
    assert len(set(first.key.tolist())) == 3
    for other in others[:-1]:
        assert all(torch.equal(one, two) for one, two in zip(first.query[:2], other.query[:2], strict=True))
        assert torch.equal(first.key, other.key)
    assert others[-1].key.tolist() == [0, 1, 2]  # their own


def test_a_learner_takes_each_of_them_in_training_and_evaluation(tmp_path):
    ends = []
    for rows in FORMS.values():
        torch.manual_seed(0)
        module = MetaLearner(FewShot(nn.Linear(3, 1)), SGD(0.1), Unrolled(1), eval_steps=1)
        bare(tmp_path, 4).fit(module, DataLoader(rows, 2), DataLoader(rows, 4))
        ends.append(module.problem.network.weight.detach())
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_points_of_several_lengths_are_padded_and_masked():
    rows = [Points(draw(n, 2), draw(n, 1), mask) for n, mask in ((3, None), (5, torch.tensor([1, 1, 0, 1, 1]).bool()))]
    found = next(iter(DataLoader(rows, 2)))
    assert found.mask.tolist() == [[True] * 3 + [False] * 2, [True, True, False, True, True]]
    assert_close(found.x[0], torch.cat([rows[0].x, torch.zeros(2, 2)]))
    assert torch.equal(found.y[1], rows[1].y)


X, Y = torch.zeros(4, 5, 3), torch.zeros(4, 5, 1)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ([X, Y], r"a batch is a list of 2\. MetaLearner takes batches of tasks"),
        (X, r"a batch is a Tensor\. MetaLearner takes"),
        ([[X, Y]] * 3, r"a batch is a list of 3\. MetaLearner"),
        ({"x": X, "y": Y}, r"a batch has the keys \['x', 'y'\]\. MetaLearner"),
        ([[X, Y], X], "the query set of a batch is a Tensor"),
        ([["a", "b"], ["c", "d"]], "x of the support set is str, and must be a tensor"),
        ([[X.numpy(), Y], [X, Y]], "x of the support set is ndarray, and must be a tensor"),
        ([[X, Y], [X, Y[:, :4]]], r"x of the query set is \(4, 5, 3\) and y \(4, 4, 1\): they must begin with"),
        ([[X, Y], [X[:2], Y[:2]]], r"support and query are of different numbers of tasks, \[2, 4\]"),
        (Task([X, Y], [X, torch.zeros(4)], KEY), r"y of the query set is \(4,\), and must be"),
    ],
)
def test_what_is_no_batch_of_tasks_is_told(batch, told, tmp_path):
    with pytest.raises(InputError, match=told):
        tasks_of(batch, KEY)
    module = MetaLearner(FewShot(nn.Linear(3, 1)), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=told):
        bare(tmp_path).fit(module, DataLoader([0], 1, collate_fn=lambda _: batch))


def of_classes(*labels):
    """A batch of tasks with these labels in support and query."""
    y = torch.tensor(labels)
    points = Points(torch.zeros(*y.shape, 2), y)
    return Task(points, points, torch.arange(len(y)))


def test_how_many_classes_there_are_is_read_from_the_targets_where_it_is_not_said():
    assert with_classes(of_classes([1, 0, 2], [2, 1, 0])).classes.tolist() == [[0, 1, 2], [0, 1, 2]]
    said = of_classes([0, 0])._replace(classes=torch.tensor([[3, 4]]))
    assert with_classes(said) is said
    assert torch.equal(tasks_of(said, KEY).classes, said.classes)
    real = tasks_of(next(iter(DataLoader(FORMS["tasks"], 3))), KEY)
    assert with_classes(real) is real
    padded = of_classes([0, 1, 0])
    padded = padded._replace(support=padded.support._replace(mask=torch.tensor([[True, False, True]])))
    for tasks, task, number in ((padded, 0, 1), (of_classes([0, 1], [0, 2]), 0, 2)):
        with pytest.raises(InputError, match=f"support set of task {task} of a batch has no row of class {number}, "):
            with_classes(tasks)


def test_a_learner_of_prototypes_takes_classes_of_a_users_own_loader(tmp_path):
    rows = [
        ((draw(4, 3, seed=n), torch.tensor([0, 1, 1, 0])), (draw(4, 3, seed=n), torch.arange(4) % 2)) for n in range(4)
    ]
    module = MetaLearner(Prototypes(nn.Linear(3, 2)))
    before = module.problem.network.weight.detach().clone()
    bare(tmp_path, 4).fit(module, DataLoader(rows, 2), DataLoader(rows, 4))
    assert not torch.equal(module.problem.network.weight, before)
