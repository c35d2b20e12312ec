import copy
import math
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import SAM, AdaptiveSAM, Perturbation, WeightNoise, call, gradient_at, perturbed_gradient
from metalit.errors import InputError
from metalit.keys import fold, normal
from metalit.networks import MLP
from metalit.tree import flatten, norm

KEY = torch.tensor(5)
exact = partial(assert_close, rtol=0, atol=0)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def filled(module, seed=100):
    """The module in float64, with numbers of its own in every parameter and buffer."""
    module = module.double()
    for index, value in enumerate([*module.parameters(), *module.buffers()]):
        if value.is_floating_point():
            value.data = 0.5 * draw(*value.shape, seed=seed + index)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.running_var.abs_().add_(0.5)
    return module


class Quadratic(nn.Module):
    """½ xᵀHx of its own parameter, whatever it is called with."""

    def __init__(self, H, x):
        super().__init__()
        self.register_buffer("H", H)
        self.x = nn.Parameter(x)

    def forward(self):
        return 0.5 * self.x @ self.H @ self.x


def positive(size, seed=0):
    A = draw(size, size, seed=seed)
    return A @ A.T + torch.eye(size, dtype=torch.float64)


def value(network):
    return network()


# the gradient at w + α is the one of a copy whose weights had α added


def tied():
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    module[2].weight = module[0].weight
    return module


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Partly(nn.Linear):
    """An unused parameter and a frozen one."""

    def __init__(self):
        super().__init__(3, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.bias.requires_grad_(False)


def conv():
    return filled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)))


MODULES = {
    "mlp": (filled(MLP([3, 6, 2], activation="Tanh")), (3,)),
    "conv": (conv(), (2, 4, 4)),
    "cumulative": (filled(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=None))), (3,)),
    "tied": (tied(), (3,)),
    "lstm": (filled(Recurrent(3, 2, num_layers=2, batch_first=True, bidirectional=True)), (4, 3)),
    "transformer": (filled(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)).eval(), (3, 4)),
    "partly": (filled(Partly()), (3,)),
}
CASES = [
    (name, training) for name in MODULES for training in (True, False) if (name, training) != ("transformer", True)
]


def data(shape):
    return draw(5, *shape, seed=8)


def twice(x):
    """A loss that calls the network twice, with different inputs."""
    return lambda network: network(x).square().mean() + network(x + 1).sin().sum()


def on_a_copy(module, loss, alpha):
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in alpha:
                parameter.add_(alpha[name])
    free = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = loss(module)
    slopes = torch.autograd.grad(found, list(free.values()), allow_unused=True)
    slopes = [torch.zeros_like(at) if slope is None else slope for at, slope in zip(free.values(), slopes, strict=True)]
    return found.detach(), dict(zip(free, slopes, strict=True))


def noise(module, seed=50):
    return {name: 0.1 * draw(*p.shape, seed=seed + i) for i, (name, p) in enumerate(module.named_parameters())}


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


def everything_of(module):
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
    for name, held in before.items():
        if isinstance(held, tuple):
            assert held[0] == after[name][0], name
            exact(held[1], after[name][1])
        else:
            assert held == after[name], name


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


# SAM


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("rho", [0.0, 0.05, 1.7])
def test_sam_on_a_quadratic(size, rho):
    H, x = positive(size), draw(size, seed=3)
    slope = H @ x
    found = perturbed_gradient(Quadratic(H, x), value, SAM(rho))
    assert_close(found.perturbation["x"], rho * slope / slope.norm(), rtol=1e-14, atol=0)
    assert_close(found.gradient["x"], H @ (x + rho * slope / slope.norm()), rtol=1e-13, atol=0)
    at = x + rho * slope / slope.norm()
    assert_close(found.loss, 0.5 * at @ H @ at, rtol=1e-13, atol=0)


@pytest.mark.parametrize("a", [0.3, 1.0, 1.6])
@pytest.mark.parametrize("h", [1.0, 4.0])
def test_sam_in_one_dimension_ends_in_a_two_cycle(a, h):
    module, rho = Quadratic(f64([h]), f64(0.9)), 0.25
    visited = []
    for _ in range(300):
        with torch.no_grad():
            module.x -= a / h * perturbed_gradient(module, value, SAM(rho)).gradient["x"]
        visited.append(module.x.item())
    assert math.isclose(abs(visited[-1]), a * rho / (2 - a), rel_tol=1e-12)
    assert math.isclose(visited[-1], -visited[-2], rel_tol=1e-12)


