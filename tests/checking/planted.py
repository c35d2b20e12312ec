"""A linear few-shot problem of the tests' own, right as it is, and with one fault planted each."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from metalit.hypergradients import FirstOrder, Hypergradient, Unrolled
from metalit.hypergradients.paths import ALL
from metalit.inner import SGD, InnerOptimizer
from metalit.modules import MetaLearner
from metalit.problem import FewShotProblem, Points, Task
from metalit.tree import tree_map


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tasks(count=3, rows=5):
    def points(seed):
        return Points(draw(count, rows, 2, seed=seed), draw(count, rows, 1, seed=seed + 1))

    return Task(points(10), points(20), torch.arange(count))


class Line(FewShotProblem):
    """y = tanh(xᵀw) + b: MAML on both."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(draw(2, 1, seed=1))
        self.b = nn.Parameter(draw(1, seed=2))

    def init(self, outer, task):
        return {"w": outer["w"], "b": outer["b"]}

    def inner_loss(self, inner, outer, task, step):
        return self.judge(self.predict(inner, outer, task.support.x), task.support)

    def outer_loss(self, inner, outer, task):
        return self.judge(self.predict(inner, outer, task.query.x), task.query)

    def predict(self, inner, outer, x):
        return torch.tanh(x @ inner["w"]) + inner["b"]

    def judge(self, prediction, points):
        return (prediction - points.y).square().mean()


class Detached(Line):
    def init(self, outer, task):
        return {"w": outer["w"].detach(), "b": outer["b"]}


class Unused(Line):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))


class InPlace(Line):
    def outer_loss(self, inner, outer, task):
        return self.judge(self.predict(inner, outer, task.query.x.mul_(0.5)), task.query)


class Noisy(Line):
    def predict(self, inner, outer, x):
        return super().predict(inner, outer, nn.functional.dropout(x, 0.5))


class SumOfRows(Line):
    def judge(self, prediction, points):
        return (prediction - points.y).square().sum()


class SupportSum(Line):
    def inner_loss(self, inner, outer, task, step):
        return 0.1 * (self.predict(inner, outer, task.support.x) - task.support.y).square().sum() + inner["b"].sum()


class Leaking(Line):
    def inner_loss(self, inner, outer, task, step):
        return super().inner_loss(inner, outer, task, step) + 0.1 * self.outer_loss(inner, outer, task)


class Remembering(Line):
    """Its BatchNorm normalises the query rows by what it remembers of all rows that it ever saw."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, affine=False)

    def inner_loss(self, inner, outer, task, step):
        self.norm.train()
        x = functional_call(self.norm, {}, (task.support.x,))
        return self.judge(self.predict(inner, outer, x), task.support)

    def outer_loss(self, inner, outer, task):
        self.norm.eval()
        return self.judge(self.predict(inner, outer, self.norm(task.query.x)), task.query)


class Gated(Line):
    """A gate is shut, so that the inner gradient of w is exactly 0."""

    def predict(self, inner, outer, x):
        return 0.0 * torch.tanh(x @ inner["w"]) + inner["b"]


@dataclass(frozen=True)
class OwnAdam(InnerOptimizer):
    """Adam's first step, as it is often written."""

    lr: float = 0.1

    def update(self, grad_fn, inner, state, outer, step):
        return tree_map(
            lambda leaf, slope: leaf - self.lr * slope / (slope.square().sqrt() + 1e-8), inner, grad_fn(inner)
        ), state


@dataclass(frozen=True)
class Cut(InnerOptimizer):
    """Gradient descent that forgets where its gradient comes from."""

    def update(self, grad_fn, inner, state, outer, step):
        return tree_map(lambda leaf, slope: leaf - 0.2 * slope.detach(), inner, grad_fn(inner)), state


@dataclass(frozen=True)
class SecondInName(Hypergradient):
    """It says that it is of second order."""

    carries = ALL
    steps: int = 2

    def __call__(self, *given):
        return FirstOrder(self.steps)(*given)


def learner(problem=None, optimizer=None, hypergradient=None):
    return MetaLearner(problem or Line(), optimizer or SGD(0.2), hypergradient or Unrolled(2))
