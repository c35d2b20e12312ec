"""What the tests of the bilevel learner share: problems of the tests' own, learners and data."""

from typing import NamedTuple

import torch
from cases import draw
from fits import regression
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.utils.data import DataLoader

from metalit.data import (
    SplitsDataModule,
)
from metalit.data.base import task_keys
from metalit.hypergradients import Implicit, Unrolled
from metalit.inner import SGD, Newton
from metalit.keys import normal
from metalit.linsolve import CG, Dense
from metalit.modules import BilevelLearner
from metalit.networks import MLP
from metalit.problem import Problem
from metalit.problems import Cleaning, Ridge
from metalit.tree import dot, tree_map

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

SCHEDULERS = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, threshold=0.9),
}


def sgd(lr=0.1, **options):
    return lambda groups: torch.optim.SGD(groups, lr=lr, **options)


class Offset(Problem):
    """A user's own problem: the inner variable follows a target of its task's, half-way from where φ lets it start."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, size))
        self.log_weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("target", torch.linspace(1, 2, size))

    def init(self, outer, task):
        start = outer["start"] + 0.1 * normal(task, 3).to(outer["start"])
        return {"deep": {"w": start}, "b": 0.0 * outer["log_weight"]}

    def inner_loss(self, inner, outer, task, step):
        error = inner["deep"]["w"] + inner["b"] - self.target
        return 0.5 * dot(error, error) + 0.5 * outer["log_weight"].exp() * dot(inner, inner)

    def outer_loss(self, inner, outer, task):
        error = inner["deep"]["w"] - 0.9 * self.target
        return 0.5 * dot(error, error) + 0.01 * outer["log_weight"].square()


def offset(inner=None, hypergradient=None, **options):
    return BilevelLearner(Offset(), inner or SGD(0.2), hypergradient or Unrolled(3), **options)


def ridge(inner=None, hypergradient=None, features=3, log_penalty=-1.0, batch="all", outer_batch="all", **options):
    problem = Ridge(features, log_penalty, batch=batch, outer_batch=outer_batch)
    return BilevelLearner(problem, inner or Newton(), hypergradient or Implicit(1, Dense()), **options)


def table(**options):
    return SplitsDataModule(regression(), **options)


def cleaning(examples=60, classes=3, batch="all", outer_batch="all", steps=5, **options):
    torch.manual_seed(0)
    problem = Cleaning(MLP([4, classes]), examples, batch=batch, outer_batch=outer_batch)
    return BilevelLearner(problem, SGD(0.5), Implicit(steps, CG(5)), **options)


def keys(step, count=1, seed=0, split="train"):
    return task_keys(seed, split, torch.arange(step * count, (step + 1) * count))


def constants(module):
    return {level: tree_map(lambda value: value.detach().clone(), branch) for level, branch in module.outer().items()}


class Mean(Problem):
    """About as small as a problem gets: its data is its own, and φ shrinks the mean of the training half."""

    def __init__(self):
        super().__init__()
        self.shrink = nn.Parameter(torch.zeros(()))
        self.register_buffer("y", 1.0 + draw(40, seed=1).float())

    def init(self, outer, task):
        return torch.zeros(())

    def inner_loss(self, inner, outer, task, step):
        return (self.y[:20] - inner).square().mean() + outer["shrink"].exp() * inner.square()

    def outer_loss(self, inner, outer, task):
        return (self.y[20:] - inner).square().mean()


class Drawn(NamedTuple):
    c: Tensor
    label: str


class Own(LightningDataModule):
    """Batches of two tasks that hold something else than tensors too."""

    def __init__(self, tasks=2):
        super().__init__()
        self.tasks = tasks

    def train_dataloader(self):
        return DataLoader([Drawn(draw(2, 3, seed=step).float(), "train") for step in range(8)], batch_size=None)

    def val_dataloader(self):
        batches = [Drawn(draw(self.tasks, 3, seed=20 + number).float(), "val") for number in range(2)]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader


class Centre(Problem):
    """½‖θ − c − φ‖² inside, ½‖θ‖² outside."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3))

    def init(self, outer, task):
        return 0.0 * task.c

    def inner_loss(self, inner, outer, task, step):
        return 0.5 * (inner - task.c - outer["shift"]).square().sum()

    def outer_loss(self, inner, outer, task):
        return 0.5 * inner.square().sum()

    def watch(self, start, inner, outer, gradient, task):
        return {"positive": inner > 0, "size": inner}

    def scores(self, inner, outer, task, split):
        return {"loss": self.outer_loss(inner, outer, task), "is_val": torch.tensor(task.label == "val")}


class Curved(Problem):
    """½ h θ² − θ inside, with the curvature ``h``."""

    def __init__(self, curvature):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2))
        self.register_buffer("h", torch.tensor(curvature))

    def init(self, outer, task):
        return torch.zeros_like(outer["phi"])

    def inner_loss(self, inner, outer, task, step):
        return (0.5 * self.h * inner.square() - outer["phi"] * inner).sum()

    def outer_loss(self, inner, outer, task):
        return (inner - 0.5).square().sum()


class Renamed(Problem):
    """With the names of the seed's variables instead of ours."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2))

    def init(self, phi, draw):
        return torch.zeros(2)

    def inner_loss(self, theta, phi, draw, number):
        return (theta - phi["phi"]).square().sum()

    def outer_loss(self, theta, phi, draw):
        return (theta - 3).square().sum()
