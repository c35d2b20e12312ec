import copy
import inspect
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    Quadratic,
    QuadraticTask,
    Seed,
    draw,
    fomaml,
    maml,
    quadratic_tasks,
    regression_tasks,
    task_at,
)
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

from metalit import hypergradients, inner, problems
from metalit.adapt import adapt, outer_variable
from metalit.autodiff import hessian_products
from metalit.errors import InputError
from metalit.hypergradients import FirstOrder, Hypergradient, Unrolled, over_tasks
from metalit.inner import SGD, InnerOptimizer, MetaSGD
from metalit.networks import MLP
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot
from metalit.tree import flatten, leaves, norm, tree_map

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def shipped(package, base):
    exported = (getattr(package, name) for name in package.__all__)
    return {
        kind for kind in exported if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def test_every_shipped_triple_has_a_row():
    rows = {(type(case.problem), type(case.optimizer), type(case.hypergradient)) for case in CASES}
    triples = product(
        shipped(problems, Problem), shipped(inner, InnerOptimizer), shipped(hypergradients, Hypergradient)
    )
    assert set(triples) - rows == set()


@each_case
def test_estimate_is_the_closed_form(case):
    for index in range(3):
        task = task_at(case.tasks, index)
        found, expected = case.estimate(task), case.answer(case, task)
        for part in ("loss", "gradient", "inner"):
            assert_close(getattr(found, part), getattr(expected, part), rtol=1e-11, atol=1e-12)


@each_case
def test_over_tasks_is_a_loop_over_tasks(case):
    found = over_tasks(case.hypergradient, case.problem, case.optimizer, case.outer, case.tasks)
    each = [case.estimate(task_at(case.tasks, index)) for index in range(3)]
    assert_close(found.loss, torch.stack([one.loss for one in each]).mean(), rtol=1e-12, atol=1e-12)
    mean = tree_map(lambda *values: torch.stack(values).mean(0), *(one.gradient for one in each))
    assert_close(found.gradient, mean, rtol=1e-12, atol=1e-12)
    stacked = tree_map(lambda *values: torch.stack(values), *(one.inner for one in each))
    assert_close(found.inner, stacked, rtol=1e-12, atol=1e-12)


@each_case
def test_nothing_is_changed_or_accumulated(case):
    problem, task = copy.deepcopy(case.problem), task_at(case.tasks, 0)
    for parameter in problem.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(problem.state_dict())
    case.hypergradient(problem, case.optimizer, outer_variable(problem, case.optimizer, task), task)
    assert_close(dict(problem.state_dict()), dict(before), rtol=0, atol=0)
    assert all(bool((parameter.grad == 7).all()) for parameter in problem.parameters())


def joint(problem, outer, tasks):
    losses = vmap(problem.outer_loss, in_dims=(None, None, 0))
    return {"problem": grad(lambda own: losses(problem.init(own, None), own, tasks).mean())(outer["problem"])}


LR, STEPS = 0.25, 2
ALGORITHMS = {
    "MAML": (lambda A: maml(A, LR, STEPS), lambda *given: over_tasks(Unrolled(STEPS), *given).gradient),
    "FOMAML": (lambda A: fomaml(A, LR, STEPS), lambda *given: over_tasks(FirstOrder(STEPS), *given).gradient),
    "joint": (lambda A: A, lambda problem, optimizer, outer, tasks: joint(problem, outer, tasks)),
}


@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize("at", ALGORITHMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_stops_at_its_own_point_alone(algorithm, at, dimension):
    tasks = quadratic_tasks(dimension, count=4)
    B = torch.stack([ALGORITHMS[at][0](A) for A in tasks.A])
    point = torch.linalg.solve(B.sum(0), (B @ tasks.c[..., None]).sum(0)).squeeze(-1)
    problem, optimizer = Quadratic(point), SGD(LR)
    outer = outer_variable(problem, optimizer, task_at(tasks, 0))
    size = norm(ALGORITHMS[algorithm][1](problem, optimizer, outer, tasks)["problem"])
    assert size < 1e-13 if algorithm == at else size > 1e-2


class LinearInside(Quadratic):
    def inner_loss(self, inner, outer, task, step):
        return task.c @ inner["theta"]


@pytest.mark.parametrize(("kind", "equal"), [(LinearInside, True), (Quadratic, False)])
@pytest.mark.parametrize("optimizer", [SGD(0.3), MetaSGD(0.3)])
def test_first_order_is_second_order_where_the_inner_loss_is_linear_alone(kind, equal, optimizer):
    problem, task = kind(draw(4, seed=4)), task_at(quadratic_tasks(4), 1)
    outer = outer_variable(problem, optimizer, task)
    first, second = (flatten(order(3)(problem, optimizer, outer, task).gradient) for order in (FirstOrder, Unrolled))
    assert (first - second).abs().max() < 1e-13 if equal else (first - second).abs().max() > 1e-2


def test_one_step_indirect_term_is_the_scaled_seed_product():
    lr, theta = 0.03, draw(3, seed=5)
    problem, optimizer = Seed(draw(4, seed=6)), SGD(lr)
    outer = outer_variable(problem, optimizer, theta)
    phi = outer["problem"]["phi"].detach()
    second, first = (
        order(1)(problem, optimizer, outer, theta).gradient["problem"]["phi"] for order in (Unrolled, FirstOrder)
    )

    def f(theta, phi):
        return problem.outer_loss(theta, {"phi": phi}, theta)

    _, product = hessian_products(f, theta, phi, grad(f)(theta, phi))
    assert_close(second - first, -lr * (1 - 2 * lr * phi @ phi) * product, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2)])
