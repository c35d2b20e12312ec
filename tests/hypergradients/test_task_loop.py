"""Tasks of images in a compiled program come in a loop: the numbers are those of all tasks at once."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap

from metalit.compiling.compiled import Compiled
from metalit.hypergradients import Unrolled, over_tasks
from metalit.hypergradients.weights import Annealed
from metalit.inner import SGD
from metalit.problem import Points, Task
from metalit.problems import FewShot
from metalit.tree import flatten, tree_map


class Shifted(nn.Module):
    """A network that holds a buffer and a frozen parameter, which a program must read anew, and drops by the key."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False),  # by windows
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.3),
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        self.register_buffer("scale", torch.tensor(1.0))
        self.shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def forward(self, x):
        return self.layers(x * self.scale + self.shift)


def test_a_program_with_convolutions_finds_what_all_tasks_at_once_find():
    torch.manual_seed(0)
    network = Shifted().double()
    problem, label = FewShot(network), torch.arange(3).repeat(2).expand(4, -1)
    support, query = (Points(torch.randn(4, 6, 1, 6, 7, dtype=torch.float64), label) for _ in range(2))
    tasks = Task(support, query, torch.arange(4))
    estimator = Unrolled(2, weights=Annealed([0.5, 0.5], [0.0, 1.0], over=10))
    step = partial(over_tasks, estimator, problem, SGD(0.1))
    told = []
    compiled = Compiled(lambda outer, tasks, progress: step(outer, tasks, None, progress), problem, tell=told.append)
    outer = {"problem": {name: value.detach() for name, value in problem.outer().items()}, "optimizer": {}}
    for number in (0, 7):
        expected = step(outer, tasks, None, torch.tensor(number))
        found = compiled(outer, tasks, torch.tensor(number))
        assert not compiled.failed, told
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flatten(found.gradient), flatten(expected.gradient), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.inner, expected.inner, rtol=1e-8, atol=1e-10)
        network.scale.fill_(1.5)
        network.shift.data.fill_(0.5)


class Counted(Shifted):
    """A network that tells how often it is called."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def forward(self, x):
        self.tell()
        return super().forward(x)


@pytest.mark.parametrize(("rows", "evaluations"), [(6, 1), (198, 4)], ids=["small", "large"])
def test_large_images_come_one_task_after_the_other_without_a_program(rows, evaluations):
    torch.manual_seed(0)
    calls = []
    network = Counted(lambda: calls.append(1)).double()
    problem, label = FewShot(network), torch.arange(3).repeat(rows // 3).expand(4, -1)
    support, query = (Points(torch.randn(4, rows, 1, 6, 7, dtype=torch.float64), label) for _ in range(2))
    tasks = Task(support, query, torch.arange(4))
    outer = {"problem": {name: value.detach() for name, value in problem.outer().items()}, "optimizer": {}}
    found = over_tasks(Unrolled(1), problem, SGD(0.1), outer, tasks)
    assert len(calls) == 2 * evaluations  # of the support set and of the query set
    dims = Task(Points(0, 0), Points(0, 0), 0)
    expected = vmap(lambda task: Unrolled(1)(problem, SGD(0.1), outer, task), (dims,))(tasks)
    torch.testing.assert_close(
        flatten(found.gradient), flatten(tree_map(lambda leaf: leaf.mean(0), expected.gradient)), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(found.inner, expected.inner, rtol=1e-10, atol=1e-12)
