"""The fully first-order bilevel gradient beside the implicit one."""

from itertools import pairwise

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, task_at
from torch.linalg import inv
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.hypergradients import F2SA, Implicit, over_tasks
from metalit.inner import SGD, Newton
from metalit.linsolve import Dense
from metalit.tree import norm, tree_map

SOLVED = 300


def estimate(hypergradient, problem, optimizer, task, start=None):
    return hypergradient(problem, optimizer, outer_variable(problem, optimizer, task), task, start)


@pytest.mark.parametrize("dimension", [1, 3])
@pytest.mark.parametrize("weight", [1.0, 10.0, 1e4])
def test_on_a_quadratic_the_penalty_is_added_to_one_of_both_inverses(dimension, weight):
    # θ* − c = w K⁻¹(φ − c), θ_λ − c = w (K + A/λ)⁻¹(φ − c), K = A + wI
    proximal, task = 0.7, task_at(bowls(dimension), 1)
    problem, A = Bowl(draw(dimension, seed=4), proximal), task.A
    K = A + proximal * torch.eye(dimension, dtype=A.dtype)
    offset = problem.theta.detach() - task.c
    found = estimate(F2SA(SOLVED, weight), problem, SGD(0.25), task)
    expected = proximal**2 * inv(K) @ A @ inv(K + A / weight) @ offset
    assert_close(found.gradient["problem"]["theta"], expected, rtol=1e-9, atol=1e-10)
    assert_close(found.inner["theta"], task.c + proximal * inv(K) @ offset, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dimension", [1, 3])
def test_the_error_is_one_over_the_weight_times_its_constant(dimension):
    proximal, task = 0.7, task_at(bowls(dimension), 1)
    problem, A = Bowl(draw(dimension, seed=4), proximal), task.A
    K = A + proximal * torch.eye(dimension, dtype=A.dtype)
    constant = proximal**2 * inv(K) @ A @ inv(K) @ A @ inv(K) @ (problem.theta.detach() - task.c)
    right = estimate(Implicit(SOLVED, Dense()), problem, SGD(0.25), task).gradient["problem"]["theta"]
    for weight in (1e2, 1e3, 1e4):
        found = estimate(F2SA(SOLVED, weight), problem, SGD(0.25), task).gradient["problem"]["theta"]
        # the next term is smaller by ‖K⁻¹A‖/λ < 1/λ
        assert_close(weight * (right - found), constant, rtol=2 / weight, atol=1e-12 * weight**2)


@pytest.mark.parametrize("name", ["Ridge", "Logistic", "Cleaning", "ANIL"])
def test_it_tends_to_the_implicit_gradient_as_the_weight_grows(name):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    solved = adapt(problem, Newton(), outer_variable(problem, Newton(), task), task, 8)
    right = estimate(Implicit(1, Dense()), problem, SGD(lr), task, solved).gradient
    errors = []
    for weight in (1e3, 1e4, 1e5):
        found = estimate(F2SA(400, weight), problem, SGD(lr), task, solved).gradient
        errors.append(norm(tree_map(torch.sub, found, right)) / norm(right))
    assert errors[0] < 0.1
    for before, after in pairwise(errors):
        assert 8 < before / after < 12


def test_what_few_steps_leave_is_not_enlarged_by_the_weight():
    problem, tasks, lr, _ = PROBLEMS["iMAML in 3-d"]
    task = task_at(tasks, 0)
    near, far = (
        estimate(F2SA(3, weight), problem, SGD(lr), task).gradient["problem"]["theta"] for weight in (1e4, 1e6)
    )
    assert_close(near, far, rtol=1e-3, atol=1e-4)


class Clamped(Bowl):
    """An inner loss through an operation whose second derivative torch does not have."""

    def inner_loss(self, inner, outer, task, step):
        x = torch.stack([inner["theta"], outer["theta"]])
        return super().inner_loss(inner, outer, task, step) + 0.1 * torch.cdist(x, task.A).square().sum()


def test_no_second_derivative_is_taken():
    problem, tasks = Clamped(draw(3, seed=4), 0.7), bowls(3)
    outer = outer_variable(problem, SGD(0.1), task_at(tasks, 0))
    assert norm(over_tasks(F2SA(3), problem, SGD(0.1), outer, tasks).gradient["problem"]) > 0


def test_a_point_that_is_not_stationary_is_told():
    metrics = {"inner_grad_ratio": 0.01, "inner_grad_norm": 0.2}
    assert F2SA().warnings(metrics) == F2SA(stationary=0.3).warnings(metrics | {"inner_grad_ratio": 0.3}) == {}
    assert F2SA().warnings(metrics | {"inner_grad_ratio": 0.02}) == {
        "not stationary": "F2SA needs a stationary inner point, but the norm of the inner gradient is 0.2, 2 % of that "
        "at init; take more inner steps (hypergradient.steps), a larger inner lr or a warm start, or use Unrolled"
    }
    assert F2SA().warnings(metrics | {"inner_grad_ratio": float("nan")}).keys() == {"not stationary"}