@pytest.mark.parametrize("perturbation", [SAM(0.0), AdaptiveSAM(0.0), WeightNoise(0.0), [None] * 4, {}], ids=str)
def test_without_a_perturbation_it_is_the_plain_gradient(perturbation):
    module, x = MODULES["mlp"][0], data((3,))
    found = perturbed_gradient(module, twice(x), perturbation, key=KEY)
    exact(found[:2], on_a_copy(module, twice(x), {}))
    if isinstance(perturbation, Perturbation):
        assert list(found.perturbation) == list(found.gradient)
        assert norm(found.perturbation) == 0


@pytest.mark.parametrize("perturbation", [SAM(0.1), AdaptiveSAM(0.1)], ids=str)
def test_a_zero_gradient_perturbs_nothing(perturbation):
    found = perturbed_gradient(Quadratic(positive(3), f64(0, 0, 0)), value, perturbation)
    exact(found.perturbation["x"], f64(0, 0, 0))
    exact(found.gradient["x"], f64(0, 0, 0))


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20])
def test_sams_step_has_its_length_whatever_the_gradient(scale):
    slope = {"w": torch.tensor([3 * scale, 0.0]), "b": torch.tensor(4 * scale)}
    found = SAM(0.5)(slope, lambda: slope, None)
    if scale in (1e-20, 1.0):
        assert_close(found, {"w": torch.tensor([0.3, 0.0]), "b": torch.tensor(0.4)}, rtol=1e-3, atol=0)
    assert all(bool(leaf.isfinite().all()) for leaf in found.values())


def test_sam_of_half_precision_does_not_overflow():
    slope = {"w": torch.full((4,), 6e4, dtype=torch.float16)}
    exact(SAM(1.0)(slope, lambda: slope, None), {"w": torch.full((4,), 0.5, dtype=torch.float16)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad):
    assert flatten(SAM()({}, lambda: {"w": f64(1, bad)}, None)).isnan().any()


@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 2.0), eta=st.floats(0.0, 1.0))
def test_the_lengths_of_both_steps_over_all_parameters(seed, rho, eta):
    module = filled(MLP([2, 3, 1], activation="Tanh"), seed=seed)
    loss = twice(draw(4, 2, seed=seed))
    plain, adaptive = (
        perturbed_gradient(module, loss, SAM(rho)),
        perturbed_gradient(module, loss, AdaptiveSAM(rho, eta)),
    )
    assert_close(norm(plain.perturbation), f64(rho)[0], rtol=1e-12, atol=0)
    slope = gradient_at(module, loss)[1]
    assert_close(flatten(plain.perturbation), rho * flatten(slope) / norm(slope), rtol=1e-12, atol=1e-15)
    T = flatten(dict(module.named_parameters())).abs().detach() + eta
    assert_close((flatten(adaptive.perturbation) / T).norm(), f64(rho)[0], rtol=1e-12, atol=0)
    g = flatten(slope)
    assert_close(flatten(adaptive.perturbation), rho * T**2 * g / (T * g).norm(), rtol=1e-12, atol=1e-15)
    exact(adaptive[:2], on_a_copy(module, loss, adaptive.perturbation))


def test_adaptive_sam_does_not_see_the_scale_of_the_weights():
    H, x, c = positive(3), draw(3, seed=3), 7.0
    small = perturbed_gradient(Quadratic(H, x), value, AdaptiveSAM(0.3, eta=0.0))
    large = perturbed_gradient(Quadratic(H / c**2, c * x), value, AdaptiveSAM(0.3, eta=0.0))
    assert_close(large.loss, small.loss, rtol=1e-13, atol=0)
    assert_close(large.perturbation["x"], c * small.perturbation["x"], rtol=1e-13, atol=0)


def test_the_norm_of_the_norms_is_the_norm_of_the_concatenation():
    found = perturbed_gradient(MODULES["conv"][0], twice(data((2, 4, 4))), SAM()).gradient
    norms = torch.stack([leaf.norm() for leaf in found.values()]).norm()
    assert_close(norms, torch.cat([leaf.flatten() for leaf in found.values()]).norm(), rtol=1e-14, atol=0)
    assert_close(norms, norm(found), rtol=1e-14, atol=0)


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


# errors

LAYER = nn.Linear(2, 1)
X = torch.ones(4, 2)


def refused(match, perturbation=None, loss=lambda network: network(X).sum(), module=LAYER, **options):
    with pytest.raises(InputError, match=match):
        perturbed_gradient(module, loss, perturbation or {}, **options)


