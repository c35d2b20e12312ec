"""Outer steps that are compiled together with their optimiser: they are torch's own, one after the other."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from metalit.compiling import program
from metalit.training.batches import StepResult
from metalit.training.context import StepContext
from metalit.training.fused_loop import FusedLoop
from metalit.training.joined import JoinedOptimizer, rule_of
from metalit.training.outer_gradient import OuterGradient

TASKS, STEPS = 2, 3


class Batch(NamedTuple):
    x: Tensor  # a slice of one tensor, as y is: support and query are, where nothing is cast
    y: Tensor
    mask: Tensor | None
    power: int


class Pull(nn.Module):
    """½ c‖w − x‖² + b t Σ a over tasks x, where ``a`` wanders from step to step, and t is the number of the step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("c", torch.tensor(3.0, dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))

    def outer(self):
        return {"problem": {"w": self.w, "b": self.b}}

    def evaluate(self, context, items):
        outer, tasks, start = context.outer, *items
        w, b = outer["problem"]["w"], outer["problem"]["b"] * context.progress
        begun = torch.zeros(TASKS, 3, dtype=torch.float64) if start is None else start["z"]["a"]
        away = w - tasks.x**tasks.power - tasks.y
        loss = (0.5 * self.c * away.square().sum(1) + b * begun.sum(1)).mean()
        gradient = {"problem": {"w": self.c * away.mean(0), "b": context.progress * begun.sum(1).mean()}}
        inner = {"count": torch.ones(TASKS) if start is None else start["count"] + 1, "z": {"a": 0.5 * begun + away}}
        return StepResult(OuterGradient.of(loss, gradient), {"b": 2 * b}, inner)

    def diagnose(self, context, found, items, start):
        began = {} if start is None else {"count": start["count"], "a": start["z"]["a"]}
        seen = {"x": items.x, "found": found.per_item["z"]["a"], "loss": found.gradient.loss, **began}
        return {name: 1 * value for name, value in {**context.outer["problem"], **seen}.items()}


def rows(seed):
    torch.manual_seed(seed)
    drawn = torch.randn(STEPS * TASKS, 4, dtype=torch.float64)
    return Batch(drawn[:, :3], drawn[:, 3:], None, 2)


def begin(warm):
    # its keys come in another order than those of what is found
    return {"z": {"a": torch.ones(TASKS, 3, dtype=torch.float64)}, "count": torch.zeros(TASKS)} if warm else None


def optimizer(kind, pull, options):
    own = {"momentum": 0.5} if kind is torch.optim.SGD else {"betas": (0.5, 0.9)}
    groups = [{"params": [pull.b], "lr": 0.3, **own}, {"params": [pull.w]}]
    made = kind(groups, lr=0.1, **options)
    return made, torch.optim.lr_scheduler.ExponentialLR(made, 0.8)


def loop(pull, made, tell=lambda line: None):
    return FusedLoop(JoinedOptimizer(rule_of(made), made, pull.outer()), pull.evaluate, pull.diagnose, pull, tell)


def by_torch(pull, made, schedule, tasks, start, first=0):
    """One step after the other; what was found, at which outer variable and start."""
    for number in range(STEPS):
        which = slice(number * TASKS, (number + 1) * TASKS)
        now = Batch(tasks.x[which], tasks.y[which], None, tasks.power)
        before = {"problem": {"w": pull.w.detach().clone(), "b": pull.b.detach().clone()}}
        context = StepContext(before, None, torch.tensor(first + number))
        found, begun = pull.evaluate(context, (now, start)), start
        pull.w.grad, pull.b.grad = found.gradient.gradient[:3], found.gradient.gradient[3]
        made.step()
        schedule.step()
        start = found.per_item if start is not None else None
    return found, before, begun


