"""What was written by hand is as exact as the precision that is trained in."""

import copy

import pytest
import torch
from fits import bare
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import nn

from metalit.hypergradients import Direct, JTg, Unrolled
from metalit.inner import SGD, InnerOptimizer, MetaSGD
from metalit.modules import BilevelLearner, MetaLearner
from metalit.networks import MLP
from metalit.problem import Problem
from metalit.problems import Cleaning, FewShot, Logistic, Ridge, ThetaPhi
from metalit.tree import leaves, tree_map


class Momentum(InnerOptimizer):
    """Brings two parameters of its own, one deep in a tree."""

    def outer(self, inner, steps):
        return {
            "rate": tree_map(lambda value: 0.3 * torch.ones_like(value), inner),
            "more": {"decay": torch.full_like(next(leaves(inner))[1], 0.9)},
        }

    def update(self, grad_fn, inner, state, outer, step):
        return tree_map(lambda value, slope, rate: value - rate * slope, inner, grad_fn(inner), outer["rate"]), state


class Own(Problem):
    """A user's, with a number that was written by hand."""

    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.part.rate = nn.Parameter(self.written("part.rate", 0.1))

    def init(self, outer, task):
        return {}

    def inner_loss(self, inner, outer, task, step):
        return outer["part.rate"] ** 2

    def outer_loss(self, inner, outer, task):
        return outer["part.rate"] ** 2


def bilevel(problem):
    return BilevelLearner(problem, SGD(), Direct())


WRITTEN = {
    "theta": (lambda: bilevel(ThetaPhi([0.7, 1 / 3], [0.5])), lambda module: module.problem.theta, [0.7, 1 / 3]),
    "phi": (lambda: bilevel(ThetaPhi([1.0], [0.1, -0.2])), lambda module: module.problem.phi, [0.1, -0.2]),
    "ridge": (lambda: bilevel(Ridge(2, -2.3)), lambda module: module.problem.log_penalty, [-2.3] * 2),
    "logistic": (lambda: bilevel(Logistic(1, 0.7)), lambda module: module.problem.log_penalty, [0.7]),
    "cleaning": (lambda: bilevel(Cleaning(nn.Linear(1, 2), 1, logit=0.3)), lambda module: module.problem.logit, [0.3]),
    "meta-sgd": (
        lambda: MetaLearner(FewShot(MLP([1, 1])), MetaSGD(0.01), Unrolled()),
        lambda module: module.outer()["optimizer"]["lr"]["out.bias"],
        [0.01],
    ),
    "deep": (
        lambda: MetaLearner(FewShot(nn.Linear(1, 1, bias=False)), Momentum(), Unrolled()),
        lambda module: module.outer()["optimizer"]["more"]["decay"].flatten(),
        [0.9],
    ),
    "own": (lambda: bilevel(Own()), lambda module: module.problem.part.rate.reshape(1), [0.1]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_number_is_what_was_written_in_every_precision(name):
    make, at, numbers = WRITTEN[name]
    exact = torch.tensor(numbers, dtype=torch.float64)
    module = make()
    assert at(module).dtype == torch.float32
    assert torch.equal(at(module), exact.float())
    module = copy.deepcopy(DoublePrecision().convert_module(module))
    assert torch.equal(at(module), exact)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        module.to(dtype)
        assert torch.equal(at(module), exact.to(dtype))
    assert torch.equal(at(HalfPrecision("bf16-true").convert_module(make())), exact.bfloat16())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_trained_stays_as_it_is(name):
    make, at, _ = WRITTEN[name]
    module = make()
    with torch.no_grad():
        at(module).add_(0.25)
    before = at(module).clone()
    assert torch.equal(at(module.double()), before.double())


def test_what_was_loaded_stays_as_it_is():
    trained, module = bilevel(ThetaPhi([0.7], [0.5])).double(), bilevel(ThetaPhi([0.1], [0.2])).double()
    module.load_state_dict(trained.state_dict())
    assert module.problem.theta.item() == 0.7
    assert module.float().double().problem.theta.item() == torch.tensor(0.7).item()


def test_a_run_in_double_precision_begins_there(tmp_path):
    problem = ThetaPhi([0.7], [0.3])
    learner = BilevelLearner(problem, SGD(0.1), JTg(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01))
    bare(tmp_path, 1, precision="64-true", limit_val_batches=0).fit(learner)
    expected = 0.3 - 0.01 * (8 * 0.3**2 * 0.7**2 * 0.3)
    assert problem.phi.item() == pytest.approx(expected, rel=1e-15)
