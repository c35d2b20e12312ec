"""What an outer step tells against itself: in runs of any length, and the true cause."""

import warnings

import pytest
import torch
from fits import Kill, KilledError, bare, regression
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from metalit.data import Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.hypergradients import Direct, Implicit, JTg, Unrolled
from metalit.inner import SGD, Newton
from metalit.linsolve import CG
from metalit.modules import BilevelLearner, MetaLearner
from metalit.problem import Problem
from metalit.problems import FewShot, Ridge, ThetaPhi


class Spring(Problem):
    """g = ½h(θ − φ)² with h of either sign, f = ½w(θ − 1)²."""

    def __init__(self, stiffness=1.0, weight=1.0, phi=0.3):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(phi))
        self.stiffness, self.weight = stiffness, weight

    def init(self, outer, task):
        return torch.zeros(())

    def inner_loss(self, inner, outer, task, step):
        return 0.5 * self.stiffness * (inner - outer["phi"]).square()

    def outer_loss(self, inner, outer, task):
        return 0.5 * self.weight * (inner - 1.0).square()


class Plain(Problem):
    """No inner variable; the optimum is where φ begins."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(2.0))

    def init(self, outer, task):
        return {}

    def inner_loss(self, inner, outer, task, step):
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner, outer, task):
        return (outer["phi"] - 2.0).square()


def told(root, learner, data=None, steps=3, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare(root, steps, limit_val_batches=0, **options).fit(learner, data)
    return [str(warning.message) for warning in caught if str(warning.message).startswith("outer step ")]


def slow(**options):
    return BilevelLearner(Spring(), SGD(0.001), Implicit(1), **options)


@pytest.mark.parametrize("log_every", [0, 50])
def test_a_short_run_and_one_without_logs_are_warned_from_the_start(log_every, tmp_path):
    (found,) = told(tmp_path, slow(), log_every_n_steps=log_every)
    assert found.startswith("outer step 0: Implicit needs a stationary inner point")


@pytest.mark.parametrize("log_every", [0, 7, 50])
@pytest.mark.parametrize("fused", [1, 3])
def test_a_warm_start_is_judged_where_it_ends(log_every, fused, tmp_path):
    if fused > 1 and log_every:
        log_every = 6
    options = {"warm_start": True, "fused_steps": fused}
    (found,) = told(tmp_path, slow(**options), log_every_n_steps=log_every)
    assert found.startswith("outer step 3: Implicit needs a stationary inner point")
    quick = BilevelLearner(Spring(), SGD(0.9), Implicit(1), **options)
    assert told(tmp_path, quick, steps=6, log_every_n_steps=log_every) == []


def test_a_fit_without_a_step_is_not_warned_of_the_last_one_before(tmp_path):
    learner = slow(warm_start=True)
    with pytest.raises(KilledError):
        told(tmp_path, learner, log_every_n_steps=50, callbacks=[Kill(2)])
    stop = LambdaCallback(on_train_start=lambda run, _: setattr(run, "should_stop", True))
    assert told(tmp_path, learner, log_every_n_steps=50, callbacks=[stop]) == []


def test_a_log_that_comes_soon_is_waited_for(tmp_path):
    (found,) = told(tmp_path, slow(), log_every_n_steps=2)
    assert found.startswith("outer step 2: ")
    (found,) = told(tmp_path, slow(), log_every_n_steps=5)
    assert found.startswith("outer step 3: ")


def test_what_is_solved_is_not_complained_of(tmp_path):
    learner = BilevelLearner(Spring(), Newton(), Implicit(1, CG(2)))
    assert told(tmp_path, learner, log_every_n_steps=50) == []
    data = TaskDataModule(Sine(), *[Episodes(2, 5, 5)] * 3)
    learner = MetaLearner(FewShot(nn.Linear(1, 1)), SGD(), Unrolled(1), eval_steps=1)
    assert told(tmp_path, learner, data, log_every_n_steps=50) == []


# ---- the outer gradient is exactly 0

ZERO = {
    "indefinite": (lambda: BilevelLearner(Spring(-1.0), Newton(), Implicit(1, CG(2))), "not positive definite"),
    "direct, at its optimum": (lambda: BilevelLearner(Plain(), SGD(), Direct()), "may be its optimum"),
    "nothing left": (
        lambda: BilevelLearner(Spring(weight=0.0), SGD(0.1), Unrolled(1)),
        "a zero gradient at the inner variable that was found",
    ),
    "solved": (lambda: BilevelLearner(Spring(phi=1.0), Newton(), Implicit(1, CG(2))), "nothing is left to learn"),
    "solved where it starts": (lambda: BilevelLearner(ThetaPhi([0.0], [1.0]), SGD(), JTg()), "is solved there"),
    "a penalty of nothing": (lambda: BilevelLearner(Ridge(3), SGD(0.1), Unrolled(1)), "zero weights under a penalty"),
}


@pytest.mark.parametrize("log_every", [1, 50])
@pytest.mark.parametrize("name", ZERO)
def test_the_true_cause_is_said(name, log_every, tmp_path):
    make, cause = ZERO[name]
    learner = make()
    data = SplitsDataModule(regression()) if isinstance(learner.problem, Ridge) else None
    (found,) = told(tmp_path, learner, data, log_every_n_steps=log_every)
    assert cause in found
    assert ("exactly 0" in found) == (name != "indefinite")
    assert ("set model.warm_start" in found) == (name == "a penalty of nothing")


def test_a_way_out_that_is_taken_is_not_advised(tmp_path):
    class Apart(Spring):
        def inner_loss(self, inner, outer, task, step):
            return 0.5 * (inner - 0.5).square() + 0.0 * outer["phi"] * inner

    (found,) = told(tmp_path, BilevelLearner(Apart(), SGD(0.1), Unrolled(1), warm_start=True))
    assert found.endswith("take more inner steps")
