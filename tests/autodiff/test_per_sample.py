import copy
import math
from functools import partial

import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call, gradient_at, per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.errors import InputError
from metalit.keys import fold
from metalit.networks import MLP
from metalit.tree import flatten

KEY = torch.tensor(5)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def filled(module, seed=100):
    """The module in float64, with numbers of its own in every parameter and buffer."""
    module = module.double()
    for index, value in enumerate([*module.parameters(), *module.buffers()]):
        if value.is_floating_point():
            value.data = 0.5 * draw(*value.shape, seed=seed + index)
    return module


def linear(x, a, b):
    return a * x + b


def one_by_one(module, loss, x, *targets):
    """The gradients by backward, one row after the other, on a copy."""
    module = copy.deepcopy(module)
    found = []
    for index in range(len(x)):
        module.zero_grad()
        loss(module(x[index : index + 1]), *(target[index : index + 1] for target in targets)).backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()})
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


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


# modules against a loop


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x, y):
        return torch.tanh(self.first(x) + self.shift) * self.second(y)


def conv_net():
    return filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )
    )


def tied():
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    module[2].weight = module[0].weight
    return module


def transformer():
    return nn.Sequential(filled(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)), nn.Flatten())


MODULES = {
    "mlp": (filled(MLP([5, 6, 3], activation="Tanh")), (5,)),
    "conv": (conv_net(), (2, 6, 6)),
    "conv1d": (filled(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten())), (2, 5)),
    "tied": (tied(), (3,)),
    "layer norm": (filled(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))), (4,)),
    "instance norm": (filled(nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(6, 3))), (2, 3)),
    "transformer": (transformer(), (3, 4)),
    "embedding": (filled(nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 3))), None),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_jacobians_are_those_of_a_loop(name, training):
    module, shape = MODULES[name]
    module.train(training)
    x = draw(6, *shape, seed=9) if shape else torch.arange(18).reshape(6, 3) % 7
    y = torch.arange(6) % 3
    expected = one_by_one(module, F.cross_entropy, x, y)
    found = per_sample_gradients(module, x, y, loss=F.cross_entropy)
    assert_close(found, expected, rtol=1e-11, atol=1e-13)
    jacobians = per_sample_jacobian(module, x)
    outputs = module(x).shape[1]
    for output in range(outputs):
        row = one_by_one(module, lambda out: out[0, output], x)  # noqa: B023
        assert_close({name: jacobian[:, output] for name, jacobian in jacobians.items()}, row, rtol=1e-11, atol=1e-13)


