"""Each fault that is planted is found, and told by name; what is right is told to be."""

import pytest
import torch
from planted import (
    Cut,
    Detached,
    Gated,
    InPlace,
    Leaking,
    Line,
    Noisy,
    OwnAdam,
    Remembering,
    SecondInName,
    SumOfRows,
    SupportSum,
    Unused,
    learner,
    tasks,
)

import metalit
from metalit.networks import MLP
from metalit.problems import FewShot


def test_nothing_is_wrong_where_nothing_is():
    report = metalit.check(learner(), tasks())
    assert report.problems == []
    assert report.ok
    assert report.precision == "float64"
    assert max(slope.error for slope in report.slopes) < 1e-7
    assert {parameter.name: parameter.status for parameter in report.parameters} == {
        "problem.w": "right",
        "problem.b": "right",
    }


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: learner(Detached()), ["problem.w", "no derivative comes through"]),
        (lambda: learner(Unused()), ["problem.idle", "nothing depends on it"]),
        (lambda: learner(InPlace()), ["InPlace.outer_loss changes task.query.x in place"]),
        (lambda: learner(Gated(), OwnAdam()), ["problem.w, problem.b: its gradient is not finite"]),
        (lambda: learner(None, OwnAdam()), ["OwnAdam", "derivative of its step is NaN", "second moment"]),
        (lambda: learner(Noisy()), ["different at each call"]),
        (lambda: learner(Remembering()), ["norm.running_mean", "leaks into the others"]),
        (lambda: learner(SumOfRows()), ["SumOfRows.inner_loss", "a sum over rows"]),
        (lambda: learner(SumOfRows()), ["SumOfRows.outer_loss", "a sum over rows"]),
        (lambda: learner(SupportSum()), ["SupportSum.inner_loss", "a sum over rows"]),
        (lambda: learner(Leaking()), ["Leaking.inner_loss reads task.query", "a leak"]),
        (lambda: learner(None, Cut()), ["problem.w, problem.b: inner gradients count as constants"]),
        (lambda: learner(None, None, SecondInName()), ["SecondInName says", "FirstOrder's"]),
    ],
    ids=lambda value: value[0].split()[0] if isinstance(value, list) else "",
)
def test_a_planted_fault_is_found(made, told):
    report = metalit.check(made(), tasks())
    assert not report.ok
    assert [line for line in report.problems if all(part in line for part in told)], report.problems


def test_nothing_of_the_learner_is_changed():
    given, batch = learner(Remembering()), tasks()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    kept = [part.clone() for part in batch.query[:2]]
    state = torch.get_rng_state()
    metalit.check(given, batch)
    metalit.check(learner(InPlace()), batch)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert all(map(torch.equal, kept, batch.query[:2]))
    assert torch.equal(state, torch.get_rng_state())
    assert given.problem.w.dtype == torch.float32
    assert isinstance(given.problem, Line)


@pytest.mark.parametrize(
    "network",
    [
        lambda: MLP([2, 6, 1], activation="Tanh", dropout=0.3),
        lambda: MLP([2, 6, 1], activation="Tanh", norm="BatchNorm1d"),
        lambda: MLP([2, 6, 1]),
    ],
    ids=["dropout that follows the key", "BatchNorm of each set by itself", "ReLU"],
)
def test_what_looks_like_a_fault_and_is_none(network):
    torch.manual_seed(0)
    report = metalit.check(learner(FewShot(network())), tasks())
    assert report.problems == []
    assert {slope.verdict for slope in report.slopes} == {"agrees"}
