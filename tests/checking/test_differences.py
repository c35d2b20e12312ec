"""Finite differences of functions whose derivatives are known."""

import math

import pytest
import torch

from metalit.checking.differences import slope, steps_of, unit_direction

STEPS = steps_of(torch.float64)
AT = {"x": torch.tensor([0.3, -0.7], dtype=torch.float64)}
ALONG = {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)}


def compared(function, derivative, at=AT, dtype=torch.float64):
    at = {"x": at["x"].to(dtype)}
    gradient = {"x": torch.tensor([derivative, 0.0], dtype=dtype)}
    along = {"x": ALONG["x"].to(dtype)}
    return slope(lambda tree: float(function(tree["x"])), at, gradient, along, "here", steps_of(dtype))


def test_the_right_derivative_agrees_at_a_step_between_rounding_and_curvature():
    found = compared(lambda x: torch.exp(2 * x[0]).sum(), 2 * math.exp(0.6))
    assert found.verdict == "agrees"
    assert found.smooth
    assert found.error < 1e-8
    assert 1e-7 < found.step < 1e-3


@pytest.mark.parametrize("wrong", [1.001, -1.0, 0.0])
def test_another_derivative_differs(wrong):
    assert compared(lambda x: torch.sin(x[0]), wrong * math.cos(0.3)).verdict == "differs"


def test_single_precision_has_larger_steps_and_less_to_say():
    right = 2 * math.exp(0.6)
    assert compared(lambda x: torch.exp(2 * x[0]), right, dtype=torch.float32).verdict == "agrees"
    assert compared(lambda x: torch.exp(2 * x[0]), 1.2 * right, dtype=torch.float32).verdict == "differs"


KINK = {"x": torch.zeros(2, dtype=torch.float64)}


@pytest.mark.parametrize(("derivative", "verdict"), [(0.0, "kink"), (1.0, "kink"), (0.4, "kink"), (5.0, "differs")])
def test_at_a_kink_whatever_lies_near_the_sides_may_be_right(derivative, verdict):
    assert compared(lambda x: torch.relu(x[0]) + x[0] ** 2, derivative, KINK).verdict == verdict


def test_at_a_jump_differences_say_nothing():
    assert compared(lambda x: (x[0] > 0).double() + x[0], 1.0, KINK).verdict == "jump"


def test_a_kink_beside_the_point_is_left_out_by_small_steps():
    near = {"x": torch.tensor([3e-4, 0.0], dtype=torch.float64)}
    found = compared(lambda x: torch.relu(x[0]) + torch.exp(x[0]), 1 + math.exp(3e-4), near)
    assert found.verdict == "agrees"
    assert found.step < 3e-4
    assert not found.smooth


def test_a_constant_has_no_slope():
    found = compared(lambda x: torch.tensor(3.0), 0.0)
    assert (found.verdict, found.error) == ("agrees", 0.0)


def test_what_is_not_finite_is_told():
    assert compared(lambda x: x[0].log(), 1.0, {"x": -torch.ones(2, dtype=torch.float64)}).verdict == "not finite"


def test_directions_have_length_one_and_follow_their_seed():
    first, again, other = (unit_direction(AT, seed)["x"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.norm()) == pytest.approx(1.0)
