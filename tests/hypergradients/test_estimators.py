import copy
import inspect

import pytest
import torch
from cases import (
    CASES,
    KINDS,
    OPTIMIZERS,
    PROBLEMS,
    Bowl,
    BowlTask,
    bowls,
    draw,
    regression_tasks,
    task_at,
)
from torch import nn
from torch.func import grad
from torch.testing import assert_close

from metalit import hypergradients, inner, linsolve, problems
from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.hypergradients import (
    F2SA,
    Direct,
    FiniteDifference,
    FirstOrder,
    Hypergradient,
    Implicit,
    JTg,
    Reptile,
    Truncated,
    Unrolled,
    over_tasks,
)
from metalit.inner import SGD, InnerOptimizer, MetaSGD, Newton
from metalit.linsolve import CG, LinearSolver, Neumann, NormalCG, Nystrom
from metalit.networks import MLP
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot
from metalit.tree import flatten, leaves, norm, tree_map

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_kind = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)


def shipped(package, base):
    kinds = (kind for _, kind in inspect.getmembers(package, inspect.isclass) if issubclass(kind, base))
    return {kind for kind in kinds if not inspect.isabstract(kind)}


def test_everything_that_is_shipped_is_in_the_table():
    assert {kind for case in CASES for kind in case.kinds} >= {
        *shipped(problems, Problem),
        *shipped(inner, InnerOptimizer),
        *shipped(hypergradients, Hypergradient),
        *shipped(linsolve, LinearSolver),
    }
    assert {case.problem_name for case in CASES} == set(PROBLEMS)
    assert {case.optimizer_name for case in CASES} == set(OPTIMIZERS)


@each_case
def test_estimate_is_the_answer_by_hand_from_init_and_from_a_warm_start(case):
    task, sizes = task_at(case.tasks, 1), []
    for start in (None, task_at(case.starts, 1)):
        found, expected = case.estimate(task, start), case.answer(task, start)
        for part in ("loss", "gradient", "inner"):
            assert_close(getattr(found, part), getattr(expected, part), rtol=1e-11, atol=1e-12)
        sizes.append([norm(branch) for branch in found.gradient.values() if dict(leaves(branch))])
    # an estimator that is valid teaches all that there is to learn
    assert torch.tensor(sizes).amax(0).min() > 1e-4


@each_kind
@pytest.mark.parametrize("warm", [False, True])
def test_over_tasks_is_the_mean_of_the_answers(case, warm):
    starts = case.starts if warm else None
    found = over_tasks(case.hypergradient, case.problem, case.optimizer, case.outer, case.tasks, starts)
    each = [case.answer(task_at(case.tasks, index), task_at(starts, index)) for index in range(3)]
    assert_close(found.loss, torch.stack([one.loss for one in each]).mean(), rtol=1e-11, atol=1e-12)
    mean = tree_map(lambda *values: torch.stack(values).mean(0), *(one.gradient for one in each))
    assert_close(found.gradient, mean, rtol=1e-11, atol=1e-12)
    stacked = tree_map(lambda *values: torch.stack(values), *(one.inner for one in each))
    assert_close(found.inner, stacked, rtol=1e-11, atol=1e-12)


@each_kind
def test_nothing_is_changed_or_accumulated(case):
    problem, task = copy.deepcopy(case.problem), task_at(case.tasks, 0)
    for parameter in problem.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    start = task_at(case.starts, 0)
    before = copy.deepcopy((problem.state_dict(), task, start))
    case.hypergradient(problem, case.optimizer, outer_variable(problem, case.optimizer, task), task, start)
    assert_close(dict(problem.state_dict()), dict(before[0]), rtol=0, atol=0)
    assert_close((task, start), before[1:], rtol=0, atol=0)
    assert all(bool((parameter.grad == 7).all()) for parameter in problem.parameters())


class LinearInside(Bowl):
    def inner_loss(self, inner, outer, task, step):
        return task.c @ inner["theta"]