def test_second_derivatives_go_through_attention():
    module, x = transformer(), draw(4, 3, 4)
    found = per_sample_hessian(module, x)
    one = per_sample_hessian(module, x[2:3])
    assert_close(found[2:3], one, rtol=1e-12, atol=1e-13)
    step = torch.zeros(3, 4, dtype=torch.float64)
    step[1, 2] = 1e-5
    above, below = per_sample_jacobian(module, x + step, by=0), per_sample_jacobian(module, x - step, by=0)
    assert_close(found[..., 1, 2], (above - below) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_go_row_by_row(dtype):
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    module, x = filled(Last(2, 3, batch_first=True)).to(dtype), draw(4, 5, 2).to(dtype)
    expected = one_by_one(module, lambda out: out.sum(), x)
    assert_close(per_sample_gradients(module, x, x, loss=lambda out, _: out.sum()), expected)
    x = x[:, :1]  # fewer entries than outputs, for which forward mode is tried first
    expected = torch.stack([jacrev(lambda row: module(row.unsqueeze(0))[0])(row) for row in x])
    assert_close(per_sample_jacobian(module, x, by=0), expected)


class Powers(torch.autograd.Function):
    """(x, x²), without a forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.stack([x, x**2])

    @staticmethod
    def setup_context(context, inputs, output):
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context, slope):
        return slope[0] + 2 * context.saved_tensors[0] * slope[1]


def test_operations_without_a_forward_mode():
    x = draw(5)
    expected = torch.stack([torch.ones_like(x), 2 * x], 1)
    assert_close(per_sample_jacobian(Powers.apply, x, by=0), expected, rtol=0, atol=0)
    assert_close(per_sample_hessian(Powers.apply, x), f64(0, 2).expand(5, 2), rtol=0, atol=0)


def test_a_module_of_several_inputs():
    module, x, y = filled(TwoInputs()), draw(6, 2), draw(6, 4, seed=1)
    jacobian = per_sample_jacobian(module, x, y)
    expected = jacrev(lambda given: functional_call(module, given, (x, y)))(dict(module.named_parameters()))
    assert_close(jacobian, expected, rtol=1e-12, atol=1e-13)
    by_second = (torch.tanh(module.first(x) + module.shift)).unsqueeze(2) * module.second.weight
    assert_close(per_sample_jacobian(module, x, y, by=1), by_second.detach(), rtol=1e-12, atol=1e-13)
    target = draw(6, 3, seed=2)
    found = per_sample_gradients(module, x, y, target, loss=F.mse_loss, by=2)
    assert_close(found, 2 / 3 * (target - module(x, y)).detach(), rtol=1e-12, atol=1e-13)


def test_a_module_that_returns_a_scalar_of_its_batch():
    class Total(nn.Linear):
        def forward(self, x):
            return super().forward(x).square().sum()

    module, x = filled(Total(2, 3)), draw(4, 2)
    assert_close(per_sample_gradients(module, x), one_by_one(module, lambda out: out, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_precision_of_the_parameters(dtype):
    module, x = MLP([2, 4, 3]).to(dtype), draw(5, 2).to(dtype)
    for result in (
        per_sample_gradients(module, x, torch.arange(5) % 3, loss=F.cross_entropy, flat=True),
        per_sample_jacobian(module, x, flat=True),
        per_sample_hessian(module, x),
    ):
        assert result.dtype == dtype


def test_unused_parameters_get_zeros_and_frozen_ones_nothing():
    class Partly(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.unused = nn.Parameter(torch.ones(3))

    module = Partly()
    module.bias.requires_grad_(False)
    found = per_sample_gradients(module, torch.ones(4, 2))
    assert list(found) == ["weight", "unused"]
    assert_close(found["unused"], torch.zeros(4, 3), rtol=0, atol=0)
    assert_close(per_sample_jacobian(module, torch.ones(4, 2))["unused"], torch.zeros(4, 1, 3), rtol=0, atol=0)


# names, given parameters, chunks


def test_names_choose_parameters():
    module, x = filled(MLP([2, 3, 1])), draw(5, 2)
    whole = per_sample_gradients(module, x)
    assert list(whole) == [name for name, _ in module.named_parameters()]
    for names, expected in (
        ("*.weight", ["hidden1.weight", "out.weight"]),
        (("out.*",), ["out.weight", "out.bias"]),
        (["out.bias", "hidden1.*"], ["hidden1.weight", "hidden1.bias", "out.bias"]),
    ):
        found = per_sample_gradients(module, x, names=names)
        assert list(found) == expected
        assert_close(found, {name: whole[name] for name in expected}, rtol=0, atol=0)


def test_derivatives_are_taken_at_the_given_parameters_and_only_by_those():
    module, x = filled(MLP([2, 3, 1], activation="Tanh")), draw(5, 2)
    given = {"out.weight": draw(1, 3, seed=7), "hidden1.bias": draw(3, seed=8)}
    other = copy.deepcopy(module)
    for name, value in given.items():
        other.get_parameter(name).data = value
    expected = per_sample_gradients(other, x)
    found = per_sample_gradients(module, x, parameters=given)
    assert_close(found, {name: expected[name] for name in given}, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_tied_weight_can_be_given_by_either_name(name):
    module, x, weight = tied(), draw(5, 3), draw(3, 3, seed=3)
    found = per_sample_jacobian(module, x, parameters={name: weight})
    module[0].weight.data = weight
    assert_close(found, per_sample_jacobian(module, x, names="0.weight"), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunks_change_nothing(chunk_size):
    module, x, y = filled(MLP([3, 5, 2], activation="Tanh", dropout=0.4)), draw(7, 3), torch.arange(7) % 2
    options = {"key": KEY, "flat": True}
    for derivative in (
        lambda size: per_sample_gradients(module, x, y, loss=F.cross_entropy, chunk_size=size, **options),
        lambda size: per_sample_jacobian(module, x, chunk_size=size, **options),
        lambda size: per_sample_jacobian(module, x, by=0, chunk_size=size, **options),
        lambda size: per_sample_hessian(module, x, chunk_size=size, key=KEY),
    ):
        assert_close(derivative(chunk_size), derivative(None), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("chunk_size", "calls"), [(None, 1), (1, 7), (3, 3), (7, 1), (100, 1)])
def test_only_the_rows_of_a_chunk_are_evaluated_together(chunk_size, calls):
    evaluated = []

    def square(x):
        evaluated.append(1)
        return x**2

    per_sample_gradients(square, draw(7), by=0, chunk_size=chunk_size)
    assert len(evaluated) == calls


def test_no_rows_give_no_derivatives():
    module = MLP([2, 3, 1])
    assert per_sample_gradients(module, torch.empty(0, 2), flat=True).shape == (0, 13)
    assert per_sample_jacobian(module, torch.empty(0, 2), by=0).shape == (0, 1, 2)


@given(rows=st.integers(1, 6), sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), chunk=st.integers(1, 7))
def test_the_mean_over_rows_is_the_gradient_of_the_mean(rows, sizes, chunk):
    module = filled(MLP(sizes, activation="Tanh"))
    x, y = draw(rows, sizes[0], seed=1), draw(rows, sizes[-1], seed=2)
    found = per_sample_gradients(module, x, y, loss=F.mse_loss, chunk_size=chunk)
    expected = grad(lambda given: F.mse_loss(call(module, given, x), y))(dict(module.named_parameters()))
    assert_close({name: leaf.mean(0) for name, leaf in found.items()}, expected, rtol=1e-12, atol=1e-14)
    flat = per_sample_gradients(module, x, y, loss=F.mse_loss, flat=True)
    assert_close(flat[-1], flatten({name: leaf[-1] for name, leaf in found.items()}), rtol=1e-13, atol=1e-15)


# dropout


def test_each_row_draws_from_its_own_key():
    module, x = filled(MLP([3, 8, 1], activation="Tanh", dropout=0.5)), draw(1, 3).expand(6, 3)
    found = per_sample_gradients(module, x, key=KEY, flat=True)

    def alone(row):
        given = dict(module.named_parameters())
        return flatten(grad(lambda given: call(module, given, x[:1], key=fold(KEY, row)).sum())(given))

    assert_close(found, torch.stack([alone(row) for row in range(6)]), rtol=1e-13, atol=1e-15)
    assert len({tuple(row.tolist()) for row in found}) == 6
    assert torch.equal(found, per_sample_gradients(module, x, key=KEY, flat=True))
    assert not torch.equal(found, per_sample_gradients(module, x, key=KEY + 1, flat=True))
    assert_close(found[:3], per_sample_gradients(module, x[:3], key=KEY, flat=True), rtol=1e-13, atol=1e-15)


def test_dropout_of_a_plain_function_follows_the_key_and_torchs_generator_stays():
    state = torch.get_rng_state()
    x = torch.ones(200, dtype=torch.float64)
    found = per_sample_gradients(lambda x: F.dropout(x, 0.25), x, by=0, key=KEY)
    assert_close(found.unique(), f64(0, 4 / 3), rtol=1e-15, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_in_evaluation_needs_no_key():
    module, x = filled(MLP([3, 8, 1], dropout=0.5)).eval(), draw(4, 3)
    assert torch.equal(per_sample_gradients(module, x, flat=True), per_sample_gradients(module, x, flat=True, key=KEY))


# left as it was


class Everything(nn.Module):
    """Tied, frozen and unused parameters, a buffer, dropout and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("position", torch.arange(3.0))
        self.recurrent = nn.GRU(3, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()

    def forward(self, x):
        hidden = self.dropout(self.second(self.first(x + self.position)))
        return self.recurrent(hidden.unsqueeze(1))[0][:, 0]


def everything_of(module):
    """The identities and values of all that a module holds."""
    held = {}
    for path, layer in module.named_modules():
        held[path, "training"] = layer.training
        for table in (layer._parameters, layer._buffers):
            held |= {
                (path, name): (id(value), value.detach().clone()) for name, value in table.items() if value is not None
            }
        if isinstance(layer, nn.RNNBase):
            held[path, "flat"] = [id(weight) for weight in layer._flat_weights]
    return held


def same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert value[0] == after[name][0], name
            assert torch.equal(value[1], after[name][1]), name
        else:
            assert value == after[name], name


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_exactly_as_it_was(fails):
    module, x = filled(Everything()), draw(4, 3)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, gradients = everything_of(module), [parameter.grad for parameter in module.parameters()]
    if fails:
        with pytest.raises(InputError, match="per_sample_jacobian"):
            per_sample_gradients(module, x)
    else:
        per_sample_gradients(module, x, x[:, 0], loss=lambda out, y: out.sum() - y, key=KEY)
        per_sample_jacobian(module, x, chunk_size=3)
        per_sample_jacobian(module, x, by=0)
        per_sample_hessian(module, x)
    same(before, everything_of(module))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 7).all())


