"""One tiny learner of each kind, with the data that it takes."""

import torch
from fits import blobs, regression

from metalit.data import BatchDataModule, Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import FewShot, Ridge


def meta(**options):
    torch.manual_seed(0)
    network = MLP([1, 4, 1], activation="Tanh")
    return MetaLearner(FewShot(network), SGD(0.05), Unrolled(1), **{"eval_steps": 1, **options})


def bilevel(**options):
    return BilevelLearner(Ridge(3, -1.0), SGD(0.1), Unrolled(2), **options)


def supervised(**options):
    torch.manual_seed(0)
    return SupervisedLearner(MLP([4, 4, 3], activation="Tanh"), **options)


LEARNERS = {"meta": meta, "bilevel": bilevel, "supervised": supervised}
DATA = {
    "meta": lambda: TaskDataModule(Sine(), Episodes(2, 3, 3), Episodes(4, 3, 3), Episodes(4, 3, 3)),
    "bilevel": lambda: SplitsDataModule(regression()),
    "supervised": lambda: BatchDataModule(blobs(60), batch_size=8),
}
