"""What the tests of a GPU share: a learner of each kind, fits of it on either device, and how far two of them are."""

from functools import partial
from typing import NamedTuple

import torch
from fits import bare, blobs, regression

from metalit.autodiff import SAM, WeightNoise
from metalit.data import BatchDataModule, Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.hypergradients import Implicit, Unrolled
from metalit.inner import SGD, Newton
from metalit.linsolve import CG, Dense
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, FewShot, Logistic, Ridge
from metalit.tree import flatten

STEP = partial(torch.optim.SGD, lr=0.1)  # what rounding changes stays small, as it does not with Adam


class Case(NamedTuple):
    """How a learner and its data are made."""

    learner: object
    data: object
    compiles: bool = True


def network(*sizes, dropout=0.0):
    torch.manual_seed(0)
    return MLP(sizes, activation="Tanh", dropout=dropout)


def maml(dropout=0.0, **options):
    problem = FewShot(network(1, 16, 16, 1, dropout=dropout))
    return MetaLearner(problem, SGD(0.05), Unrolled(2), **{"optimizer": STEP, **options})


def sine():
    return TaskDataModule(Sine(), *[Episodes(8, 5, 7)] * 3)


def bilevel(problem, inner, hypergradient, **options):
    return BilevelLearner(problem, inner, hypergradient, **{"optimizer": STEP, **options})


def ridge(**options):
    return bilevel(Ridge(3, -1.0), Newton(), Implicit(1, Dense()), **options)


def logistic(**options):
    return bilevel(Logistic(4, -2.0), SGD(0.2), Implicit(5, CG(5)), **{"warm_start": True, **options})


def cleaning(**options):
    problem = Cleaning(network(4, 8, 2), 30, decay=0.01, batch=12, outer_batch=10)
    return bilevel(problem, SGD(0.2), Unrolled(3), **options)


def classes():
    return SplitsDataModule(blobs(rows=60, classes=2))


def supervised(perturbation=None, dropout=0.0, **options):
    return SupervisedLearner(network(4, 8, 3, dropout=dropout), None, perturbation, **{"optimizer": STEP, **options})


def rows():
    return BatchDataModule(blobs(), batch_size=16)


CASES = {
    "MAML": Case(maml, sine),
    "MAML, dropout": Case(partial(maml, 0.2), sine),
    "ridge, exact": Case(ridge, lambda: SplitsDataModule(regression())),
    "logistic, warm": Case(logistic, classes),
    "cleaning, minibatches": Case(cleaning, classes),
    "supervised": Case(supervised, rows, compiles=False),
    "noise": Case(partial(supervised, WeightNoise(0.01)), rows, compiles=False),
    "SAM": Case(partial(supervised, SAM(0.05)), rows, compiles=False),
    "SAM, dropout": Case(partial(supervised, SAM(0.05), 0.2), rows, compiles=False),
}


def on(device):
    """The Trainer's options for one device."""
    return {"accelerator": "gpu" if device == "cuda" else device, "devices": 1}


def fitted(tmp_path, device, learner, data, steps=4, **options):
    """The learner after so many steps."""
    options = {"val_check_interval": 1.0, "log_every_n_steps": 2, **on(device), **options}
    bare(tmp_path, steps, **options).fit(learner, data)
    return learner


def outer(learner):
    """The outer variable as one vector of the CPU, in double precision."""
    return flatten(learner.outer()).detach().cpu().double()


def apart(found, expected, start):
    """How far two learners are from each other, as a share of the way that training went."""
    found, expected, start = map(outer, (found, expected, start))
    return float((found - expected).norm() / (expected - start).norm())
