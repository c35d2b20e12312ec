import math

import pytest
import torch
from cases import each_of, linear, regression_tasks, task_at
from sklearn.linear_model import Ridge as Reference
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close

from metalit.errors import InputError
from metalit.keys import fold
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import RidgeHead
from metalit.tree import flatten

LEARNT = 0.4


def head(inputs=3, features=4, intercept=True, log_penalty=LEARNT, network=None):
    return RidgeHead(network or linear(inputs, features), log_penalty, intercept).double()


def as_float(task):
    return Task(*(part._replace(x=part.x.float(), y=part.y.float()) for part in task[:2]), task.key)


@pytest.mark.parametrize("ragged", [False, True], ids=["all rows", "ragged"])
@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "none"])
@pytest.mark.parametrize("features", [2, 5, 9], ids=["few features", "as many as rows", "fewer rows: Woodbury"])
def test_it_is_the_ridge_of_scikit_learn(features, intercept, ragged):
    problem, tasks = head(3, features, intercept), regression_tasks(3, 2, ragged)
    for index in range(3):
        task = task_at(tasks, index)
        inner = problem.init(problem.outer(), task)
        real = slice(None) if task.support.mask is None else task.support.mask
        phi = problem.network(task.support.x).detach()
        expected = Reference(alpha=math.exp(LEARNT), fit_intercept=intercept)
        expected.fit(phi[real], task.support.y[real])
        assert_close(inner["weight"].T, torch.tensor(expected.coef_), rtol=1e-10, atol=1e-12)
        assert inner.keys() == ({"weight", "bias"} if intercept else {"weight"})
        found = problem.predict(inner, problem.outer(), task.query.x)
        answers = torch.tensor(expected.predict(problem.network(task.query.x).detach()))
        assert_close(found, answers, rtol=1e-10, atol=1e-12)


def test_both_systems_have_one_solution():
    # 5 features of 5 rows are solved for as features; one of 0 more makes it the system of rows
    inputs, task = linear(3, 5), task_at(regression_tasks(3, 2), 0)
    wider = torch.nn.Sequential(inputs, torch.nn.ConstantPad1d((0, 1), 0.0))
    found = [head(network=network) for network in (inputs, wider)]
    few, many = (each.init(each.outer(), task)["weight"] for each in found)
    assert_close(many[:5], few, rtol=1e-11, atol=1e-13)
    assert many[5].abs().max() == 0


def test_its_derivative_by_the_penalty():
    problem, task = head(3, 4, intercept=False), task_at(regression_tasks(3, 2), 0)
    outer = {name: value.detach() for name, value in problem.outer().items()}
    phi, penalty = problem.network(task.support.x).detach(), outer["log_penalty"].exp()
    found = jacrev(lambda value: problem.init(outer | {"log_penalty": value.log()}, task)["weight"])(penalty)
    matrix = phi.T @ phi + penalty * torch.eye(4, dtype=phi.dtype)
    assert_close(found, -torch.linalg.solve(matrix, problem.init(outer, task)["weight"]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("features", [3, 8])
def test_the_inner_loss_has_no_slope_at_the_solution(features):
    problem, task = head(2, features), task_at(regression_tasks(2, 1, ragged=True), 0)
    outer = problem.outer()
    slope = grad(lambda inner: problem.inner_loss(inner, outer, task, 0))(problem.init(outer, task))
    assert flatten(slope).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 12])
def test_a_penalty_of_nothing_on_features_that_are_alike_gives_numbers_all_the_same(dtype, rows):
    # 3 columns that are one, times 1000, in either system; exp(-90) is 0 in single precision
    problem = RidgeHead(linear(1, 3), intercept=True).to(dtype)
    with torch.no_grad():
        problem.network.weight.fill_(1000.0)
        problem.network.bias.zero_()
        problem.log_penalty.fill_(-90.0)
    x = torch.linspace(-1, 1, rows, dtype=dtype)[:, None].repeat_interleave(2, 0)
    task = Task(Points(x, x), Points(x, x), torch.tensor(0))

    def loss(outer):
        return problem.outer_loss(problem.init(outer, task), outer, task)

    outer = {name: value.detach() for name, value in problem.outer().items()}
    gradient = grad(loss)(outer)
    assert flatten(gradient).isfinite().all()
    assert loss(outer) < 1e-6