def test_warm_start_is_a_constant(estimator):
    task, problem, optimizer = task_at(quadratic_tasks(3), 0), Quadratic(draw(3, seed=4)), MetaSGD(0.2)
    outer = tree_map(torch.Tensor.detach, outer_variable(problem, optimizer, task))
    start = {"theta": outer["problem"]["theta"]}
    cold, warm = (estimator(problem, optimizer, outer, task, given) for given in (None, start))
    assert_close(warm.inner, cold.inner, rtol=0, atol=1e-14)
    assert_close(warm.gradient["optimizer"], cold.gradient["optimizer"], rtol=0, atol=1e-14)
    assert norm(warm.gradient["problem"]) == 0 < norm(cold.gradient["problem"])


@pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2)])
def test_warm_start_that_depends_on_the_outer_variable_is_a_constant(estimator):
    task, problem, optimizer = task_at(quadratic_tasks(3), 0), Quadratic(draw(3, seed=4)), SGD(0.2)

    def loss(theta):
        outer = {"problem": {"theta": theta}, "optimizer": {}}
        return estimator(problem, optimizer, outer, task, {"theta": 2 * theta}).loss

    theta = draw(3, seed=4)
    moved = adapt(problem, optimizer, {"problem": {}, "optimizer": {}}, task, 2, {"theta": 2 * theta})
    assert_close(loss(theta), problem.outer_loss(moved, {}, task), rtol=1e-14, atol=0)
    assert grad(loss)(theta).abs().max() == 0


def small_mlp(**settings):
    torch.manual_seed(0)
    return MLP([2, 4, 2], activation="Tanh", **settings).double()


def central_differences(fn, outer, h=1e-5):
    outer = tree_map(lambda value: value.detach().clone(), outer)
    slopes = tree_map(torch.zeros_like, outer)
    for (_, value), (_, slope) in zip(leaves(outer), leaves(slopes), strict=True):
        for index in range(value.numel()):
            entry = value.view(-1)[index]
            centre = entry.item()
            entry.fill_(centre + h)
            above = fn(outer)
            entry.fill_(centre - h)
            slope.view(-1)[index] = (above - fn(outer)) / (2 * h)
            entry.fill_(centre)
    return slopes


@pytest.mark.parametrize("optimizer", [SGD(0.4), MetaSGD(0.4)], ids=["SGD", "MetaSGD"])
@pytest.mark.parametrize("patterns", [["*"], ["out.*"], ["hidden*"]], ids=["MAML", "ANIL", "BOIL"])
def test_unrolled_agrees_with_central_differences(patterns, optimizer):
    problem, task = FewShot(small_mlp(), adapt=patterns), task_at(regression_tasks(2, 2), 0)
    outer = outer_variable(problem, optimizer)

    def loss(outer):
        inner = adapt(problem, optimizer, outer, task, 3)
        return problem.outer_loss(inner, outer["problem"], task)

    found = Unrolled(3)(problem, optimizer, outer, task)
    assert set(found.inner) == {
        name for name in outer["problem"] if patterns == ["*"] or name.startswith(patterns[0][:3])
    }
    assert_close(found.gradient, central_differences(loss, outer), rtol=0, atol=1e-9)


def test_multi_step_loss_agrees_with_central_differences():
    problem, optimizer, task = FewShot(small_mlp()), SGD(0.4), task_at(regression_tasks(2, 2), 0)
    outer, weights = outer_variable(problem, optimizer), [0.5, 0.2, 0.3]

    def loss(outer):
        after = (adapt(problem, optimizer, outer, task, step) for step in (1, 2, 3))
        return sum(
            w * problem.outer_loss(inner, outer["problem"], task) for w, inner in zip(weights, after, strict=True)
        )

    found = Unrolled(3, weights)(problem, optimizer, outer, task)
    assert_close(found.gradient, central_differences(loss, outer), rtol=0, atol=1e-9)