def test_the_notebooks_order_of_events():
    model, x = nn.Linear(1, 1), draw(10, 1).float()
    a, b = model._parameters["weight"], model._parameters["bias"]
    model(x[:1]).sum().backward()
    a.grad.zero_(), b.grad.zero_()

    def partial_model(a, b):
        model._parameters["weight"], model._parameters["bias"] = a, b
        return model(x)

    torch.autograd.functional.jacobian(partial_model, (a, b))
    assert model._parameters["weight"] is not a
    found = per_sample_jacobian(model, x, flat=True)
    assert_close(found.squeeze(1), torch.hstack([x, torch.ones(10, 1)]), rtol=0, atol=0)
    assert a.grad.item() == b.grad.item() == 0
    assert model._parameters["weight"].grad is None


# what is differentiated once more


def test_own_parameters_are_constants():
    found = per_sample_gradients(MLP([2, 3, 1]), torch.ones(4, 2), flat=True)
    assert not found.requires_grad
    found = per_sample_gradients(MLP([2, 3, 1]), torch.ones(4, 2), names="out.*", parameters=None, flat=True)
    assert not found.requires_grad


def test_a_gradient_penalty_reaches_the_given_parameters():
    module, x = filled(MLP([2, 4, 1], activation="Tanh")), draw(5, 2)
    given = dict(module.named_parameters())
    penalty = (per_sample_gradients(module, x, by=0, parameters=given).norm(dim=1) - 1).square().mean()
    penalty.backward()
    found = {name: parameter.grad for name, parameter in given.items()}

    def by_hand(given):
        weight, out = given["hidden1.weight"], given["out.weight"][0]
        slope = (1 - torch.tanh(x @ weight.T + given["hidden1.bias"]).square()) * out
        return ((slope @ weight).norm(dim=1) - 1).square().mean()

    expected = grad(by_hand)({name: value.detach() for name, value in given.items()})
    found["out.bias"] = torch.zeros(1).double() if found["out.bias"] is None else found["out.bias"]
    assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_works_where_gradients_are_off():
    module, x = filled(MLP([2, 4, 1], activation="Tanh")), draw(5, 2)
    expected = per_sample_gradients(module, x, flat=True)
    with torch.no_grad():
        assert_close(per_sample_gradients(module, x, flat=True), expected, rtol=0, atol=0)
        assert_close(per_sample_hessian(module, x), per_sample_hessian(module, x), rtol=0, atol=0)


