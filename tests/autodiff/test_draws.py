"""Whatever is random in a network follows the key, and nothing else: every layer and function of torch that draws."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

from metalit.autodiff import SAM, call, draws, gradient_at, per_sample_gradients, perturbed_gradient
from metalit.autodiff.perturbed import gradient_in_training
from metalit.errors import InputError

KEY = torch.tensor(3)


class By(nn.Module):
    """A linear layer whose outputs are changed by a function that draws."""

    def __init__(self, fn):
        super().__init__()
        self.layer, self.fn = nn.Linear(6, 6), fn

    def forward(self, x):
        return self.fn(self.layer(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(1, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        x = self.first(x.unsqueeze(-1))
        return self.layer(x, x, x)[0].flatten(1)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.own = nn.Linear(6, 6), torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.layer(x) * torch.rand(6, generator=self.own)


def transformer():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.4, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten())


# layers, which are known to draw
LAYERS = {
    "Dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
    "Dropout1d": lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2)), nn.Dropout1d(0.5), nn.Flatten()),
    "AlphaDropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.5)),
    "FeatureAlphaDropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2)), nn.FeatureAlphaDropout(0.5)),
    "RReLU": lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU()),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "MultiheadAttention": Attention,
    "TransformerEncoderLayer": transformer,
    "FractionalMaxPool2d": lambda: nn.Sequential(nn.Linear(6, 100), nn.Unflatten(1, (1, 10, 10)),
                                                 nn.FractionalMaxPool2d(2, output_size=6)),
    "FractionalMaxPool3d": lambda: nn.Sequential(nn.Linear(6, 125), nn.Unflatten(1, (1, 5, 5, 5)),
                                                 nn.FractionalMaxPool3d(2, output_size=3)),
}  # fmt: skip
# functions, which only show when they draw
FUNCTIONS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, dim=-1),
    "rand": lambda x: x * torch.rand(6),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + x * torch.randn(6),
    "normal_": lambda x: x * torch.empty(6).normal_(),
    "uniform_": lambda x: x * torch.empty(6).uniform_(),
    "exponential_": lambda x: x * torch.empty(6).exponential_(),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((6,), 0.5)),
    "bernoulli_": lambda x: x * x.new_empty(6).bernoulli_(0.5),
    "randint": lambda x: x * torch.randint(1, 1000, (6,)),
    "randperm": lambda x: x * torch.randperm(6),
    "multinomial": lambda x: x * torch.multinomial(torch.ones(6), 6),
    "poisson": lambda x: x * torch.poisson(torch.full((6,), 9.0)),
    "random": lambda x: x * random.random(),
    "numpy": lambda x: x * float(np.random.rand()),
}
NETWORKS = LAYERS | {name: lambda fn=fn: By(fn) for name, fn in FUNCTIONS.items()} | {"own generator": Generator}


def built(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1]


def scrambled():
    torch.rand(3)
    random.random()
    np.random.rand()


@pytest.mark.parametrize("name", NETWORKS)
def test_all_that_is_random_follows_the_key_alone(name):
    network, x = built(name), torch.randn(4, 6)

    def loss(net):
        return (net(x).flatten() * torch.linspace(-1, 1, net(x).numel())).sum()

    def at(key):
        return torch.cat([slope.flatten() for slope in gradient_at(network, loss, key=key)[1].values()])

    before = states()
    first = at(KEY)
    value = call(network, {}, x, key=KEY)
    sharp = perturbed_gradient(network, loss, SAM(0.1), key=KEY).loss
    for now, then in zip(states(), before, strict=True):
        assert (now == then) is True if isinstance(now, tuple) else bool((now == then).all())
    scrambled()
    assert torch.equal(at(KEY), first)
    assert torch.equal(call(network, {}, x, key=KEY), value)
    assert torch.equal(perturbed_gradient(network, loss, SAM(0.1), key=KEY).loss, sharp)
    others = [at(KEY + number) for number in range(1, 4)]
    assert not all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_follow_their_keys_or_are_refused(name):
    network, x, y = built(name), torch.randn(3, 6), torch.zeros(3, 6)
    masks = {"Dropout", "Dropout1d", "dropout", "LSTM", "GRU", "RNN"}

    def rows(key):
        return per_sample_gradients(network, x, y, loss=lambda out, _: out.square().sum(), key=key, flat=True)

    if name in masks:
        scrambled()
        assert torch.equal(rows(KEY), rows(KEY))
        assert not torch.equal(rows(KEY), rows(KEY + 1))
    else:
        with pytest.raises(InputError, match="draws random numbers by other means"):
            rows(KEY)
    with pytest.raises(InputError, match="key: None" if name in LAYERS else "draws random numbers by other means"):
        rows(None)


class Loop(nn.GRU):
    """Goes row by row, where torch itself would not notice."""

    def __init__(self, fn):
        super().__init__(1, 6, batch_first=True)
        self.fn = fn

    def forward(self, x):
        return self.fn(super().forward(x.unsqueeze(-1))[0][:, -1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_are_evaluated_one_by_one_follow_their_keys_too(name):
    torch.manual_seed(0)
    network, x = Loop(FUNCTIONS[name]), torch.randn(3, 2)

    def rows(key):
        return per_sample_gradients(network, x, x, loss=lambda out, _: out.square().sum(), key=key, flat=True)

    first = rows(KEY)
    scrambled()
    assert torch.equal(rows(KEY), first)
    # each row by itself, whatever stands beside it
    one = per_sample_gradients(network, x[:1], x[:1], loss=lambda out, _: out.square().sum(), key=KEY, flat=True)
    assert torch.equal(one, first[:1])
    with pytest.raises(InputError, match="draws random numbers by other means"):
        rows(None)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_draw_are_known(name):
    network = built(name)
    assert draws(network)
    assert draws(network.eval()) == name.startswith("Fractional")


def test_layers_that_do_not_draw_are_known():
    samples = torch.rand(1, 1, 2)
    quiet = [nn.RReLU(0.2, 0.2), nn.LSTM(1, 2, dropout=0.5), nn.GRU(1, 2, num_layers=2), nn.AlphaDropout(0.0)]
    quiet += [nn.MultiheadAttention(2, 1), nn.FractionalMaxPool2d(2, 2, _random_samples=samples)]
    assert not any(draws(layer) for layer in quiet)


def test_draws_under_vmap_that_no_key_reaches_are_torchs_error():
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda key: call(built("rand_like"), {}, torch.ones(2, 6), key=key))(torch.arange(3))


class Late(nn.Module):
    """Begins to drop when it is told to, and counts."""

    def __init__(self):
        super().__init__()
        self.layer, self.drops = nn.Linear(6, 6), False
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return F.dropout(self.layer(x), 0.5) if self.drops else self.layer(x)


@pytest.mark.parametrize("at", [gradient_at, gradient_in_training])
def test_a_network_that_begins_to_drop_later_drops_as_one_that_always_did(at):
    torch.manual_seed(0)
    always, late, x = Late(), Late(), torch.randn(4, 6)
    late.load_state_dict(always.state_dict())

    def found(network):
        return at(network, lambda network: network(x).square().sum(), dict(network.named_parameters()), KEY)

    found(late)
    late.drops, always.drops = True, True
    late.seen.zero_()
    expected, got = found(always), found(late)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1]["layer.weight"], expected[1]["layer.weight"])
    assert late.seen == always.seen == (0 if at is gradient_at else 1)