def test_losses_that_are_no_scalar_are_refused():
    refused(r"loss: it returned shape \[4, 1\], not a scalar", loss=lambda network: network(X))
    refused("loss: it returned type float", loss=lambda network: 1.0)
    exact(gradient_at(LAYER, lambda network: network(X).sum().reshape(1, 1))[1]["bias"], torch.tensor([4.0]))


def test_the_network_that_is_given_is_the_module_itself():
    module, x = filled(MLP([3, 4, 1], activation="Tanh")), data((3,))
    alpha = noise(module)

    def by_the_module(_):
        penalty = sum(parameter.square().sum() for parameter in module.parameters())
        return module(x).square().mean() + penalty + module.out.weight.sum() + module.state_dict()["out.bias"].sum()

    def by_the_network(network):
        penalty = sum(parameter.square().sum() for _, parameter in network.named_parameters())
        return network(x).square().mean() + penalty + network.out.weight.sum() + network.out.bias.detach().sum()

    expected = on_a_copy(module, by_the_network, alpha)
    exact(perturbed_gradient(module, by_the_network, alpha)[:2], expected)
    exact(perturbed_gradient(module, by_the_module, alpha)[:2], expected)


def test_parameters_that_were_taken_from_the_module_before_are_refused():
    kept, outer = list(LAYER.parameters()), nn.Sequential(LAYER)
    features = LAYER(X)
    told = "loss: it reaches the module's 'weight' by another way"
    refused(told, loss=lambda network: network(X).sum() + kept[0].square().sum())
    refused(told, SAM(), loss=lambda network: network(X).sum() + kept[0].square().sum())
    refused(told, loss=lambda network: (network(X) * features).sum())
    found = gradient_at(LAYER, lambda network: (network(X) * features.detach()).sum() + kept[0].detach().sum())
    exact(found[1]["bias"], features.detach().sum().reshape(1))
    # a module that holds it is it
    exact(gradient_at(LAYER, lambda _: outer(X).sum())[1]["bias"], torch.tensor([4.0]))


def test_a_loss_without_the_network_is_refused():
    refused("does not depend on the network it is given", loss=lambda network: torch.tensor(1.0))
    with pytest.raises(InputError, match="no trainable parameter"):
        gradient_at(nn.Linear(2, 1).requires_grad_(False), lambda network: network(X).sum())


def test_perturbations_that_do_not_fit_are_refused():
    refused("perturbation: 'wieght' is no parameter of Linear", {"wieght": X})
    refused(r"perturbation: 'weight' has shape \[2\], but needs \[1, 2\]", {"weight": X[0]})
    refused("perturbation: 'bias' has shape 0.1", {"bias": 0.1})
    refused("perturbation: 1 tensors for 2 parameters", [torch.zeros(1, 2)])
    refused("perturbation: a Tensor is neither", torch.zeros(1, 2).sum() + 1)
    refused("perturbation: a float is neither", 0.1)
    refused("are one tied weight", {"0.weight": torch.ones(3, 3), "2.weight": torch.ones(3, 3)}, module=tied())
    with pytest.raises(InputError, match=r"parameters: 'bias' has shape \[2\]"):
        gradient_at(LAYER, lambda network: network(X).sum(), {"bias": torch.zeros(2)})


def test_known_gradients_that_do_not_fit_are_refused():
    refused(r"gradient: \['bias'\] missing", SAM(), gradient={"weight": torch.ones(1, 2)})
    refused(r"gradient: 'bias' has shape \[2\]", SAM(), gradient={"weight": None, "bias": torch.ones(2)})
    refused("gradient: 'w' is no parameter", SAM(), gradient={"weight": None, "bias": None, "w": torch.ones(2)})


def test_noise_without_a_key_or_of_no_parameter_is_refused():
    refused("key: None, but WeightNoise", WeightNoise(0.1))
    refused("names: the pattern 'head.*'.*matches no trainable parameter", WeightNoise(0.1, names=("head.*",)), key=KEY)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("make", "argument"),
    [(WeightNoise, "scale"), (SAM, "rho"), (AdaptiveSAM, "rho"), (AdaptiveSAM, "eta")],
)
def test_sizes_that_are_negative_or_not_finite_are_refused(make, argument, bad):
    with pytest.raises(InputError, match=f"{make.__name__}: {argument}={bad} must be a finite number, 0 or more"):
        make(**{argument: bad})


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
