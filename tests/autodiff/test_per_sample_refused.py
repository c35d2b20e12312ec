"""What has no derivative for each row is refused in one line that names the way out."""

import math
from functools import partial

import pytest
import torch
from cases import draw
from per_sample_functions import KEY, TwoInputs, filled, linear, one_by_one, tied
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call, gradient_at, per_sample_gradients, per_sample_hessian, per_sample_jacobian
from metalit.errors import InputError
from metalit.networks import MLP


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
