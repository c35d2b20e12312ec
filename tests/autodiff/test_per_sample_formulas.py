"""Derivatives for each row are those that one writes down."""

import pytest
import torch
from cases import draw
from per_sample_functions import f64, filled, linear
from torch import nn
from torch.func import hessian, jacrev
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call, per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.networks import MLP


# closed forms
@pytest.mark.parametrize("shape", [(7,), (7, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_jacobian_of_a_line_is_x_and_one(shape, flat):
    x, size = draw(*shape), shape[1:]
    parameters = {"a": draw(*size, seed=1).requires_grad_(), "b": draw(*size, seed=2).requires_grad_()}
    for derivative in (per_sample_jacobian, per_sample_gradients):
        found = derivative(linear, x, parameters=parameters, flat=flat)
        if flat:
            assert_close(found.reshape(7, 2), torch.stack([x.reshape(7), torch.ones(7).double()], 1), rtol=0, atol=0)
        else:
            assert list(found) == ["a", "b"]
            assert_close(found["a"].reshape(7), x.reshape(7), rtol=0, atol=0)
            assert_close(found["b"].reshape(7), torch.ones(7).double(), rtol=0, atol=0)
    assert parameters["a"].grad is None
    assert parameters["b"].grad is None


@pytest.mark.parametrize("size", [1, 4])
def test_squared_error(size):
    x, y, w = draw(9, size), draw(9, seed=1), draw(size, seed=2)
    expected = (x @ w - y).unsqueeze(1) * x
    found = per_sample_gradients(lambda x, y, w: 0.5 * (w @ x - y) ** 2, x, y, parameters={"w": w})
    assert_close(found, {"w": expected}, rtol=1e-13, atol=1e-14)
    layer = nn.Linear(size, 1, bias=False).double()
    given = {"weight": w.unsqueeze(0)}
    found = per_sample_gradients(layer, x, y, loss=lambda p, y: 0.5 * (p - y) ** 2, parameters=given, flat=True)
    assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert_close(found.norm(dim=1), (x @ w - y).abs() * x.norm(dim=1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [1, 4])
def test_logistic(size):
    x, y, w = draw(9, size), (draw(9, seed=1) > 0).double(), draw(size, seed=2)
    found = per_sample_gradients(
        lambda x, w: w @ x, x, y, loss=F.binary_cross_entropy_with_logits, parameters={"w": w}, flat=True
    )
    assert_close(found, (torch.sigmoid(x @ w) - y).unsqueeze(1) * x, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
def test_softmax_with_integer_targets_and_the_norms(bias):
    layer, x, y = filled(nn.Linear(4, 3, bias=bias)), draw(8, 4), torch.arange(8) % 3
    error = torch.softmax(layer(x), 1).detach() - F.one_hot(y, 3)
    found = per_sample_gradients(layer, x, y, loss=F.cross_entropy)
    assert_close(found["weight"], error.unsqueeze(2) * x.unsqueeze(1), rtol=1e-13, atol=1e-14)
    squared = x.square().sum(1)
    if bias:
        assert_close(found["bias"], error, rtol=1e-13, atol=1e-14)
        squared = squared + 1
    flat = per_sample_gradients(layer, x, y, loss=F.cross_entropy, flat=True)
    assert flat.shape == (8, 12 + 3 * bias)
    assert_close(flat.norm(dim=1), error.norm(dim=1) * squared.sqrt(), rtol=1e-13, atol=1e-14)
    norms = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in found.values()])
    assert_close(flat.norm(dim=1), norms.norm(dim=0), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_jacobian_of_a_linear_layer_is_x_in_the_outputs_own_row(outputs, rows):
    layer, x = nn.Linear(2, outputs).double(), draw(rows, 2)
    found = per_sample_jacobian(layer, x)
    eye = torch.eye(outputs, dtype=torch.float64)
    assert_close(found["weight"], torch.einsum("ij,rk->rijk", eye, x), rtol=0, atol=0)
    assert_close(found["bias"], eye.expand(rows, outputs, outputs), rtol=0, atol=0)
    flat = per_sample_jacobian(layer, x, flat=True)
    assert flat.shape == (rows, outputs, 3 * outputs)
    assert_close(flat[:, :, : 2 * outputs].reshape(found["weight"].shape), found["weight"], rtol=0, atol=0)
    assert_close(flat[:, :, 2 * outputs :], found["bias"], rtol=0, atol=0)


def test_by_an_input():
    x, t = draw(6, 2), draw(6, seed=1)

    def u(x, t):
        return (x**2).sum() * torch.sin(t)

    assert_close(per_sample_gradients(u, x, t, by=0), 2 * x * t.sin().unsqueeze(1), rtol=1e-14, atol=1e-15)
    assert_close(per_sample_gradients(u, x, t, by=1), (x**2).sum(1) * t.cos(), rtol=1e-14, atol=1e-15)
    assert_close(per_sample_jacobian(u, x, t, by=1, flat=True), ((x**2).sum(1) * t.cos())[:, None], rtol=1e-14, atol=0)


@pytest.mark.parametrize("inputs", [1, 2, 5])
def test_jacobian_by_an_input_with_more_and_fewer_outputs_than_entries(inputs):
    A, x = draw(3, inputs), draw(6, inputs, seed=1)
    found = per_sample_jacobian(lambda x: (A @ x).sin(), x, by=0)
    assert_close(found, (x @ A.T).cos().unsqueeze(2) * A, rtol=1e-13, atol=1e-14)
    module = nn.Sequential(nn.Linear(inputs, 3), nn.Tanh()).double()
    expected = torch.stack([jacrev(module)(row) for row in x])
    assert_close(per_sample_jacobian(module, x, by=0), expected, rtol=1e-13, atol=1e-14)


def test_jacobian_with_fewer_parameters_than_outputs():
    x = draw(6, seed=1)
    found = per_sample_jacobian(
        lambda x, a, b: torch.stack([a * x, b * x**2, a * b]), x, parameters={"a": f64(2.0)[0], "b": f64(3.0)[0]}
    )
    zero, one = torch.zeros(6).double(), torch.ones(6).double()
    assert_close(
        found, {"a": torch.stack([x, zero, 3 * one], 1), "b": torch.stack([zero, x**2, 2 * one], 1)}, rtol=0, atol=0
    )


# second derivatives
def test_second_derivatives_of_sine_and_cubic():
    x = draw(6)
    assert_close(per_sample_hessian(torch.sin, x), -x.sin(), rtol=1e-14, atol=0)
    assert_close(
        per_sample_hessian(lambda x, c: c * x**3, x, parameters={"c": f64(2.0)[0]}), 12 * x, rtol=1e-14, atol=0
    )
    x = draw(6, 3)
    assert_close(per_sample_hessian(lambda x: x.sin().sum(), x), torch.diag_embed(-x.sin()), rtol=1e-14, atol=0)


def test_second_derivatives_of_a_quadratic_of_several_outputs():
    A, x = draw(2, 3, 3), draw(5, 3, seed=1)
    found = per_sample_hessian(lambda x: torch.einsum("oij,i,j->o", A, x, x) / 2, x)
    assert_close(found, (0.5 * (A + A.mT)).expand(5, 2, 3, 3), rtol=1e-13, atol=1e-14)


def test_second_derivatives_of_the_heat_kernel_hold_its_equation():
    x, t = draw(9), 0.5 + draw(9, seed=1).abs()

    def u(x, t):
        return torch.exp(-(x**2) / (4 * t)) / t.sqrt()

    assert_close(per_sample_hessian(u, x, t), per_sample_gradients(u, x, t, by=1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("outputs", [1, 2])
def test_second_derivatives_of_a_network_are_those_of_each_row_and_finite_differences(outputs):
    module, x = filled(MLP([3, 8, outputs], activation="Tanh")), draw(5, 3)
    found = per_sample_hessian(module, x)
    assert found.shape == (5, outputs, 3, 3)
    assert_close(found, torch.stack([hessian(module)(row) for row in x]), rtol=1e-12, atol=1e-13)
    step, eye = 1e-4, torch.eye(3, dtype=torch.float64)
    for i in range(3):
        above, below = (per_sample_jacobian(module, x + sign * step * eye[i], by=0) for sign in (1, -1))
        assert_close(found[..., i], (above - below) / (2 * step), rtol=1e-6, atol=1e-7)


def test_second_derivatives_by_the_second_input_at_given_parameters():
    module, x, t = filled(nn.Bilinear(2, 3, 1)), draw(5, 2), draw(5, 3, seed=1)
    given = {name: value.detach() + 1 for name, value in module.named_parameters()}
    found = per_sample_hessian(lambda x, t: call(module, given, x, t).square(), x, t, by=1)
    slope = torch.einsum("ri,oij->rj", x, given["weight"])
    assert_close(found.squeeze(1), 2 * slope.unsqueeze(2) * slope.unsqueeze(1), rtol=1e-12, atol=1e-13)
