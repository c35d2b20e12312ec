"""Tasks at once where torch can, one after the other where it cannot."""

import warnings

import pytest
import torch
from cases import draw
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.errors import InputError
from metalit.hypergradients import FirstOrder, Unrolled, for_each_task, over_tasks
from metalit.inner import SGD, Newton
from metalit.problem import Points, Task
from metalit.problems import FewShot
from metalit.scaled import Scaled

TASKS = Task(
    Points(draw(3, 5, 4), draw(3, 5, 2)), Points(draw(3, 6, 4, seed=1), draw(3, 6, 2, seed=2)), torch.arange(3)
)


class After(nn.Module):
    """A linear layer, then any function of what it says and of the inputs."""

    def __init__(self, fn):
        super().__init__()
        self.first = nn.Linear(4, 2, dtype=torch.float64)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.first(x))


def filled(y):
    out = torch.zeros(len(y), 2, dtype=y.dtype)
    out[:] = y
    return out


IN_TURN = {
    "branches": lambda y: y if y.sum() > 0 else y * y,
    "loops": lambda y: y ** int(1 + y.detach().abs().mean()),
    "reads a value": lambda y: y * y.max().item(),
    "fills zeros": filled,
}


def found(problem, hypergradient=None, optimizer=None, tasks=TASKS):
    optimizer = optimizer or SGD(0.1)
    return over_tasks(hypergradient or Unrolled(2), problem, optimizer, outer_variable(problem, optimizer), tasks)


def alone(problem, number, hypergradient):
    support, query = (Points(part.x[number], part.y[number]) for part in TASKS[:2])
    outer = outer_variable(problem, SGD(0.1))
    return hypergradient(problem, SGD(0.1), outer, Task(support, query, torch.tensor(number)))


@pytest.mark.parametrize("name", IN_TURN)
@pytest.mark.parametrize("hypergradient", [Unrolled(2), FirstOrder(2)], ids=["Unrolled", "FirstOrder"])
def test_what_cannot_be_vectorised_is_the_mean_of_single_tasks(name, hypergradient):
    problem = FewShot(After(IN_TURN[name]))
    with pytest.warns(UserWarning, match="^tasks are evaluated one after the other, which is exact and slower: "):
        estimate = found(problem, hypergradient)
    each = [alone(problem, number, hypergradient) for number in range(3)]
    assert_close(estimate.loss, sum(one.loss for one in each) / 3, rtol=1e-13, atol=0)
    for parameter, slope in estimate.gradient["problem"].items():
        assert_close(slope, sum(one.gradient["problem"][parameter] for one in each) / 3, rtol=1e-12, atol=1e-14)
        assert_close(estimate.inner[parameter], torch.stack([one.inner[parameter] for one in each]))


def test_it_is_told_once_with_the_layer_and_scaled_problems_know_it_too():
    problem = FewShot(nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), After(filled)))
    with pytest.warns(UserWarning, match=r": layer 'network\.1' \(After\): vmap: inplace arithmetic") as told:
        found(Scaled(problem, torch.tensor(2.0)))
    assert len(told) == 1
    assert problem.vectorised is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(problem)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_never_vectorised(kind):
    """With one task, torch would let it pass."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = kind(4, 2, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            return self.deep(x)[0]

    one = Task(*(Points(part.x[:1], part.y[:1]) for part in TASKS[:2]), torch.arange(1))
    with pytest.warns(UserWarning, match=rf"layer 'network\.deep' \({kind.__name__}\) has no rule for many at once"):
        found(FewShot(Recurrent()), tasks=one)


@pytest.mark.parametrize(
    ("fn", "operation"),
    [
        (lambda y: torch.cdist(y, y.detach()[:2]), "cdist"),
        (lambda y: F.embedding_bag(torch.tensor([[0, 1]]).expand(len(y), 2), y), "embedding_bag"),
    ],
)
def test_an_operation_without_a_second_derivative_is_named_and_first_order_needs_none(fn, operation):
    problem = FewShot(After(fn))
    with pytest.raises(InputError, match=rf"^problem: torch has no second derivative of {operation}, .* FirstOrder"):
        found(problem)
    with pytest.raises(InputError, match=rf"^problem: torch has no second derivative of {operation}, "):
        found(problem, optimizer=Newton(1.0))
    estimate = found(problem, FirstOrder(1))
    assert_close(estimate.loss, sum(alone(problem, number, FirstOrder(1)).loss for number in range(3)) / 3)


def test_draws_of_no_key_are_refused_one_after_the_other_too():
    noisy = FewShot(After(lambda y: filled(y) + torch.rand(2)))
    with pytest.raises(InputError, match="draws random numbers that would not follow the task"):
        found(noisy)


def test_what_fails_for_a_single_task_too_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match=r"\(5x2 and 3x2\)"):  # of one task, not of three
        found(FewShot(After(lambda y: y @ torch.zeros(3, 2, dtype=y.dtype))))


def test_memory_that_is_full_is_left_to_who_makes_chunks():
    def full(outer, task):
        calls.append(task)
        raise torch.OutOfMemoryError

    calls = []
    with pytest.raises(torch.OutOfMemoryError):
        for_each_task(full, {}, torch.arange(3))
    assert len(calls) == 1


def test_attention_is_differentiated_twice_at_once_and_alone():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, dtype=torch.float64)
            self.out = nn.Linear(4, 2, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.layer(x.unsqueeze(1) * torch.ones(3, 1, dtype=x.dtype)).mean(1))

    problem = FewShot(Attention())
    estimate, each = found(problem), [alone(problem, number, Unrolled(2)) for number in range(3)]
    assert problem.vectorised
    for parameter, slope in estimate.gradient["problem"].items():
        assert_close(slope, sum(one.gradient["problem"][parameter] for one in each) / 3, rtol=1e-10, atol=1e-14)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
