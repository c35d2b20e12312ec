from itertools import pairwise

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, tables, task_at
from torch.func import grad, jacrev
from torch.linalg import inv, solve
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.hypergradients import Implicit, Unrolled, for_each_task, over_tasks
from metalit.inner import Newton
from metalit.linsolve import Dense
from metalit.problems import Logistic, ThetaPhi
from metalit.tree import flatten, leaves, norm, tree_map


def solved(problem, task, steps=1, damping=0.0):
    return adapt(problem, Newton(damping), outer_variable(problem, Newton(), task), task, steps)


QUADRATIC = ("iMAML", "Ridge", "ANIL", "MAML", "LowRank, exact")
OF_CLASSES = ("MAML, classes",)  # a cross-entropy


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.startswith(QUADRATIC) and name not in OF_CLASSES])
def test_one_step_solves_what_is_quadratic(name):
    problem, tasks, *_ = PROBLEMS[name]
    task, own = task_at(tasks, 0), problem.outer()
    found = solved(problem, task)
    slope = grad(problem.inner_loss)(found, own, task, 0)
    assert norm(slope) < 1e-12
    again = adapt(problem, Newton(), {"problem": own, "optimizer": {}}, task, 1, found)
    if "minibatches" not in name:
        assert_close(again, found, rtol=1e-11, atol=1e-12)
    assert [key for key, _ in leaves(found)] == [key for key, _ in leaves(problem.init(own, task))]


@pytest.mark.parametrize("dimension", [1, 4])
@pytest.mark.parametrize("damping", [0.0, 0.3, 2.0])
def test_a_damped_step_is_the_closed_form(dimension, damping):
    task, theta = task_at(bowls(dimension), 1), draw(dimension, seed=4)
    K = inv(task.A + damping * torch.eye(dimension, dtype=torch.float64))
    for steps in (1, 3):
        keep = torch.linalg.matrix_power(torch.eye(dimension, dtype=torch.float64) - K @ task.A, steps)
        expected = task.c + keep @ (theta - task.c)
        assert_close(solved(Bowl(theta), task, steps, damping)["theta"], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["iMAML in 3-d", "ANIL", "Ridge in 1-d", "Ridge", "LowRank, exact, missing"])
def test_its_derivative_is_that_of_the_implicit_function_also_under_vmap(name):
    problem, tasks, *_ = PROBLEMS[name]
    outer = outer_variable(problem, Newton(), task_at(tasks, 0))
    unrolled, implicit = (
        over_tasks(kind, problem, Newton(), outer, tasks) for kind in (Unrolled(1), Implicit(1, Dense()))
    )
    assert norm(implicit.gradient) > 1e-3
    assert_close(unrolled.inner, implicit.inner, rtol=1e-12, atol=1e-13)
    # what Implicit does not carry: where an inner variable starts does not matter to its solution
    assert_close(unrolled.gradient, implicit.gradient, rtol=1e-10, atol=1e-11)


def test_its_jacobian_is_minus_the_inverse_hessian_and_the_mixed_derivative():
    problem, tasks, _, hand = PROBLEMS["Ridge"]
    task, phi = task_at(tasks, 1), PROBLEMS["Ridge"].problem.log_penalty.detach()

    def best(phi, task):
        return flatten(adapt(problem, Newton(), {"problem": {"log_penalty": phi}, "optimizer": {}}, task, 1))

    theta = best(phi, task)
    expected = -solve(hand(problem, task).H(theta, phi, 0), hand(problem, task).J(theta, phi, 0))
    assert_close(jacrev(best)(phi, task), expected, rtol=1e-11, atol=1e-12)
    together = for_each_task(jacrev(best), phi, tasks)
    assert_close(together[1], expected, rtol=1e-11, atol=1e-12)
    assert_close(together[2], jacrev(best)(phi, task_at(tasks, 2)), rtol=1e-11, atol=1e-12)


def test_it_converges_quadratically_on_logistic_regression():
    problem, task = Logistic(3, log_penalty=-2.0).double(), task_at(tables(3, classes=2), 0)
    own = problem.outer()
    slopes = [norm(grad(problem.inner_loss)(solved(problem, task, steps), own, task, 0)) for steps in range(7)]
    assert slopes[-1] < 1e-13
    assert all(after < 10 * before**2 + 1e-14 for before, after in pairwise(slopes[1:]))


def test_the_value_of_a_step_on_a_quartic_in_one_dimension():
    class Quartic(Bowl):
        def inner_loss(self, inner, outer, task, step):
            return outer["theta"].sum() * inner["theta"].pow(4).sum()

        def init(self, outer, task):
            return {"theta": task}

    theta = torch.tensor([3.0], dtype=torch.float64)
    problem = Quartic(torch.tensor([0.7], dtype=torch.float64))
    # θ − 4aθ³/(12aθ² + d)
    found = solved(problem, theta, damping=0.5)["theta"]
    assert_close(found, theta - 4 * 0.7 * 27 / (12 * 0.7 * 9 + 0.5), rtol=1e-14, atol=0)


def test_a_singular_hessian_raises_nothing_and_damping_mends_it():
    flat = ThetaPhi([0.3, 0.4], [0.0]).double()
    assert not solved(flat, torch.tensor(0)).isfinite().all()
    assert_close(solved(flat, torch.tensor(0), damping=0.1), flat.theta, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 50])
def test_what_is_singular_depends_on_the_size(size):
    def slope_of(least):
        return lambda inner: {"theta": inner["theta"] * torch.cat([torch.ones(size - 1), least.reshape(1)])}

    theta, eps = {"theta": torch.zeros(size)}, torch.tensor(torch.finfo(torch.float32).eps)
    Newton().check(slope_of(1.1 * size * eps), theta)
    with pytest.raises(InputError, match=f"singular, of rank {size - 1} with {size} entries"):
        Newton().check(slope_of(0.9 * size * eps), theta)


def test_each_task_of_a_batch_is_solved_by_itself():
    problem, tasks, *_ = PROBLEMS["Cleaning"]
    outer = tree_map(torch.Tensor.detach, outer_variable(problem, Newton(), task_at(tasks, 0)))
    together = for_each_task(lambda outer, task: adapt(problem, Newton(), outer, task, 6), outer, tasks)
    for index in range(3):
        alone = adapt(problem, Newton(), outer, task_at(tasks, index), 6)
        assert_close(task_at(together, index), alone, rtol=1e-11, atol=1e-12)
        assert norm(grad(problem.inner_loss)(alone, outer["problem"], task_at(tasks, index), 0)) < 1e-10
