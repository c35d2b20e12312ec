import warnings
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from cases import ESTIMATORS, NO_PATH, OPTIMIZERS, PROBLEMS, TRIPLES, Bowl, bowls, draw, is_valid, task_at
from torch import nn
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.autodiff import call
from metalit.errors import InputError
from metalit.hypergradients import (
    F2SA,
    Direct,
    FiniteDifference,
    FirstOrder,
    Implicit,
    JTg,
    Reptile,
    Truncated,
    Unrolled,
)
from metalit.hypergradients.paths import paths
from metalit.inner import SGD, MetaSGD, Newton
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot
from metalit.tree import flatten, leaves

ENTERS = {
    "bowl": {"init"},
    "MAML": {"init"},
    "iMAML": {"init", "inner_loss"},
    "ThetaPhi": {"inner_loss", "outer_loss"},
    "ANIL": {"init", "inner_loss", "outer_loss"},
    "BOIL": {"init", "inner_loss", "outer_loss"},
    "CAVIA": {"inner_loss", "outer_loss"},
    "CAVIA, all adapts": {"init", "inner_loss"},
    "MAML++": {"init", "inner_loss", "outer_loss"},
    "Ridge": {"inner_loss"},
    "RidgeHead": {"init", "inner_loss", "outer_loss"},
    "BayesianHead": {"init", "inner_loss", "outer_loss"},
    "NeuralProcess": {"init", "inner_loss", "outer_loss"},
    "ProtoMAML": {"init"},
    "Prototypes": {"init", "inner_loss", "outer_loss"},
    "Matching": {"init", "inner_loss", "outer_loss"},
    "Logistic": {"inner_loss"},
    "Cleaning": {"inner_loss"},
    "LowRank": {"outer_loss"},
    "LowRank, exact": {"inner_loss", "outer_loss"},
    "LowRank, exact, missing": {"inner_loss", "outer_loss"},
}
CARRIES = {
    "Implicit": "inner_loss",
    "JTg": "inner_loss",
    "FirstOrder": "init, outer_loss and inner optimiser",
    "Direct": "init and outer_loss",
    "F2SA": "inner_loss",
    "Reptile": "init",
}
EACH = [Unrolled(2), Truncated(2, 1), FiniteDifference(2), FirstOrder(2), Implicit(2), JTg(2), F2SA(2), Direct()]
each_estimator = pytest.mark.parametrize("estimator", EACH, ids=lambda estimator: type(estimator).__name__)
BOWL, TASK = Bowl(draw(3, seed=4)), task_at(bowls(3), 0)


def enters(name):
    return ENTERS[name] if name in ENTERS else ENTERS[name.split()[0].rstrip(",")]


def check(estimator, problem, optimizer, task, start=None):
    estimator.check(problem, optimizer, outer_variable(problem, optimizer, task), task, start)


@pytest.mark.parametrize("name", PROBLEMS)
def test_paths_are_where_the_outer_variable_enters(name):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    for optimizer, brought in ((SGD(lr), set()), (MetaSGD(lr), {"inner optimiser"})):
        outer = outer_variable(problem, optimizer, task)
        with torch.no_grad():
            assert paths(problem, outer, task).keys() == enters(name) | brought
            assert paths(problem, outer, task, problem.init(problem.outer(), task)).keys() == (
                enters(name) - {"init"} | brought
            )
        assert all(value.grad is None for _, value in leaves(outer))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_check_takes_what_is_valid_alone(estimator):
    for case in TRIPLES:
        if case.estimator_name == estimator:
            told = nullcontext() if is_valid(case) else pytest.raises(InputError)
            with told:
                check(case.hypergradient, case.problem, case.optimizer, task_at(case.tasks, 0))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in NO_PATH.items() for name in sorted(names)])
