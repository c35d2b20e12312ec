"""Recomputed inner steps: the gradient is the unrolled one, and memory does not grow with the steps."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, task_at
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metalit.adapt import outer_variable
from metalit.hypergradients import Recomputed, Unrolled, over_tasks
from metalit.inner import SGD, InnerOptimizer
from metalit.problem import Points, Task
from metalit.problems import FewShot
from metalit.tree import axpy, norm, tree_map

# ---- an inner optimiser that carries a state


@dataclass(frozen=True)
class Momentum(InnerOptimizer):
    """Heavy ball; a learned momentum, or a fixed one."""

    lr: float = 0.1
    learned: bool = False

    def outer(self, inner, steps):
        return {"momentum": torch.full((), 0.8, dtype=torch.float64)} if self.learned else {}

    def init(self, inner):
        return tree_map(torch.zeros_like, inner)

    def update(self, grad_fn, inner, state, outer, step):
        state = axpy(outer["momentum"] if self.learned else 0.8, state, grad_fn(inner))
        return axpy(-self.lr, state, inner), state


class BareBowl(Bowl):
    """The inner variable is a tensor, and no dictionary of tensors."""

    def init(self, outer, task):
        return outer["theta"]

    def inner_loss(self, inner, outer, task, step):
        return super().inner_loss({"theta": inner}, outer, task, step)

    def outer_loss(self, inner, outer, task):
        return super().outer_loss({"theta": inner} if isinstance(inner, Tensor) else inner, outer, task)


def check_same(problem, optimizer, tasks, start=None, steps=4, weights=None):
    outer = tree_map(Tensor.detach, outer_variable(problem, optimizer, task_at(tasks, 0)))
    found, right = (
        over_tasks(kind(steps, weights), problem, optimizer, outer, tasks, start) for kind in (Recomputed, Unrolled)
    )
    for part in ("loss", "gradient", "inner"):
        assert_close(getattr(found, part), getattr(right, part), rtol=1e-12, atol=1e-12)
    assert norm(right.gradient) > 1e-3
    return right


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.4]], ids=["last step", "each step"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", ["MAML", "Cleaning, minibatches"])
def test_the_state_of_the_inner_optimiser_is_pulled_back_too(name, learned, weights):
    problem, tasks = PROBLEMS[name].problem, PROBLEMS[name].tasks
    right = check_same(problem, Momentum(learned=learned), tasks, weights=weights)
    assert not learned or right.gradient["optimizer"]["momentum"].abs() > 1e-4


def test_a_warm_start_is_a_constant_with_a_state_too():
    problem, tasks = Bowl(draw(4, seed=4), 0.7), bowls(4)
    check_same(problem, Momentum(), tasks, {"theta": draw(3, 4, seed=5)})


def test_the_inner_variable_may_be_a_tensor():
    check_same(BareBowl(draw(4, seed=4), 0.7), SGD(0.1), bowls(4))


@pytest.mark.parametrize("size", [1, 4])
def test_the_state_of_the_inner_optimiser_may_be_a_tensor(size):
    check_same(BareBowl(draw(size, seed=4), 0.7), Momentum(), bowls(size))


# ---- memory


class Peak(TorchDispatchMode):
    """Follows the storages that operations make, below every transform: bytes that live now, and at most."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.follow(leaf.untyped_storage())
        return found

    def follow(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.free, place, size)

    def free(self, place, size):
        self.known.remove(place)
        self.live -= size


def test_the_measure_counts_what_lives_and_views_once():
    with Peak() as peak:
        x = torch.zeros(1000, dtype=torch.float64)
        assert peak.live == 8000
        y = (x + 1).view(10, 100)[2:]
        assert peak.live == 16000
        del y
        assert peak.live == 8000
        x.add_(1)
    assert (peak.live, peak.most) == (8000, 16000)


def conv4(channels, size):
    torch.manual_seed(0)
    layers, inputs = [], 1
    for _ in range(4):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU(), nn.MaxPool2d(2)]
        size, inputs = size // 2, channels
        if size == 1:
            break
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, 5))


def images(size, count):
    def points(seed):
        return Points(draw(count, 5, 1, size, size, seed=seed).float(), torch.arange(5).expand(count, -1))

    return Task(points(1), points(2), torch.arange(count))


def peak_of(hypergradient, channels, size, count):
    problem, tasks = FewShot(conv4(channels, size)), images(size, count)
    outer = tree_map(Tensor.detach, outer_variable(problem, SGD(0.01)))
    gc.collect()
    gc.disable()
    try:
        with Peak() as peak:
            estimate = over_tasks(hypergradient, problem, SGD(0.01), outer, tasks)
    finally:
        gc.enable()
    assert bool(torch.isfinite(estimate.loss))
    return peak.most


@pytest.mark.parametrize(
    ("channels", "size", "count"), [(8, 12, 2), pytest.param(32, 28, 3, marks=pytest.mark.long)], ids=["small", "Conv4"]
)
def test_fifty_recomputed_steps_take_at_most_twice_the_memory_of_five_unrolled(channels, size, count):
    five, ten = (peak_of(Unrolled(steps), channels, size, count) for steps in (5, 10))
    assert ten > 1.6 * five
    assert peak_of(Recomputed(50), channels, size, count) <= 2 * five