@pytest.mark.parametrize("adapted", ["", "out", "hidden"], ids=["MAML", "ANIL", "BOIL"])
def test_first_order_is_plain_pytorch_training_then_one_backward(adapted):
    network, task = small_mlp(), task_at(regression_tasks(2, 2), 0)
    problem = FewShot(network, adapt=[f"{adapted}*"])
    found = FirstOrder(3)(problem, SGD(0.4), outer_variable(problem, SGD(0.4)), task)
    tuned, loss = copy.deepcopy(network), nn.MSELoss()
    steps = torch.optim.SGD([value for name, value in tuned.named_parameters() if name.startswith(adapted)], lr=0.4)
    for _ in range(3):
        steps.zero_grad()
        loss(tuned(task.support.x), task.support.y).backward()
        steps.step()
    tuned.zero_grad()
    loss(tuned(task.query.x), task.query.y).backward()
    expected = {name: value.grad for name, value in tuned.named_parameters()}
    assert_close(found.gradient["problem"], expected, rtol=1e-11, atol=1e-12)


def test_absent_masks_pass_through_over_tasks_beside_given_ones():
    ragged, full = regression_tasks(2, 1, ragged=True), regression_tasks(2, 1)
    tasks = Task(Points(full.support.x, full.support.y), ragged.query, full.key)
    problem, optimizer = FewShot(nn.Linear(2, 1).double()), SGD(0.1)
    outer = outer_variable(problem, optimizer)
    losses = [Unrolled(1)(problem, optimizer, outer, task_at(tasks, index)).loss for index in range(3)]
    assert_close(over_tasks(Unrolled(1), problem, optimizer, outer, tasks).loss, sum(losses) / 3, rtol=1e-12, atol=0)


def test_a_nan_task_does_not_reach_its_neighbours():
    tasks = quadratic_tasks(2)
    broken = QuadraticTask(tasks.A, torch.cat([tasks.c[:2], torch.full((1, 2), torch.nan, dtype=torch.float64)]))
    problem, optimizer = Quadratic(draw(2, seed=4)), SGD(0.1)
    outer = outer_variable(problem, optimizer, task_at(tasks, 0))
    healthy, ill = (over_tasks(Unrolled(2), problem, optimizer, outer, given) for given in (tasks, broken))
    assert ill.loss.isnan()
    assert_close(ill.inner["theta"][:2], healthy.inner["theta"][:2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Unrolled(0), "Unrolled: steps=0 "),
        (lambda: Unrolled(steps=-2), "Unrolled: steps=-2 "),
        (lambda: FirstOrder(0), "FirstOrder: steps=0 "),
        (lambda: Unrolled(2, [0.5, 0.25, 0.25]), "Unrolled: weights=[0.5, 0.25, 0.25] must be steps=2 "),
        (lambda: Unrolled(2, (0.5, 0.4)), "Unrolled: weights=[0.5, 0.4] must be steps=2 numbers that sum to 1"),
        (lambda: Unrolled(1, []), "Unrolled: weights=[] "),
        (lambda: SGD(0.0), "SGD: lr=0.0 "),
        (lambda: SGD(-0.1), "SGD: lr=-0.1 "),
        (lambda: SGD(float("nan")), "SGD: lr=nan "),
        (lambda: MetaSGD(float("inf")), "MetaSGD: lr=inf "),
        (lambda: MetaSGD(0), "MetaSGD: lr=0 "),
        (lambda: MLP([3]), "MLP: sizes=[3] "),
        (lambda: MLP([3, 0, 1]), "MLP: sizes=[3, 0, 1] "),
        (lambda: MLP([1, 2, 1], activation="Relu"), "MLP: activation='Relu' "),
        (lambda: MLP([1, 2, 1], activation="functional"), "MLP: activation='functional' "),
    ],
)
def test_invalid_arguments_are_named_with_their_value(make, told):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value).startswith(told)


def test_valid_arguments_are_kept():
    assert Unrolled(3, [0.25, 0.25, 0.5]).weights == [0.25, 0.25, 0.5]
    assert [type(layer).__name__ for layer in MLP([1, 2, 1], "Tanh", dropout=0.2)] == [
        "Linear",
        "Tanh",
        "Dropout",
        "Linear",
    ]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Unrolled(2, [float("nan"), 0.5]), "weights"),
        (lambda: MLP([1, 2, 1], dropout=1.5), "dropout=1.5"),
        (lambda: MLP([1, 2, 1], activation="Linear"), "activation='Linear'"),
    ],
)
def test_values_that_only_look_like_numbers_or_names_raise(make, told):
    with pytest.raises(InputError, match=told):
        make()