def test_a_path_that_is_missing_is_named_with_the_estimator_and_the_problem(name, kind):
    problem, tasks, lr, _ = PROBLEMS[name]
    estimator = next(each for each in [*EACH, Reptile(2)] if type(each).__name__ == kind)
    with pytest.raises(InputError) as raised:
        check(estimator, problem, SGD(lr), task_at(tasks, 0))
    (there,) = enters(name)
    has_term = isinstance(problem, FewShot) and kind in {"Implicit", "F2SA"}
    other = f", or give {type(problem).__name__} a positive proximal=" if has_term else ""
    assert str(raised.value) == (
        f"hypergradient {kind} learns through {CARRIES[kind]}, but the outer variable of {type(problem).__name__} "
        f"enters through {there} alone: its gradient would be zero or wrong; use Unrolled{other}"
    )
    if name != "LowRank" and kind != "Reptile":
        task = task_at(tasks, 0)
        start = None if kind == "Direct" else problem.init(problem.outer(), task)
        found = estimator(problem, SGD(lr), outer_variable(problem, SGD(lr), task), task, start)
        assert flatten(found.gradient["problem"]).abs().max() == 0


@pytest.mark.parametrize(
    "estimator", [Implicit(2), JTg(2), F2SA(2), Direct()], ids=lambda estimator: type(estimator).__name__
)
def test_learned_rates_need_an_estimator_that_carries_them(estimator):
    problem, tasks, lr, _ = PROBLEMS["ANIL"]
    task, optimizer = task_at(tasks, 0), MetaSGD(lr)
    with pytest.raises(InputError) as raised:
        check(estimator, problem, optimizer, task)
    assert str(raised.value) == (
        "inner_optimizer MetaSGD brings outer parameters, to which hypergradient "
        f"{type(estimator).__name__} carries no derivative: they would never learn; use SGD with a fixed lr inside, or "
        "Unrolled outside"
    )
    found = estimator(problem, optimizer, outer_variable(problem, optimizer, task), task)
    assert flatten(found.gradient["optimizer"]).abs().max() == 0


def test_newton_needs_an_estimator_that_does_not_cut_its_hessian():
    problem, tasks, *_ = PROBLEMS["ANIL"]
    task, optimizer = task_at(tasks, 0), Newton(damping=0.5)
    with pytest.raises(InputError) as raised:
        check(FirstOrder(1), problem, optimizer, task)
    assert str(raised.value) == (
        "hypergradient FirstOrder takes no derivative of inner gradients, but Newton differentiates them; use SGD "
        "inside, or another hypergradient"
    )
    outer = outer_variable(problem, optimizer, task)
    found, right = FirstOrder(1)(problem, optimizer, outer, task).inner, adapt(problem, optimizer, outer, task, 1)
    assert (found["bias"] - right["bias"]).abs() > 0.1


@pytest.mark.parametrize("optimizer", [SGD(0.1), MetaSGD(0.1)])
@each_estimator
def test_a_warm_start_leaves_nothing_to_learn_where_init_alone_knew_the_outer_variable(estimator, optimizer):
    with pytest.raises(InputError) as raised:
        check(estimator, BOWL, optimizer, TASK, {"theta": draw(3)})
    assert str(raised.value) == (
        "Bowl: neither loss depends on the outer variable (with a warm start, its init does not count), so there is "
        "nothing to learn; use the argument `outer` in init, inner_loss or outer_loss"
    )


@pytest.mark.parametrize(("name", "estimator"), list(product(["ANIL", "ThetaPhi"], EACH)))
def test_a_warm_start_is_fine_where_a_loss_knows_the_outer_variable(name, estimator):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    check(estimator, problem, SGD(lr), task, problem.init(problem.outer(), task))


class Fixed(Problem):
    """Without an outer variable."""

    def init(self, outer, task):
        return task

    def inner_loss(self, inner, outer, task, step):
        return inner.square().sum()

    def outer_loss(self, inner, outer, task):
        return inner.sum()


def test_a_problem_without_an_outer_variable_may_learn_the_rates():
    check(Unrolled(2), Fixed(), MetaSGD(0.1), draw(3))
    with pytest.raises(InputError, match=r"^Fixed: neither loss depends on the outer variable, so there is nothing"):
        check(Unrolled(2), Fixed(), SGD(0.1), draw(3))


def test_an_outer_variable_that_is_not_used_is_told_beside_learned_rates_too():
    class Unused(Bowl):
        def init(self, outer, task):
            return {"theta": 0 * task.c}

    for optimizer in (SGD(0.1), MetaSGD(0.1)):
        with pytest.raises(InputError, match=r"^Unused: neither loss depends on the outer variable, so there is"):
            check(Unrolled(2), Unused(draw(3)), optimizer, TASK)


