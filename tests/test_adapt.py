from dataclasses import dataclass

import pytest
import torch
from cases import Bowl, BowlTask, bowls, draw, task_at
from torch import nn
from torch.func import jacrev
from torch.testing import assert_close

from metalit.adapt import adapt, iterates, outer_variable, path
from metalit.inner import SGD, InnerOptimizer, MetaSGD
from metalit.problem import Problem
from metalit.problems import FewShot, ThetaPhi
from metalit.tree import axpy

LR, THETA, PHI = 0.03, draw(3, seed=5), draw(4, seed=6)
S = PHI @ PHI


class FromTask(ThetaPhi):
    """A task is the θ₀ from which θ starts."""

    def init(self, outer, task):
        return task


THETA_PHI = FromTask([0.0], [0.0])


def adapted(theta, phi, steps, start=None):
    return adapt(THETA_PHI, SGD(LR), {"problem": {"phi": phi}, "optimizer": {}}, theta, steps, start)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_adapted_is_the_closed_form(steps):
    assert_close(adapted(THETA, PHI, steps), (1 - 2 * LR * S) ** steps * THETA, rtol=1e-13, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_jacobians_of_the_adapted_are_the_closed_forms(steps):
    r = 1 - 2 * LR * S
    by_theta, by_phi = jacrev(adapted, argnums=(0, 1))(THETA, PHI, steps)
    assert_close(by_theta, r**steps * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert_close(by_phi, -4 * LR * steps * r ** (steps - 1) * THETA[:, None] * PHI, rtol=1e-12, atol=1e-14)


def test_first_order_iterates_have_the_same_values_and_constant_gradients():
    def last(theta, phi, first_order):
        outer = {"problem": {"phi": phi}, "optimizer": {}}
        *_, (inner, _) = path(THETA_PHI, SGD(LR), outer, theta, 3, first_order=first_order)
        return inner

    assert_close(last(THETA, PHI, True), last(THETA, PHI, False), rtol=0, atol=0)
    by_theta, by_phi = jacrev(last, argnums=(0, 1))(THETA, PHI, True)
    assert_close(by_theta, torch.eye(3, dtype=torch.float64), rtol=0, atol=0)
    assert by_phi.shape == (3, 4)
    assert by_phi.abs().max() == 0


@pytest.mark.parametrize("dropped", [0, 1, 2, 3, 4])
def test_dropped_steps_are_the_identity_in_the_inner_variable_and_a_constant_in_the_outer_one(dropped):
    def along(theta, phi):
        outer = {"problem": {"phi": phi}, "optimizer": {}}
        return torch.stack([at.inner for at in path(THETA_PHI, SGD(LR), outer, theta, 4, dropped=dropped)])

    r = 1 - 2 * LR * S
    expected = torch.stack([r**step * THETA for step in range(5)])
    assert_close(along(THETA, PHI), expected, rtol=1e-13, atol=0)
    kept = (torch.arange(5, dtype=torch.float64) - dropped).clamp(min=0)
    by_theta, by_phi = jacrev(along, argnums=(0, 1))(THETA, PHI)
    identity = torch.eye(3, dtype=torch.float64)
    assert_close(by_theta, r ** kept[:, None, None] * identity, rtol=1e-12, atol=1e-14)
    # d(r^kept)/dφ · θ at the last dropped step, which is a constant
    slope = -4 * LR * kept * r ** (kept - 1) * r**dropped
    assert_close(by_phi, slope[:, None, None] * THETA[:, None] * PHI, rtol=1e-12, atol=1e-14)


def test_dropped_steps_drop_the_derivative_of_the_optimizers_state_too():
    def last(drag, dropped):
        outer = {"problem": {}, "optimizer": {"drag": drag}}
        *_, (inner, _) = path(Ramp(), HeavyBall(), outer, torch.tensor(0.0), 3, dropped=dropped)
        return inner

    drag = torch.tensor(0.5)
    # v = drag + 1, then drag · v + 4, then drag · v + 9; θ moves by −v, −10v, −100v
    assert [last(drag, dropped).item() for dropped in range(4)] == [-1186.5] * 4
    assert [jacrev(last)(drag, dropped).item() for dropped in range(4)] == [-1 - 20 - 575, -15 - 550, -475, 0]


def test_a_state_that_starts_from_the_inner_variable_is_a_constant_after_a_dropped_step():
    class Anchored(InnerOptimizer):
        """Halves the way to where it started."""

        def init(self, inner):
            return inner

        def update(self, grad_fn, inner, state, outer, step):
            return 0.5 * (inner + state), state

    def last(theta, dropped):
        *_, (inner, _) = path(Ramp(), Anchored(), {"problem": {}, "optimizer": {}}, theta, 2, dropped=dropped)
        return inner

    theta = torch.tensor(3.0)
    assert [last(theta, dropped).item() for dropped in range(3)] == [3, 3, 3]
    assert [jacrev(last)(theta, dropped).item() for dropped in range(3)] == [1, 0.5, 1]


def test_iterates_yield_the_start_and_every_step():
    outer = {"problem": {"phi": PHI}, "optimizer": {}}
    each = list(iterates(THETA_PHI, SGD(LR), outer, THETA, 4))
    assert_close(each, [(1 - 2 * LR * S) ** step * THETA for step in range(5)], rtol=1e-13, atol=0)


def test_a_start_replaces_the_initial_value_and_is_a_constant():
    def from_moving_start(phi):
        return adapted(THETA, phi, 3, start=2 * phi[:3])

    r = 1 - 2 * LR * S
    assert_close(from_moving_start(PHI), r**3 * 2 * PHI[:3], rtol=1e-13, atol=0)
    expected = -4 * LR * 3 * r**2 * 2 * PHI[:3, None] * PHI
    assert_close(jacrev(from_moving_start)(PHI), expected, rtol=1e-12, atol=1e-14)


def test_nothing_is_accumulated_or_changed_in_place():
    theta, phi = (nn.Parameter(value.clone()) for value in (THETA, PHI))
    theta.grad, phi.grad = torch.full_like(theta, 7.0), torch.full_like(phi, 7.0)
    moved = adapted(theta, phi, 3)
    assert not torch.equal(moved, theta)
    assert torch.equal(theta, THETA)
    assert torch.equal(phi, PHI)
    assert bool((theta.grad == 7).all() and (phi.grad == 7).all())


class Ramp(Problem):
    """Inner step k descends (k + 1)² · θ."""

    def init(self, outer, task):
        return task

    def inner_loss(self, inner, outer, task, step):
        return (step + 1) ** 2 * inner

    def outer_loss(self, inner, outer, task):
        return inner


def test_the_inner_loss_is_told_the_number_of_the_step():
    theta = adapt(Ramp(), SGD(0.5), {"problem": {}, "optimizer": {}}, torch.tensor(3.0), 3)
    assert theta.item() == 3 - 0.5 * (1 + 4 + 9)


@dataclass(frozen=True)
class HeavyBall(InnerOptimizer):
    """v ← outer["drag"] · v + g, θ ← θ − 10ᵏ v, from v = 1."""

    def outer(self, inner, steps):
        return {"drag": torch.full_like(inner, 0.5)}

    def init(self, inner):
        return torch.ones_like(inner)

    def update(self, grad_fn, inner, state, outer, step):
        state = outer["drag"] * state + grad_fn(inner)
        return axpy(-(10.0**step), state, inner), state


def test_the_optimizer_is_given_its_state_its_outer_parameters_and_the_step():
    outer = outer_variable(Ramp(), HeavyBall(), torch.tensor(0.0))
    assert outer == {"problem": {}, "optimizer": {"drag": torch.tensor(0.5)}}
    each = [value.item() for value in iterates(Ramp(), HeavyBall(), outer, torch.tensor(0.0), 3)]
    assert each == [0, -1.5, -1.5 - 47.5, -1.5 - 47.5 - 1137.5]


def test_the_gradient_function_can_be_asked_anywhere():
    class LookAhead(InnerOptimizer):
        def update(self, grad_fn, inner, state, outer, step):
            return axpy(-0.5, grad_fn(axpy(-0.5, grad_fn(inner), inner)), inner), state

    theta = {"theta": torch.tensor([3.0], dtype=torch.float64)}
    task = BowlTask(torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    outer = {"problem": theta, "optimizer": {}}
    moved = adapt(Bowl(theta["theta"]), LookAhead(), outer, task, 1)
    assert moved["theta"].item() == 3 - 0.5 * (3 - 0.5 * 2 - 1)


def test_adapt_descends_to_the_minimum_of_a_quadratic():
    problem, task = Bowl(draw(4, seed=4)), task_at(bowls(4), 2)
    outer = outer_variable(problem, SGD(0.4), task)
    assert_close(adapt(problem, SGD(0.4), outer, task, 200)["theta"], task.c, rtol=0, atol=1e-12)


def test_outer_variable_holds_what_problem_and_optimizer_bring():
    network = nn.Linear(2, 1)
    network.bias.requires_grad_(False)
    outer = outer_variable(FewShot(network), MetaSGD(0.3))
    assert outer["problem"].keys() == {"weight"}
    assert outer["problem"]["weight"] is network.weight
    assert_close(outer["optimizer"], {"lr": {"weight": torch.full((1, 2), 0.3)}})
    assert outer_variable(FewShot(network), SGD(0.3))["optimizer"] == {}


def test_frozen_parameters_of_a_problem_are_no_part_of_the_outer_variable():
    problem = Bowl(draw(4, seed=4))
    problem.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert problem.outer().keys() == {"theta"}