def check_equal(found, right):
    assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.long), True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"weight_decay": 0.2, "eps": 1e-2}),
        (torch.optim.AdamW, {"weight_decay": 0.2, "betas": (0.8, 0.95), "fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.2, "dampening": 0.3}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ],
    ids=["Adam", "Adam, decay", "AdamW", "SGD", "SGD, dampening", "SGD, Nesterov"],
)
def test_the_steps_are_those_of_torch(kind, options, warm):
    theirs, ours = Pull(), Pull()
    (right, schedule), (made, ours_schedule) = (optimizer(kind, pull, options) for pull in (theirs, ours))
    start, begun, said = begin(warm), begin(warm), []
    steps = loop(ours, made, said.append)
    for seed in range(2):
        tasks = rows(seed)
        found, before, at = by_torch(theirs, right, schedule, tasks, start, seed * STEPS)
        taken = steps(tasks, STEPS, begun, seed * STEPS, ours_schedule.step)
        ours_schedule.step()
        assert sum("compiled" in line for line in said) == 1, said
        check_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            check_equal(dict(made.state[one]), dict(right.state[other]))
        assert taken.last.per_item.keys() == found.per_item.keys()
        check_equal(taken.last._asdict(), found._asdict())
        last = tasks._replace(x=tasks.x[-TASKS:], y=tasks.y[-TASKS:])
        check_equal(taken.diagnosis, theirs.diagnose(StepContext(before, None, None), found, last, at))
        assert taken.not_finite.tolist() == [0.0] * STEPS
        ours.c, theirs.c = torch.tensor(5.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
        start, begun = (None, None) if at is None else (found.per_item, taken.last.per_item)


@pytest.mark.parametrize("bad", range(STEPS))
def test_each_step_has_a_flag_of_its_own(bad):
    pull = Pull()
    made, schedule = optimizer(torch.optim.Adam, pull, {})
    steps = loop(pull, made)
    steps(rows(0), STEPS, None, 0, schedule.step)
    tasks = rows(1)
    tasks.x[bad * TASKS] = math.nan
    flags = steps(tasks, STEPS, None, STEPS, schedule.step).not_finite
    assert flags.tolist() == [float(number >= bad) for number in range(STEPS)]


def test_where_nothing_compiles_no_step_is_taken(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(program, "trace", fails)
    pull, said, called = Pull(), [], []
    made, _ = optimizer(torch.optim.Adam, pull, {})
    before = copy.deepcopy(pull.state_dict())
    steps = loop(pull, made, said.append)
    assert steps(rows(0), STEPS, None, 0, lambda: called.append(1)) is None
    assert "RuntimeError: no compiler" in said[-1]
    check_equal(dict(pull.state_dict()), dict(before))
    assert not made.state
    assert not called


def test_a_program_is_of_one_optimiser_and_of_the_parameters_that_it_was_made_for():
    pull = Pull()
    (made, _), (other, _) = (optimizer(torch.optim.Adam, pull, {}) for _ in range(2))
    joined = JoinedOptimizer(rule_of(made), made, pull.outer())
    assert joined.is_of(made, pull.outer())
    assert not joined.is_of(other, pull.outer())
    assert not joined.is_of(made, {"problem": {"w": pull.w}})
    assert not joined.is_of(made, Pull().outer())


def test_a_step_size_that_is_a_tensor_is_read_when_it_is_due():
    rate = torch.tensor(0.5)
    made = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=rate, momentum=0.9)
    found = rule_of(made).coefficients(made.param_groups[0], 1)
    rate.fill_(0.25)  # as a scheduler does
    assert found.lr == 0.5


class Own(torch.optim.Adam):
    """May step otherwise."""


class OwnSGD(torch.optim.SGD):
    """May step otherwise."""


def moved(kind, **options):
    """One whose second parameter came after a step."""
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    made = kind([first], lr=0.1, **options)
    first.grad = torch.ones(2)
    made.step()
    made.add_param_group({"params": [second]})
    return made


def of_types(*types):
    return torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in types])


def hooked():
    made = of_types(torch.float32)
    made.register_step_post_hook(lambda *_: None)
    return made


def plain(kind, **options):
    return kind([nn.Parameter(torch.zeros(2))], lr=0.1, **options)


@pytest.mark.parametrize(
    "made",
    [
        lambda: plain(Own),
        lambda: plain(OwnSGD, momentum=0.9),
        lambda: plain(torch.optim.Adam, amsgrad=True),
        lambda: plain(torch.optim.Adam, maximize=True),
        lambda: plain(torch.optim.SGD),
        lambda: plain(torch.optim.SGD, momentum=0.9, maximize=True),
        lambda: moved(torch.optim.Adam),
        lambda: moved(torch.optim.SGD, momentum=0.9, dampening=0.5),
        lambda: of_types(torch.float32, torch.float64),
        lambda: torch.optim.Adam([nn.Parameter(torch.zeros(2, device="meta"))]),  # where it is compiled for no loop
        hooked,
    ],
)
def test_an_optimizer_that_no_rule_steps_as_torch_does_has_none(made):
    assert rule_of(made()) is None
