"""Estimators in training: chunks of tasks are the whole batch."""

import pytest
import torch
from fits import bare, parameters
from torch.testing import assert_close

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import F2SA, FiniteDifference, FirstOrder, Reptile
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

EACH = [Reptile(3), Reptile(3, batch=4), F2SA(3, weight=10.0), FiniteDifference(2), FirstOrder(2, (0.3, 0.7))]


@pytest.mark.parametrize("hypergradient", EACH, ids=repr)
def test_chunks_are_the_whole(hypergradient, tmp_path):
    ends = []
    for chunk in (None, 3):
        torch.manual_seed(0)
        problem = FewShot(MLP([1, 6, 1], activation="Tanh"), proximal=0.5)
        module = MetaLearner(problem, SGD(0.05), hypergradient, eval_steps=3, tasks_per_chunk=chunk)
        data = TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(2, 5, 5), Episodes(2, 5, 5))
        bare(tmp_path, 3, precision="64-true", log_every_n_steps=1).fit(module, data)
        ends.append(parameters(module))
    assert_close(*ends, rtol=1e-12, atol=1e-12)
