"""Derivatives for each row are those of a loop over rows, for every kind of module."""

import copy

import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from per_sample_functions import KEY, TwoInputs, f64, filled, one_by_one, tied
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call, per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.keys import fold
from metalit.networks import MLP
from metalit.tree import flatten


def conv_net():
    return filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )
    )


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