# errors


def refused(match, derivative, *arguments, **options):
    with pytest.raises(InputError, match=match):
        derivative(*arguments, **options)


X = torch.ones(4, 2)
LAYER = nn.Linear(2, 1)


def test_values_that_are_no_scalar_name_both_ways_out():
    refused(r"\[3\].*per_sample_jacobian.*loss=", per_sample_gradients, nn.Linear(2, 3), X)
    refused(r"loss: .*\[3\].*sum", per_sample_gradients, nn.Linear(2, 3), X, X, loss=lambda p, y: p)


@pytest.mark.parametrize(("training", "tracks"), [(True, True), (True, False), (False, False)])
def test_batch_norm_is_refused_where_it_mixes_rows(training, tracks):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=tracks)).train(training)
    for derivative in (per_sample_gradients, per_sample_jacobian, per_sample_hessian):
        refused("BatchNorm mixes the rows.*GroupNorm", derivative, module, X)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)])
def test_running_statistics_mix_no_rows(layer):
    module = filled(nn.Sequential(nn.Linear(2, 3), nn.Unflatten(1, (3, 1)), layer, nn.Flatten())).eval()
    layer.running_var.abs_().add_(0.5)
    x = draw(4, 2)
    found = per_sample_gradients(module, x, x, loss=lambda out, _: out.square().sum())
    assert_close(found, one_by_one(module, lambda out: out.square().sum(), x), rtol=1e-12, atol=1e-13)


