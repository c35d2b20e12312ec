"""Derivative order that is annealed: steps of first order, and from a step on of second, however they are taken."""

import pickle

import pytest
import torch
from cases import PROBLEMS, draw, task_at
from fits import parameters, same, trainer
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.hypergradients import Annealed, FirstOrder, Recomputed, Unrolled, over_tasks
from metalit.inner import SGD, Newton
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot
from metalit.tree import tree_map

STEPS, FUSED, UNTIL = 10, 5, 5
WEIGHTS = Annealed([0.5, 0.3, 0.2], [0.0, 0.1, 0.9], 7)
SHARES = (0.2, 0.3, 0.5)


# ---- estimates


@pytest.mark.parametrize("kind", [Unrolled, Recomputed])
@pytest.mark.parametrize("weights", [None, SHARES, WEIGHTS])
def test_the_form_of_a_step_is_of_first_order_and_then_the_estimator_without_it(kind, weights):
    annealed = kind(3, weights, first_order_until=4)
    assert annealed.begins == (0, 4)
    assert annealed.at(0) == annealed.at(3) == FirstOrder(3, weights)
    assert annealed.at(4) == annealed.at(99) == kind(3, weights)
    assert [annealed.begun(step) for step in (0, 3, 4, 99)] == [0, 0, 4, 4]
    plain = kind(3, weights)
    assert plain.begins == (0,)
    assert plain.at(0) is plain.at(99) is plain


@pytest.mark.parametrize("kind", [Unrolled, Recomputed])
def test_a_step_is_that_of_its_form_to_the_last_digit(kind):
    problem, tasks, lr, _ = PROBLEMS["ANIL"]
    outer = tree_map(torch.Tensor.detach, outer_variable(problem, SGD(lr), task_at(tasks, 0)))
    for step in (0, 3, 4, 9):
        form = FirstOrder(3, WEIGHTS) if step < 4 else kind(3, WEIGHTS)
        right = over_tasks(form, problem, SGD(lr), outer, tasks, None, step)
        for progress in (step, torch.tensor(step)):
            found = over_tasks(kind(3, WEIGHTS, first_order_until=4), problem, SGD(lr), outer, tasks, None, progress)
            assert_close(tuple(found), tuple(right), rtol=0, atol=0 if progress is step else 1e-15)


def check(hypergradient, name, optimizer=None):
    problem, tasks, lr, _ = PROBLEMS[name]
    optimizer, task = optimizer or SGD(lr), task_at(tasks, 0)
    hypergradient.check(problem, optimizer, outer_variable(problem, optimizer, task), task)


def test_both_orders_are_checked():
    check(Unrolled(2), "Ridge")
    check(Unrolled(2, first_order_until=4), "ANIL")
    with pytest.raises(InputError, match=r"^hypergradient FirstOrder \(before outer step 4\) learns through init, "):
        check(Unrolled(2, first_order_until=4), "Ridge")
    with pytest.raises(InputError, match=r"^hypergradient FirstOrder \(before outer step 4\) takes no derivative of"):
        check(Recomputed(2, first_order_until=4), "ANIL", Newton(1.0))


@pytest.mark.parametrize("until", [-1, 2.5, "4"])
def test_a_number_that_is_no_step_is_named(until):
    with pytest.raises(InputError, match=rf"^Unrolled: first_order_until={until!r} must be a whole number of outer"):
        Unrolled(2, first_order_until=until)


@pytest.mark.parametrize(("weights", "told"), [([0.5], r"\[0\.5\] must be 3"), (Annealed([1.0], [1.0], 2), "first=")])
def test_first_order_takes_the_same_weights(weights, told):
    with pytest.raises(InputError, match=rf"^FirstOrder: weights.?{told}"):
        FirstOrder(3, weights)


# ---- training


def learner(kind=Unrolled, until=UNTIL, **options):
    torch.manual_seed(0)
    problem = FewShot(MLP([1, 6, 1], activation="Tanh"))
    return MetaLearner(problem, SGD(0.05), kind(3, WEIGHTS, first_order_until=until), eval_steps=3, **options)


def sine():
    return TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(2, 5, 5), Episodes(2, 5, 5))