@pytest.mark.parametrize("method", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda loss: loss.reshape(1), r"shape \(1,\)"),
        (lambda loss: loss * torch.ones(2, 3), r"shape \(2, 3\)"),
        (lambda loss: loss.item(), "a float"),
        (lambda loss: None, "a NoneType"),
        (lambda loss: (loss, loss), "a tuple"),
    ],
)
@each_estimator
def test_a_loss_that_is_no_scalar_is_named(estimator, change, got, method):
    given = type("Given", (Bowl,), {method: lambda *args: change(getattr(Bowl, method)(*args))})
    with pytest.raises(InputError, match=rf"^Given\.{method} returned {got}; it must return a scalar tensor"):
        check(estimator, given(draw(3), 0.7), SGD(0.1), TASK)


@pytest.mark.parametrize(
    "loss", [lambda inner, outer: outer["theta"].sum(), lambda inner, outer: (inner["theta"].detach()).sum()]
)
@each_estimator
def test_an_inner_loss_that_ignores_the_inner_variable_is_told(estimator, loss):
    given = type("Given", (Bowl,), {"inner_loss": lambda self, inner, outer, task, step: loss(inner, outer)})
    with pytest.raises(InputError, match=r"^Given\.inner_loss does not depend on the inner variable.*argument `inner`"):
        check(estimator, given(draw(3)), SGD(0.1), TASK)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_an_inner_variable_an_inner_step_changes_nothing(optimizer):
    problem, tasks, lr, _ = PROBLEMS["LowRank"]
    made, task = OPTIMIZERS[optimizer](lr), task_at(tasks, 0)
    outer = outer_variable(problem, made, task)
    found, plain = (estimator(problem, made, outer, task) for estimator in (Unrolled(2), Direct()))
    assert found.inner == {}
    assert_close(found.gradient["problem"], plain.gradient["problem"], rtol=0, atol=0)


def test_an_init_that_is_no_tree_is_told():
    given = type("Given", (Bowl,), {"init": lambda self, outer, task: [outer["theta"]]})
    with pytest.raises(InputError, match=r"^Given\.init returned a list; it must return a tensor or a dictionary"):
        check(Unrolled(1), given(draw(3)), SGD(0.1), TASK)


class Mixed(Bowl):
    """θ starts at one outer parameter, and the inner loss knows another."""

    def __init__(self, theta):
        super().__init__(theta)
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def init(self, outer, task):
        return {"theta": outer["theta"]}

    def inner_loss(self, inner, outer, task, step):
        return self.outer_loss(inner, outer, task) + outer["weight"] * inner["theta"].square().sum()