@pytest.mark.parametrize(("kind", "equal"), [(LinearInside, True), (Bowl, False)])
@pytest.mark.parametrize("optimizer", [SGD(0.3), MetaSGD(0.3)])
def test_first_order_is_second_order_where_the_inner_loss_is_linear_alone(kind, equal, optimizer):
    problem, task = kind(draw(4, seed=4)), task_at(bowls(4), 1)
    outer = outer_variable(problem, optimizer, task)
    first, second = (flatten(order(3)(problem, optimizer, outer, task).gradient) for order in (FirstOrder, Unrolled))
    assert (first - second).abs().max() < 1e-13 if equal else (first - second).abs().max() > 1e-2


EACH = [
    *(Unrolled(2), Truncated(2, 1), FiniteDifference(2), FirstOrder(2), Implicit(2), JTg(2), F2SA(2), Reptile(2)),
    Direct(),
]


@pytest.mark.parametrize("estimator", EACH, ids=lambda estimator: type(estimator).__name__)
def test_warm_start_is_a_constant_even_if_it_depends_on_the_outer_variable(estimator):
    task, problem, optimizer = task_at(bowls(3), 0), Bowl(draw(3, seed=4), 0.7), SGD(0.2)
    start = {"theta": draw(3, seed=5)}

    def loss(theta, scale):
        outer = {"problem": {"theta": theta}, "optimizer": {}}
        return estimator(problem, optimizer, outer, task, {"theta": scale * start["theta"]}).loss

    theta, one = draw(3, seed=4), torch.ones((), dtype=torch.float64)
    assert loss(theta, 2 * one) != loss(theta, one)
    assert grad(loss, argnums=1)(theta, one) == 0


@pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2), Truncated(2, 1)])
def test_warm_start_where_init_would_start_differs_in_the_gradient_of_init_alone(estimator):
    task, problem, optimizer = task_at(bowls(3), 0), Bowl(draw(3, seed=4)), MetaSGD(0.2)
    outer = tree_map(torch.Tensor.detach, outer_variable(problem, optimizer, task))
    start = {"theta": outer["problem"]["theta"]}
    cold, warm = (estimator(problem, optimizer, outer, task, given) for given in (None, start))
    assert_close(warm.inner, cold.inner, rtol=0, atol=1e-14)
    assert_close(warm.gradient["optimizer"], cold.gradient["optimizer"], rtol=0, atol=1e-14)
    assert norm(warm.gradient["problem"]) == 0 < norm(cold.gradient["problem"])


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
    tasks = bowls(2)
    broken = BowlTask(tasks.A, torch.cat([tasks.c[:2], torch.full((1, 2), torch.nan, dtype=torch.float64)]))
    problem, optimizer = Bowl(draw(2, seed=4)), SGD(0.1)
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
        (lambda: Unrolled(2, [0.5, 0.25, 0.25]), "Unrolled: weights=[0.5, 0.25, 0.25] must be 2 numbers"),
        (
            lambda: Unrolled(2, (0.5, 0.4)),
            "Unrolled: weights=[0.5, 0.4] must be 2 numbers, one for each inner step, that sum to 1",
        ),
        (lambda: Unrolled(1, []), "Unrolled: weights=[] "),
        (lambda: SGD(0.0), "SGD: lr=0.0 "),
        (lambda: SGD(-0.1), "SGD: lr=-0.1 "),
        (lambda: SGD(float("nan")), "SGD: lr=nan "),
        (lambda: MetaSGD(float("inf")), "MetaSGD: lr=inf "),
        (lambda: MetaSGD(0), "MetaSGD: lr=0 "),
        (lambda: Newton(-0.1), "Newton: damping=-0.1 must be a finite number"),
        (lambda: Newton(float("nan")), "Newton: damping=nan "),
        (lambda: Truncated(0), "Truncated: steps=0 "),
        (lambda: Truncated(3, 0), "Truncated: kept=0 must be between 1 and steps=3"),
        (lambda: Truncated(3, 4), "Truncated: kept=4 must be between 1 and steps=3"),
        (lambda: Implicit(0), "Implicit: steps=0 "),
        (lambda: Implicit(damping=-1.0), "Implicit: damping=-1.0 must be a finite number"),
        (lambda: Implicit(damping=float("nan")), "Implicit: damping=nan "),
        (lambda: Implicit(stationary=0.0), "Implicit: stationary=0.0 must be positive"),
        (lambda: JTg(0), "JTg: steps=0 "),
        (lambda: Reptile(0), "Reptile: steps=0 "),
        (lambda: Reptile(batch=0), "Reptile: batch=0 must be at least 1"),
        (lambda: F2SA(0), "F2SA: steps=0 "),
        (lambda: F2SA(weight=0.0), "F2SA: weight=0.0 must be a finite positive number"),
        (lambda: F2SA(weight=float("inf")), "F2SA: weight=inf "),
        (lambda: F2SA(stationary=0.0), "F2SA: stationary=0.0 must be positive"),
        (lambda: FiniteDifference(0), "FiniteDifference: steps=0 "),
        (lambda: FiniteDifference(epsilon=-0.1), "FiniteDifference: epsilon=-0.1 must be a finite positive number"),
        (lambda: FiniteDifference(epsilon=float("nan")), "FiniteDifference: epsilon=nan "),
        (lambda: NormalCG(0), "NormalCG: iterations=0 must be at least 1"),
        (lambda: NormalCG(tolerance=-1.0), "NormalCG: tolerance=-1.0 must not be negative"),
        (lambda: Nystrom(0), "Nystrom: rank=0 must be at least 1"),
        (lambda: Nystrom(rho=0.0), "Nystrom: rho=0.0 must be a finite positive number"),
        (lambda: Nystrom(rho=float("nan")), "Nystrom: rho=nan "),
        (lambda: CG(0), "CG: iterations=0 must be at least 1"),
        (lambda: CG(tolerance=-1e-9), "CG: tolerance=-1e-09 must not be negative"),
        (lambda: CG(tolerance=float("nan")), "CG: tolerance=nan "),
        (lambda: Neumann(0), "Neumann: terms=0 must be at least 1"),
        (lambda: Neumann(scale=0.0), "Neumann: scale=0.0 must be a finite positive number below 2/‖A‖"),
        (lambda: Neumann(scale=float("inf")), "Neumann: scale=inf "),
        (lambda: MLP([3]), "MLP: sizes=[3] "),
        (lambda: MLP([3, 0, 1]), "MLP: sizes=[3, 0, 1] "),
        (lambda: MLP([1, 2, 1], activation="Relu"), "MLP: activation='Relu' "),
        (lambda: MLP([1, 2, 1], activation="functional"), "MLP: activation='functional' "),
        (lambda: MLP([1, 2, 1], norm="GroupNorm"), "MLP: norm='GroupNorm' must be 'LayerNorm' or 'BatchNorm1d'"),
        (lambda: MLP([1, 2, 1], context=-1), "MLP: context=-1 must be a number of entries"),
        (lambda: FewShot(nn.Linear(2, 1), proximal=-0.1), "FewShot: proximal=-0.1 must be a finite number"),
        (lambda: FewShot(nn.Linear(2, 1), proximal=float("nan")), "FewShot: proximal=nan "),
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
    normed = MLP([1, 2, 3, 1], norm="BatchNorm1d")
    assert [name for name, _ in normed.named_children()][:3] == ["hidden1", "norm1", "activation1"]
    assert normed.norm2.num_features == 3


@pytest.mark.parametrize("shape", [(5, 2), (2,), (3, 4, 2)])
def test_the_context_of_an_mlp_is_joined_to_every_input(shape):
    network, x = MLP([2, 4, 1], "Tanh", context=3).double(), draw(*shape)
    assert torch.equal(network.context, torch.zeros(3))
    network.context.data = draw(3, seed=2)
    weight = network.hidden1.weight
    hidden = x @ weight[:, :2].T + weight[:, 2:] @ network.context + network.hidden1.bias
    assert_close(network(x), network.out(hidden.tanh()), rtol=1e-12, atol=1e-14)


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