def fit(root, module, steps=STEPS, ckpt=None):
    run = trainer(root, steps, precision="64-true", val_check_interval=1.0, log_every_n_steps=FUSED)
    run.fit(module, sine(), ckpt_path=ckpt)
    return module, run


@pytest.fixture(scope="module")
def by_hand():
    """Each step of the order that it should have, by torch's own Adam."""
    module, data = learner().double(), sine()
    data.setup("test")
    adam = torch.optim.Adam(module.parameters())
    for step in range(STEPS):
        form = FirstOrder(3, WEIGHTS) if step < UNTIL else Unrolled(3, WEIGHTS)
        tasks = module.cast(data.draw("train", torch.arange(4 * step, 4 * step + 4)))
        outer = {**module.constants(), "problem": {n: p.detach() for n, p in module.problem.outer().items()}}
        found = over_tasks(form, module.problem, SGD(0.05), outer, tasks, None, step).gradient["problem"]
        for name, parameter in module.problem.outer().items():
            parameter.grad = found[name]
        adam.step()
    return parameters(module)


@pytest.mark.parametrize(
    ("kind", "options", "programs"),
    [
        (Unrolled, {}, []),
        (Unrolled, {"fused_steps": FUSED}, []),
        (Unrolled, {"tasks_per_chunk": 3}, []),
        pytest.param(
            Unrolled,
            {"compile": True},
            ["the outer step", "what is logged of it", "the outer step"],
            marks=pytest.mark.long,
        ),
        (Unrolled, {"compile": True, "fused_steps": FUSED}, 2 * ["the outer step"]),
        (Recomputed, {}, []),
    ],
    ids=["eager", "fused", "chunks", "compiled", "compiled, fused", "recomputed"],
)
def test_each_step_has_its_order(kind, options, programs, by_hand, tmp_path, capfd):
    module, _ = fit(tmp_path, learner(kind, **options))
    assert module.is_compiled == options.get("compile", False)
    assert_close(parameters(module), by_hand, rtol=1e-9, atol=1e-10)
    said = "".join(capfd.readouterr()).splitlines()
    assert [line.split(" in ")[0].split("compiled ")[1] for line in said if ": compiled " in line] == programs


@pytest.mark.parametrize(("fused", "stop"), [(1, 3), (1, 5), (1, 8), (FUSED, 5)])
def test_a_run_that_is_resumed_on_either_side_ends_bit_for_bit_alike(fused, stop, tmp_path):
    whole, _ = fit(tmp_path / "whole", learner(fused_steps=fused))
    _, first = fit(tmp_path / "half", learner(fused_steps=fused), stop)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path / "resumed", learner(fused_steps=fused), ckpt=tmp_path / "half.ckpt")
    assert same(whole, resumed)


def test_a_block_of_fused_steps_has_one_order():
    told = (
        r"^model\.fused_steps=5 steps are taken as one, and from outer step 7 on hypergradient Unrolled has another "
        r"form: let that number be a multiple of fused_steps$"
    )
    with pytest.raises(InputError, match=told):
        learner(until=7, fused_steps=5)
    learner(until=10, fused_steps=5)
    learner(until=7)


class Hard(torch.nn.Module):
    """A network without a second derivative."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x):
        return torch.cdist(self.line(x), torch.ones(1, 1, dtype=x.dtype))


def test_what_fails_at_second_order_is_told_before_the_first_step(tmp_path):
    torch.manual_seed(0)
    module = MetaLearner(FewShot(Hard()), SGD(0.05), Unrolled(1, first_order_until=5), eval_steps=1)
    with pytest.raises(InputError, match=r"^problem: torch has no second derivative of cdist"):
        fit(tmp_path, module)
    points = Points(draw(5, 1), draw(5, 1))
    task = Task(points, points, torch.tensor(0))
    problem = FewShot(Hard().double())
    FirstOrder(1)(problem, SGD(0.1), outer_variable(problem, SGD(0.1)), task)


def test_a_learner_travels_to_another_process():
    module = learner(compile=True, fused_steps=5)
    assert same(pickle.loads(pickle.dumps(module)), module)