def test_features_of_nothing_give_the_level():
    problem, task = head(), task_at(regression_tasks(3, 2), 0)
    with torch.no_grad():
        problem.network.weight.zero_()
        problem.log_penalty.fill_(-1000.0)
    inner = problem.init(problem.outer(), task)
    assert_close(inner["bias"], task.support.y.mean(0), rtol=1e-12, atol=0)


def test_all_tasks_at_once_are_one_after_the_other():
    problem, tasks = head(2, 9), regression_tasks(2, 1, ragged=True)
    outer = problem.outer()

    def loss(task):
        return problem.outer_loss(problem.init(outer, task), outer, task)

    each = torch.stack([loss(task_at(tasks, index)) for index in range(3)])
    assert_close(vmap(loss, (each_of(tasks),))(tasks), each, rtol=1e-13, atol=0)


def test_in_half_precision_it_is_solved_in_double():
    problem, task = head(), task_at(regression_tasks(3, 2), 0)
    half = RidgeHead(linear(3, 4).bfloat16(), LEARNT, intercept=True).bfloat16()
    rounded = Task(*(part._replace(x=part.x.bfloat16(), y=part.y.bfloat16()) for part in task[:2]), task.key)
    found, expected = half.init(half.outer(), rounded), problem.init(problem.outer(), task)
    assert found["weight"].dtype == torch.bfloat16
    assert_close(found["weight"].double(), expected["weight"], rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        problem.float()
        mixed = problem.init(problem.outer(), as_float(task))
    assert mixed["weight"].dtype == torch.float32
    assert_close(mixed["weight"].double(), expected["weight"], rtol=0.05, atol=0.02)


def test_a_solution_whose_large_entries_cancel_holds_under_autocast():
    x = torch.linspace(-1, 1, 6)[:, None]
    task = Task(Points(torch.cat([x**power for power in range(6)], 1), x.sign()), None, torch.tensor(0))
    problem = RidgeHead(torch.nn.Identity(), log_penalty=-25.0)
    with torch.autocast("cpu", torch.bfloat16):
        inner = problem.init(problem.outer(), task)
        found = problem.predict(inner, problem.outer(), task.support.x)
    assert inner["weight"].abs().max() > 5
    assert_close(found, task.support.y, rtol=0, atol=1e-4)


def test_dropout_follows_the_key_in_support_and_query():
    problem, task = head(network=MLP([3, 6, 4], dropout=0.5).double()), task_at(regression_tasks(3, 2), 0)
    outer = problem.outer()
    first, again = (problem.init(outer, task)["weight"] for _ in range(2))
    other = problem.init(outer, task._replace(key=fold(task.key, 1)))["weight"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    inner = problem.init(outer, task)
    assert torch.equal(problem.outer_loss(inner, outer, task), problem.outer_loss(inner, outer, task))


def begun(problem, task):
    problem.check(task)
    return problem.init(problem.outer(), task)


def refused(problem, task):
    with pytest.raises(InputError) as raised:
        begun(problem, task)
    return str(raised.value)


def test_what_cannot_be_is_said():
    task = task_at(regression_tasks(3, 2), 0)
    classes = Task(*(Points(part.x, torch.zeros(len(part.x), dtype=torch.long)) for part in task[:2]), task.key)
    assert refused(head(), classes) == (
        "data: RidgeHead predicts real numbers, [rows, outputs], and the targets are [5] of torch.int64; for classes "
        "there are FewShot, Prototypes and RidgeHead(classes=True)"
    )
    assert refused(head(), "nothing").startswith("data: RidgeHead is posed on Task, not on str")
    flat = head(network=torch.nn.Flatten(0))
    assert refused(flat, task) == (
        "network: it returned shape [15]; it must return the features of each row, [rows, features]"
    )
    normed = head(network=torch.nn.Sequential(linear(2, 3), torch.nn.BatchNorm1d(3)).double())
    assert "BatchNorm would mix" in refused(normed, task_at(regression_tasks(2, 1, ragged=True), 0))
    for value in (float("nan"), float("inf"), 81.0):
        with pytest.raises(InputError, match="must be finite, and 80"):
            RidgeHead(linear(1, 1), value)
