"""Differences in the place of second derivatives: what they are exact for, and how far they are off elsewhere."""

from itertools import pairwise

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, task_at
from torch import nn
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.errors import InputError
from metalit.hypergradients import FiniteDifference, Unrolled, over_tasks
from metalit.inner import SGD, InnerOptimizer, MetaSGD
from metalit.problem import Problem
from metalit.tree import axpy, norm, tree_map


def estimate(hypergradient, problem, optimizer, task, start=None):
    return hypergradient(problem, optimizer, outer_variable(problem, optimizer, task), task, start)


class Cubic(Problem):
    """φθ³ in each entry as inner loss, bᵀθ as outer loss; θ starts at 1.5."""

    def __init__(self, b):
        super().__init__()
        self.phi = nn.Parameter(draw(*b.shape, seed=3))
        self.b = b

    def init(self, outer, task):
        return 1.5 * torch.ones_like(self.b)

    def inner_loss(self, inner, outer, task, step):
        return (outer["phi"] * inner**3).sum()

    def outer_loss(self, inner, outer, task):
        return self.b @ inner


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("epsilon", [0.5, 0.01])
def test_on_a_cubic_the_error_is_epsilon_squared_times_its_third_derivative(size, epsilon):
    # θ′ = θ − 3αφθ²; v = ∂(bᵀθ′)/∂θ′ = b, u = −αb, and (θ + hu)³ − (θ − hu)³ = 2h(3θ²u + h²u³), h = ε/‖u‖
    problem, lr = Cubic(draw(size, seed=5)), 0.1
    found = estimate(FiniteDifference(1, epsilon), problem, SGD(lr), None).gradient["problem"]["phi"]
    exact = -lr * 3 * 1.5**2 * problem.b
    unit = problem.b / problem.b.norm()
    assert_close(found, exact - lr * problem.b.norm() * epsilon**2 * unit**3, rtol=1e-11, atol=1e-12)
    assert_close(estimate(Unrolled(1), problem, SGD(lr), None).gradient["problem"]["phi"], exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["Logistic", "Logistic, minibatches", "Cleaning", "Cleaning, minibatches"])
@pytest.mark.parametrize("optimizer", [SGD, MetaSGD])
@pytest.mark.parametrize("warm", [False, True])
def test_elsewhere_the_error_falls_with_the_square_of_epsilon(name, optimizer, warm):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 1)
    start = problem.init(problem.outer(), task)
    start = tree_map(lambda value: draw(*value.shape, seed=7), start) if warm else None
    right = estimate(Unrolled(3), problem, optimizer(lr), task, start)
    errors = []
    for epsilon in (0.2, 0.1, 0.05):
        found = estimate(FiniteDifference(3, epsilon), problem, optimizer(lr), task, start)
        errors.append(norm(tree_map(torch.sub, found.gradient, right.gradient)))
        assert_close((found.loss, found.inner), (right.loss, right.inner), rtol=0, atol=0)
    assert errors[0] < 0.05 * norm(right.gradient)
    for before, after in pairwise(errors):
        assert 3.8 < before / after < 4.2


class LookAhead(InnerOptimizer):
    """Nesterov's: the gradient is taken at θ + μv."""

    def init(self, inner):
        return tree_map(torch.zeros_like, inner)

    def update(self, grad_fn, inner, state, outer, step):
        velocity = axpy(-0.1, grad_fn(axpy(0.6, state, inner)), tree_map(lambda value: 0.6 * value, state))
        return axpy(1.0, velocity, inner), velocity


@pytest.mark.parametrize("name", ["iMAML in 3-d", "ANIL", "Ridge"])
def test_the_gradient_may_be_taken_elsewhere_than_at_the_inner_variable(name):
    problem, tasks, *_ = PROBLEMS[name]
    task = task_at(tasks, 0)
    found, right = (estimate(kind(4), problem, LookAhead(), task) for kind in (FiniteDifference, Unrolled))
    assert_close(tuple(found), tuple(right), rtol=1e-10, atol=1e-11)


class Twice(SGD):
    def update(self, grad_fn, inner, state, outer, step):
        return axpy(-self.lr, grad_fn(axpy(-self.lr, grad_fn(inner), inner)), inner), state


def test_an_inner_optimiser_that_takes_two_gradients_in_a_step_is_told():
    with pytest.raises(InputError) as raised:
        estimate(FiniteDifference(1), Bowl(draw(3)), Twice(0.1), task_at(bowls(3), 0))
    assert str(raised.value) == (
        "hypergradient FiniteDifference needs an inner optimiser that takes one inner gradient in each step, and Twice "
        "takes 2; use SGD inside, or Unrolled outside"
    )


def test_where_the_outer_loss_has_no_slope_the_gradient_is_zero():
    problem = Cubic(torch.zeros(2, dtype=torch.float64))
    assert estimate(FiniteDifference(2), problem, SGD(0.1), None).gradient["problem"]["phi"].tolist() == [0, 0]


class Far(Bowl):
    """An inner loss through an operation whose second derivative torch does not have."""

    def inner_loss(self, inner, outer, task, step):
        return torch.cdist(inner["theta"][None], task.A).square().sum()


def test_no_second_derivative_is_taken():
    problem, tasks = Far(draw(3, seed=4)), bowls(3)
    outer = outer_variable(problem, SGD(0.02), task_at(tasks, 0))
    found = over_tasks(FiniteDifference(2), problem, SGD(0.02), outer, tasks).gradient["problem"]["theta"]
    # Σ‖θ − aᵢ‖² has the Hessian 6I
    slopes = [task_at(tasks, index) for index in range(3)]
    after = over_tasks(FiniteDifference(2), problem, SGD(0.02), outer, tasks).inner["theta"]
    right = torch.stack([(1 - 0.12) ** 2 * t.A @ (theta - t.c) for t, theta in zip(slopes, after, strict=True)])
    assert_close(found, right.mean(0), rtol=1e-10, atol=1e-11)