@pytest.mark.parametrize(
    ("estimator", "still"),
    [(FirstOrder(2), "weight"), (Direct(), "weight"), (Implicit(2), "theta"), (JTg(1), "theta"), (F2SA(1), "theta")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_single_outer_parameter_that_will_not_move_is_told(estimator, still):
    problem = Mixed(draw(3))
    with pytest.warns(UserWarning, match=rf"{type(estimator).__name__} carries no derivative to {still} of Mixed"):
        check(estimator, problem, SGD(0.1), TASK)
    found = estimator(problem, SGD(0.1), outer_variable(problem, SGD(0.1), TASK), TASK).gradient["problem"]
    (other,) = {"weight", "theta"} - {still}
    assert found[still].abs().max() == 0 < found[other].abs().max()


def test_nothing_is_told_where_every_outer_parameter_moves(recwarn):
    check(Unrolled(2), Mixed(draw(3)), SGD(0.1), TASK)
    check(Truncated(2, 1), Mixed(draw(3)), SGD(0.1), TASK)
    assert not recwarn


class Gated(Bowl):
    """A bowl with a gate, a layer before its points, and a way to reach them past the argument ``outer``."""

    def __init__(self, theta, reach):
        super().__init__(theta)
        self.gate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.unused = nn.Parameter(torch.zeros(2))
        self.reach = reach

    def init(self, outer, task):
        return {"theta": outer["theta"] + self.reach(self, "init", outer)}

    def inner_loss(self, inner, outer, task, step):
        return (
            super().inner_loss(inner, outer, task, step)
            + self.reach(self, f"inner {step}", outer) * inner["theta"].square().sum()
        )

    def outer_loss(self, inner, outer, task):
        return super().outer_loss(inner, outer, task) * (1 + outer["gate"].exp()) + self.reach(self, "outer", outer)


@pytest.mark.parametrize("place", ["init", "inner 0", "inner 1", "outer"])
@pytest.mark.parametrize(
    "estimator", [Unrolled(2), Unrolled(5), Implicit(2)], ids=lambda estimator: type(estimator).__name__
)
def test_an_outer_parameter_that_is_reached_past_the_argument_is_named(estimator, place):
    kept = []  # not registered: what it holds is reached all the same

    def reach(self, now, outer):
        return self.layer(outer["theta"]).square().sum() + kept[0].gate if now == place else 0.0

    problem = Gated(draw(3), reach)
    kept.append(problem)
    with pytest.raises(InputError) as raised:
        check(estimator, problem, SGD(0.1), TASK)
    assert str(raised.value) == (
        "Gated: its init or losses reach the outer parameter(s) gate, layer.bias, layer.weight by another way than the "
        "argument `outer`, so these would never learn; use the values in `outer`, such as outer['gate']; for a "
        "network, metalit.autodiff.call(network, parameters, x) takes them by the network's own names; for a "
        "constant, use .detach() or requires_grad_(False)"
    )


def test_outer_parameters_may_be_unused_frozen_detached_or_called_with_the_argument():
    def reach(self, now, outer):
        layer = {name.removeprefix("layer."): value for name, value in outer.items() if name.startswith("layer.")}
        return call(self.layer, layer, outer["theta"]).square().sum() + self.gate.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Unrolled(2), Gated(draw(3), reach), SGD(0.1), TASK)
        frozen = Gated(draw(3), lambda self, now, outer: self.layer(outer["theta"]).sum())
        frozen.layer.requires_grad_(False)
        check(Unrolled(2), frozen, SGD(0.1), TASK)


def test_a_loss_that_holds_the_network_itself_is_refused():
    network = nn.Linear(2, 1, dtype=torch.float64)

    class Decayed(nn.Module):
        def forward(self, prediction, target):
            return (prediction - target).square().mean(1) + network.weight.square().sum()

    points = Points(draw(5, 2), draw(5, 1))
    with pytest.raises(
        InputError, match=r"^FewShot: its init or losses reach the outer parameter\(s\) weight by anoth"
    ):
        check(Unrolled(1), FewShot(network, Decayed()), SGD(0.1), Task(points, points, torch.tensor(0)))


def test_parameters_in_a_plain_list_are_told_of():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(2, 3, dtype=torch.float64), nn.Tanh()]
            self.out = nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.layers[1](self.layers[0](x)))

    points = Points(draw(5, 2), draw(5, 1))
    with pytest.warns(UserWarning, match=r"^FewShot: its init or losses use 2 parameter\(s\) that are not registered"):
        check(Unrolled(1), FewShot(Listed()), SGD(0.1), Task(points, points, torch.tensor(0)))


@pytest.mark.parametrize(("value", "kind"), [(1.0, "float"), ([1.0], "list"), (None, "NoneType")])
def test_an_inner_variable_whose_leaves_are_no_tensors_is_told(value, kind):
    class Given(Bowl):
        def init(self, outer, task):
            return {**outer, "rate": {"now": value}}

    with pytest.raises(InputError, match=rf"^Given\.init returned a {kind} at 'rate\.now'; all leaves"):
        check(Unrolled(1), Given(draw(3)), SGD(0.1), TASK)


@pytest.mark.parametrize("where", ["init", "outer"])
def test_complex_numbers_are_refused(where):
    class Given(Bowl):
        def init(self, outer, task):
            return {"theta": outer["theta"].to(torch.complex128) if where == "init" else outer["theta"].real}

    theta = draw(3) if where == "init" else draw(3).to(torch.complex128)
    with pytest.raises(InputError, match=r"^problem: its (inner|outer) variable holds complex numbers \(theta is of"):
        check(Unrolled(1), Given(theta), SGD(0.1), TASK)