class Whole(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0][:, -1]


@pytest.mark.parametrize("module", [MLP([2, 4, 3], dropout=0.5), nn.Sequential(nn.Unflatten(1, (2, 1)), Whole(1, 3))])
def test_no_rows_give_no_gradients_of_every_shape(module):
    x, y, one = torch.empty(0, 2), torch.empty(0, dtype=torch.int64), torch.zeros(1, 2)
    for derivative, *inputs in (
        (partial(per_sample_gradients, loss=F.cross_entropy), x, y),
        (per_sample_jacobian, x),
        (partial(per_sample_jacobian, flat=True), x),
        (per_sample_hessian, x),
    ):
        found = derivative(module, *inputs, key=KEY)
        like = derivative(
            module, *(one if part is x else torch.zeros(1, dtype=torch.int64) for part in inputs), key=KEY
        )
        if isinstance(found, torch.Tensor):
            found, like = {"": found}, {"": like}
        assert {name: value.shape for name, value in found.items()} == {n: (0, *v.shape[1:]) for n, v in like.items()}


class Decides(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Picks(nn.Linear):
    def forward(self, x):
        return super().forward(x[x > -9].reshape(x.shape))


class Remembers(nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        return super().forward(x - self.mean.mul_(0.9).add_(x.mean(0)))


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Decides(2, 1), "decides by the value of a tensor.*torch.where"),
        (Picks(2, 1), "a shape depends on values"),
        (Remembers(), "changes a tensor in place by what it sees"),
        (nn.Sequential(nn.Embedding(3, 2, max_norm=0.1), nn.Flatten(), nn.Linear(4, 1)), r"Embedding\(max_norm=...\)"),
    ],
    ids=["if", "mask", "buffer", "max_norm"],
)
def test_what_cannot_be_vectorised_over_rows_is_refused(module, told):
    rows = torch.ones(4, 2)
    refused(told, per_sample_gradients, module, rows.long() if "max_norm" in told else rows)


def test_a_backward_hook_is_refused():
    module = nn.Linear(2, 1)
    module.register_full_backward_hook(lambda *_: None)
    refused("a backward hook.*cannot be vectorised over rows", per_sample_gradients, module, X)


def test_a_lazy_layer_is_refused():
    refused("fn: LazyLinear has no values for weight yet", per_sample_gradients, nn.LazyLinear(1), X)
    with pytest.raises(InputError, match="module: LazyLinear has no values for weight yet"):
        gradient_at(nn.LazyLinear(1), lambda network: network(X).sum())


