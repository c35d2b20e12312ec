"""The gradient at perturbed weights is that of a copy of the network there, which is left as it was."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from cases import draw
from held import everything_of, same
from perturbed_networks import (
    CASES,
    KEY,
    MODULES,
    Partly,
    Quadratic,
    X,
    conv,
    data,
    exact,
    f64,
    filled,
    noise,
    on_a_copy,
    positive,
    tied,
    twice,
)
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import SAM, AdaptiveSAM, Perturbation, WeightNoise, call, gradient_at, perturbed_gradient
from metalit.errors import InputError
from metalit.keys import fold, normal
from metalit.networks import MLP
from metalit.tree import flatten, norm


@pytest.mark.parametrize(("name", "training"), CASES)
def test_the_gradient_is_that_of_a_copy_at_w_plus_alpha(name, training):
    module, shape = MODULES[name]
    module.train(training)
    loss, alpha = twice(data(shape)), noise(module)
    expected = on_a_copy(module, loss, alpha)
    found = perturbed_gradient(module, loss, alpha)
    exact(found[:2], expected)
    exact(found.perturbation, alpha)
    assert list(found.gradient) == list(expected[1])
    exact(perturbed_gradient(module, loss, list(alpha.values()))[:2], expected)
    moved = {name: parameter + alpha[name] for name, parameter in module.named_parameters()}
    exact(gradient_at(module, loss, moved), expected)
    assert flatten(found.gradient).abs().max() > 0


def test_unused_parameters_get_zeros_and_frozen_ones_nothing():
    module = filled(Partly())
    found = perturbed_gradient(module, twice(data((3,))), {"bias": f64(1, 2), "unused": f64(1, 2, 3)})
    assert list(found.gradient) == ["weight", "unused"]
    exact(found.gradient["unused"], f64(0, 0, 0))
    exact(found[:2], on_a_copy(module, twice(data((3,))), found.perturbation))


def test_gradient_at_is_the_plain_gradient_where_nothing_is_given():
    module = MODULES["mlp"][0]
    exact(gradient_at(module, twice(data((3,)))), on_a_copy(module, twice(data((3,))), {}))


def test_a_perturbation_of_some_names_only():
    module, x = MODULES["mlp"][0], data((3,))
    alpha = noise(module)
    some = {"out.weight": alpha["out.weight"]}
    expected = on_a_copy(module, twice(x), some)
    exact(perturbed_gradient(module, twice(x), some)[:2], expected)
    exact(perturbed_gradient(module, twice(x), [None, None, alpha["out.weight"], None])[:2], expected)
    exact(perturbed_gradient(module, twice(x), (a for a in [None, None, alpha["out.weight"], None])).perturbation, some)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_tied_weight_can_be_perturbed_by_either_name(name):
    module, alpha = tied(), draw(3, 3)
    found = perturbed_gradient(module, twice(data((3,))), {name: alpha})
    exact(found[:2], on_a_copy(module, twice(data((3,))), {"0.weight": alpha}))
    assert list(found.perturbation) == ["0.weight"]


def test_batch_norm_follows_its_mode():
    layer, x = filled(nn.BatchNorm1d(2)), 3 + data((2,))
    scale = draw(2, seed=4)
    for training in (True, False):
        layer.train(training)
        mean, variance = (x.mean(0), x.var(0, correction=0)) if training else (layer.running_mean, layer.running_var)
        found = gradient_at(layer, lambda network: (scale * network(x)).sum())[1]
        expected = (scale * (x - mean) / (variance + layer.eps).sqrt()).sum(0)
        assert_close(found["weight"], expected, rtol=1e-11, atol=1e-11)
        assert_close(found["bias"], 5 * scale, rtol=1e-13, atol=0)


def test_calls_of_one_loss_follow_each_others_buffers():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x) * self.calls

    counts = Counts()
    ones = torch.ones(1, 1)
    first = gradient_at(counts, lambda network: network(ones).sum())[1]["bias"]
    both = gradient_at(counts, lambda network: network(ones).sum() + network(ones).sum())[1]["bias"]
    exact([first, both, counts.calls], [torch.ones(1), torch.tensor([3.0]), torch.zeros(())])


def test_given_buffers_are_those_of_an_ordinary_forward():
    module, x = conv().train(), data((2, 4, 4))
    ordinary = copy.deepcopy(module)
    twice(x)(ordinary)
    plain = gradient_at(module, twice(x))
    exact(gradient_at(module, twice(x), buffers=dict(module.named_buffers())), plain)
    exact(dict(module.named_buffers()), dict(ordinary.named_buffers()))
    assert module[1].num_batches_tracked == 2


# left as it was
@pytest.mark.parametrize(("name", "training"), CASES)
def test_the_module_is_left_exactly_as_it_was(name, training):
    module, shape = MODULES[name]
    module.train(training)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, gradients = everything_of(module), [parameter.grad for parameter in module.parameters()]
    perturbed_gradient(module, twice(data(shape)), SAM())
    with pytest.raises(InputError, match="not a scalar"):
        perturbed_gradient(module, lambda network: network(data(shape)), SAM())
    same(before, everything_of(module))
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 7).all())
        parameter.grad = None


def test_perturbations_are_left_as_they_were_and_are_no_part_of_a_graph():
    module, alpha = MODULES["mlp"][0], noise(MODULES["mlp"][0])
    alpha = {name: part.requires_grad_() for name, part in alpha.items()}
    held = {name: part.detach().clone() for name, part in alpha.items()}
    found = perturbed_gradient(module, twice(data((3,))), alpha)
    exact({name: part.detach() for name, part in alpha.items()}, held)
    assert not any(leaf.requires_grad for tree in found[1:] for leaf in tree.values())
    assert not found.loss.requires_grad


# surrounding modes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.inference_mode(False)])
def test_works_where_gradients_are_off(mode):
    module, x = MODULES["mlp"][0], data((3,))
    expected = perturbed_gradient(module, twice(x), SAM(0.1))
    with mode():
        found = perturbed_gradient(module, twice(x), SAM(0.1))
        alpha = {name: 1 * part for name, part in found.perturbation.items()}
        moved = {name: parameter + alpha[name] for name, parameter in module.named_parameters()}
        again, at = perturbed_gradient(module, twice(x), alpha), gradient_at(module, twice(x), moved)
    exact(found, expected)
    exact(again, expected)
    exact(at, expected[:2])


def test_works_under_autocast_as_autograd_does():
    module, x = MLP([3, 8, 2], activation="Tanh"), data((3,)).float()
    alpha = {name: part.float() for name, part in noise(module).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = on_a_copy(module, twice(x), alpha)
        exact(perturbed_gradient(module, twice(x), alpha)[:2], expected)
        exact(perturbed_gradient(module, twice(x), alpha)[:2], expected)
    full = perturbed_gradient(module, twice(x), alpha)
    assert not torch.equal(full.loss, expected[0])
    assert full.gradient["out.weight"].dtype == expected[1]["out.weight"].dtype == torch.float32


def test_a_perturbation_takes_the_precision_of_the_weights():
    module = MLP([3, 4, 1])
    found = perturbed_gradient(module, twice(data((3,)).float()), noise(module))
    assert {leaf.dtype for tree in found[1:] for leaf in tree.values()} == {torch.float32}


# the gradient at w: asked for once, or known
class Spy(Perturbation):
    def __init__(self, asks):
        self.asks = asks
        self.seen = []

    def __call__(self, parameters, gradient, key):
        self.seen = [gradient() for _ in range(self.asks)]
        return {}


@pytest.mark.parametrize(("asks", "evaluations"), [(0, 1), (1, 2), (3, 2)])
def test_the_gradient_is_computed_when_it_is_asked_for_and_once(asks, evaluations):
    calls = []

    def loss(network):
        calls.append(1)
        return network()

    module, spy = Quadratic(positive(2), f64(1, 2)), Spy(asks)
    found = perturbed_gradient(module, loss, spy)
    assert len(calls) == evaluations
    for seen in spy.seen:
        exact(seen, found.gradient)


def test_a_known_gradient_is_used_instead():
    module, x = filled(Partly()), data((3,))
    calls = []

    def loss(network):
        calls.append(1)
        return twice(x)(network)

    expected = perturbed_gradient(module, loss, SAM(0.1))
    twice(x)(module).backward()
    known = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert known["unused"] is None
    calls.clear()
    exact(perturbed_gradient(module, loss, SAM(0.1), gradient=known), expected)
    assert len(calls) == 1
    doubled = {name: None if slope is None else 1 + slope for name, slope in known.items()}
    assert not torch.equal(perturbed_gradient(module, loss, SAM(0.1), gradient=doubled).loss, expected.loss)


# noise
def test_noise_is_a_function_of_the_key():
    module, x = MODULES["mlp"][0], data((3,))
    state = torch.get_rng_state()
    found = perturbed_gradient(module, twice(x), WeightNoise(0.2), key=KEY)
    for index, (name, parameter) in enumerate(module.named_parameters()):
        exact(found.perturbation[name], 0.2 * normal(fold(KEY, index), *parameter.shape))
    exact(perturbed_gradient(module, twice(x), WeightNoise(0.2), key=KEY), found)
    other = perturbed_gradient(module, twice(x), WeightNoise(0.2), key=KEY + 1)
    assert not torch.equal(other.loss, found.loss)
    exact(found[:2], on_a_copy(module, twice(x), found.perturbation))
    exact(torch.get_rng_state(), state)
    some = perturbed_gradient(module, twice(x), WeightNoise(0.2, names=("out.*",)), key=KEY)
    exact(some.perturbation, {name: found.perturbation[name] for name in ("out.weight", "out.bias")})


def test_noise_has_its_scale_within_5_sigma():
    count = 40_000
    sample = WeightNoise(0.3)({"w": torch.zeros(count).double()}, dict, KEY)["w"]
    assert abs(sample.mean()) < 5 * 0.3 / count**0.5
    assert abs(sample.std() - 0.3) < 5 * 0.3 / (2 * count) ** 0.5


def test_dropout_follows_the_key_in_both_evaluations():
    module, x = filled(MLP([3, 8, 1], activation="Tanh", dropout=0.5)), data((3,))
    state = torch.get_rng_state()
    found = perturbed_gradient(module, twice(x), SAM(0.1), key=KEY)
    exact(perturbed_gradient(module, twice(x), SAM(0.1), key=KEY), found)
    exact(torch.get_rng_state(), state)
    slope = gradient_at(module, twice(x), key=KEY)[1]
    assert_close(flatten(found.perturbation), 0.1 * flatten(slope) / norm(slope), rtol=1e-13, atol=1e-16)
    assert not torch.equal(gradient_at(module, twice(x), key=KEY + 1)[0], gradient_at(module, twice(x), key=KEY)[0])
    by_call = call(module, {}, x, key=fold(KEY, -1)).detach()  # apart from the keys of perturbations
    exact(gradient_at(module, lambda network: network(x).square().sum(), key=KEY)[0], by_call.square().sum())
    layers = nn.Sequential(nn.Linear(9, 9), nn.Dropout(0.5)).double()
    mask = gradient_at(layers, lambda network: network(torch.zeros(9).double()).sum(), key=KEY)[1]["0.bias"]
    exact(mask.unique(), f64(0, 2))


def test_it_is_the_gradient_of_call_in_the_functional_form():
    module, x = MODULES["mlp"][0], data((3,))
    alpha = noise(module)
    moved = {name: parameter.detach() + alpha[name] for name, parameter in module.named_parameters()}
    expected = torch.func.grad(lambda given: twice(x)(lambda x: call(module, given, x)))(moved)
    assert_close(perturbed_gradient(module, twice(x), alpha).gradient, expected, rtol=1e-13, atol=1e-15)


def test_perturbations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SAM().rho = 1.0
    assert SAM(0.1) == SAM(0.1)
    assert (SAM().rho, AdaptiveSAM().rho, AdaptiveSAM().eta) == (0.05, 0.5, 0.01)


def test_the_notebooks_two_layers():
    X, Y = draw(4, 6), draw(4, seed=1)
    module = filled(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)))
    alpha = {"0.weight": 0.1 * draw(4, 6, seed=2), "1.weight": 0.1 * draw(1, 4, seed=3)}
    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}
    hidden = F.linear(X, w["0.weight"] + alpha["0.weight"], w["0.bias"])
    out = F.linear(hidden, w["1.weight"] + alpha["1.weight"], w["1.bias"])
    naive = torch.autograd.grad((out - Y).abs().sum(), list(w.values()))
    found = perturbed_gradient(module, lambda network: (network(X) - Y).abs().sum(), alpha)
    exact(list(found.gradient.values()), list(naive))
    exact(found.gradient["1.bias"], (out - Y).sign().sum().detach().reshape(1))


def test_gradients_of_sparse_embeddings_are_dense():
    module = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    x = torch.tensor([[0, 2], [2, 4]])
    found = perturbed_gradient(module, lambda network: network(x).square().sum(), SAM(0.1))
    dense = copy.deepcopy(module)
    dense[0].sparse = False
    assert_close(found, perturbed_gradient(dense, lambda network: network(x).square().sum(), SAM(0.1)))


class Rotates(nn.Module):
    """A complex, a double and a single parameter."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
        self.scale, self.bias = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return ((x * self.turn).abs() * self.scale).float() + self.bias


def test_parameters_of_several_types_keep_theirs():
    module, loss = Rotates(), lambda network: network(X + 1).square().mean()
    for perturbation in (SAM(0.1), AdaptiveSAM(0.1), {}):
        found = perturbed_gradient(module, loss, perturbation)
        exact(found[:2], on_a_copy(module, loss, found.perturbation))
        for name, parameter in module.named_parameters():
            assert found.gradient[name].dtype == parameter.dtype
    with pytest.raises(InputError, match="WeightNoise: 'turn' is complex"):
        perturbed_gradient(module, loss, WeightNoise(0.1), key=KEY)
    perturbed_gradient(module, loss, WeightNoise(0.1, names=["scale", "bias"]), key=KEY)