def test_sparse_embeddings_have_the_gradients_of_dense_ones():
    module = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.arange(12).reshape(4, 3) % 5, torch.arange(4) % 2
    found = per_sample_gradients(module, x, y, loss=F.cross_entropy)
    assert module[0].sparse
    module[0].sparse = False
    assert_close(found, one_by_one(module, F.cross_entropy, x, y))


def test_complex_parameters_are_refused():
    refused("by: w is of torch.complex64, and derivatives here are by real numbers", per_sample_gradients,
            lambda x, w: (w * x).abs().sum(), X, parameters={"w": torch.ones(2, dtype=torch.cfloat)})  # fmt: skip


# what is reached past the arguments


def test_a_penalty_on_the_modules_parameters_is_part_of_the_gradient():
    module, x, y = filled(MLP([2, 3, 1], activation="Tanh")), draw(5, 2), draw(5, 1, seed=1)

    def loss(prediction, target):
        return F.mse_loss(prediction, target) + sum(p.square().sum() for p in module.parameters())

    plain = per_sample_gradients(module, x, y, loss=F.mse_loss)
    found = per_sample_gradients(module, x, y, loss=loss)
    expected = {name: slope + 2 * module.get_parameter(name).detach() for name, slope in plain.items()}
    assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("off", [True, False])
def test_parameters_that_are_reached_past_the_arguments_are_refused(off):
    module, x = MLP([2, 3, 1]), torch.ones(4, 2)
    kept = list(module.parameters())

    def loss(prediction, _):
        return prediction.sum() + kept[0].square().sum()

    def fn(x, **given):
        return call(module, given, x.unsqueeze(0)).sum() + module.out.bias.sum()

    given = dict(module.named_parameters())
    with torch.set_grad_enabled(not off):
        refused("loss: it reaches 'hidden1.weight' by another way", per_sample_gradients, module, x, x, loss=loss)
        refused("fn: it reaches 'out.bias' by another way", per_sample_gradients, fn, x, parameters=given)
        cut = {name: value.detach() for name, value in given.items()}
        refused("fn: it reaches 'out.bias' by another way", per_sample_gradients, fn, x, parameters=cut)
        kept[0] = kept[0].detach()
        found = per_sample_gradients(module, x, x, loss=loss, flat=True)
        assert found.requires_grad is False
        assert_close(found, per_sample_gradients(module, x, flat=True))


def test_dropout_without_a_key_is_refused():
    refused("key: None.*dropout is active", per_sample_gradients, MLP([2, 3, 1], dropout=0.5), X)
    refused("by other means", per_sample_gradients, lambda x: F.dropout(x, 0.5).sum(), X, by=0)
    refused("key: None", per_sample_gradients, nn.Sequential(nn.AlphaDropout(0.5), LAYER), X)
    refused("by other means", per_sample_gradients, nn.Sequential(nn.AlphaDropout(0.5), LAYER), X, key=KEY)


def test_other_runtime_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_sample_gradients(LAYER, torch.ones(4, 3))


@pytest.mark.parametrize("names", [("*", "wieght"), "wieght", ()])
def test_names_that_match_nothing_are_refused(names):
    refused(
        r"names: .* matches no trainable parameter; there are \['weight', 'bias'\]",
        per_sample_gradients,
        LAYER,
        X,
        names=names,
    )


def test_frozen_modules_have_nothing_to_differentiate_by():
    refused("matches no trainable parameter", per_sample_gradients, nn.Linear(2, 1).requires_grad_(False), X)
    assert per_sample_gradients(nn.Linear(2, 1).requires_grad_(False), X, by=0).shape == (4, 2)


def test_inputs_that_do_not_fit_are_refused():
    refused(r"inputs: .*differ: \[4, 3\]", per_sample_gradients, TwoInputs(), X, torch.ones(3, 4))
    refused("inputs: 0 given", per_sample_gradients, LAYER)
    refused("inputs: 1 given; at least 2", per_sample_gradients, LAYER, X, loss=F.mse_loss)
    refused("input 1 is no tensor with a leading dimension", per_sample_gradients, linear, X, torch.tensor(1.0), by=0)
    refused("input 0 is no tensor", per_sample_gradients, linear, [1.0, 2.0], by=0)


@pytest.mark.parametrize("by", [2, -1, True, False, "params", 0.0, None])
def test_by_out_of_range_is_refused(by):
    refused("by: .* is neither 'parameters' nor the position of one of 1 inputs", per_sample_jacobian, LAYER, X, by=by)


def test_second_derivatives_are_by_an_input():
    refused("by: 'parameters'.*give its position", per_sample_hessian, LAYER, X, by="parameters")
    refused("by: 1 is neither", per_sample_hessian, LAYER, X, by=1)


def test_integers_cannot_be_differentiated_by():
    refused("by: input 0 is of torch.int64", per_sample_jacobian, nn.Embedding(3, 2), torch.arange(3), by=0)
    refused(
        "by: a is of torch.int64",
        per_sample_jacobian,
        linear,
        torch.ones(3),
        parameters={"a": torch.tensor(1), "b": torch.tensor(1.0)},
    )
    refused("fn: it returns torch.int64", per_sample_jacobian, lambda x: x.long(), torch.ones(3), by=0)
    found = per_sample_jacobian(
        linear, torch.ones(3), parameters={"a": torch.tensor(2), "b": torch.tensor(1.0)}, names="b"
    )
    assert_close(found, {"b": torch.ones(3)})


def test_parameters_that_do_not_fit_are_refused():
    refused("parameters: a plain function needs those", per_sample_gradients, lambda x: x.sum(), X)
    refused("parameters: 'wieght' is no parameter of Linear", per_sample_gradients, LAYER, X, parameters={"wieght": X})
    refused(
        r"parameters: 'weight' has shape \[2\], but needs \[1, 2\]",
        per_sample_gradients,
        LAYER,
        X,
        parameters={"weight": X[0]},
    )
    refused("parameters: 'bias' has shape 1.0", per_sample_gradients, LAYER, X, parameters={"bias": 1.0})
    refused(
        "parameters: '2.weight' and '0.weight' are one tied weight",
        per_sample_gradients,
        tied(),
        X,
        parameters={"0.weight": torch.ones(3, 3), "2.weight": torch.ones(3, 3)},
    )
    refused("do not fit fn: .*'b'", per_sample_gradients, linear, X, parameters={"a": X})
    refused("do not fit fn: .*'c'", per_sample_gradients, linear, X, parameters={"a": X, "b": X, "c": X})
    refused("parameters: 'b' is 1.0, not a tensor", per_sample_gradients, linear, X, parameters={"a": X, "b": 1.0})


def test_outputs_that_are_no_rows_are_refused():
    class Sequence(nn.Linear):
        def forward(self, x):
            return super().forward(x).expand(3, 1)

    refused(r"fn: it makes \[3, 1\] of one row", per_sample_jacobian, Sequence(2, 1), X)
    refused("fn: it returns a tuple", per_sample_jacobian, nn.GRU(2, 3), X)
    refused("fn: it returns a tuple", per_sample_jacobian, lambda x: (x, x), X, by=0)
    refused("loss: it returns a float", per_sample_gradients, LAYER, X, X, loss=lambda p, y: 1.0)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunks_hold_at_least_one_row(chunk_size):
    refused(f"chunk_size: {chunk_size} must be at least 1", per_sample_gradients, LAYER, X, chunk_size=chunk_size)


def test_a_function_of_c_has_no_signature_to_check():
    assert_close(per_sample_gradients(torch.sin, torch.zeros(3), by=0), torch.ones(3))
    assert math.isclose(per_sample_hessian(torch.cos, torch.zeros(1)).item(), -1.0)
