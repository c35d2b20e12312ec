"""The network of Vinyals et al. 2016: its shapes, its parts, and a plain chain of torch's functions beside it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call
from metalit.errors import InputError
from metalit.networks import MLP, Conv4


@pytest.mark.parametrize(
    ("size", "pools", "features"),
    [(28, 4, 3), (84, 4, 75), (16, 4, 3), ([31, 17], 4, 3), (8, 3, 3), (8, 2, 12), ([2, 3], 0, 18)],
)
def test_each_pool_halves_the_image(size, pools, features):
    network = Conv4(2, size, width=3, pools=pools)
    height, width = [size, size] if isinstance(size, int) else size
    assert network(torch.zeros(4, 2, height, width)).shape == (4, features)
    assert Conv4(2, size, 3, ways=7, pools=pools)(torch.zeros(4, 2, height, width)).shape == (4, 7)


def layers_of(network):
    return [name for name, _ in network.named_children()]


def test_its_layers_are_known_by_name():
    blocks = [f"{kind}{number}" for number in range(1, 5) for kind in ("conv", "norm", "relu", "pool")]
    assert layers_of(Conv4(1, 28, ways=5)) == [*blocks, "flatten", "out"]
    plain = [name for name in blocks if not name.startswith("norm") and name != "pool4"]
    assert layers_of(Conv4(1, 28, norm=None, pools=3)) == [*plain, "flatten"]
    assert not list(Conv4(1, 28).buffers())


@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", None])
def test_it_is_the_chain_of_its_functions(norm):
    torch.manual_seed(0)
    network = Conv4(3, 20, width=16, ways=5, norm=norm).double()
    for value in network.parameters():
        value.data += 0.1 * torch.randn_like(value)
    x = torch.randn(6, 3, 20, 20, dtype=torch.float64)
    found, given = x, dict(network.named_parameters())
    for block in range(1, 5):
        found = F.conv2d(found, given[f"conv{block}.weight"], given.get(f"conv{block}.bias"), padding=1)
        scale, shift = (given.get(f"norm{block}.{name}") for name in ("weight", "bias"))
        if norm == "BatchNorm2d":
            centred = found - found.mean((0, 2, 3), keepdim=True)
            found = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        elif norm == "GroupNorm":
            grouped = found.unflatten(1, (2, 8))
            centred = grouped - grouped.mean((2, 3, 4), keepdim=True)
            found = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        if norm is not None:
            found = found * scale[:, None, None] + shift[:, None, None]
        found = F.max_pool2d(found.clamp(min=0), 2)
    expected = found.flatten(1) @ given["out.weight"].T + given["out.bias"]
    assert_close(call(network, given, x), expected, rtol=1e-11, atol=1e-12)
    assert_close(network.eval()(x), expected, rtol=1e-11, atol=1e-12)
    # for many tasks at once, each with weights of its own
    tasks = torch.randn(3, 6, 3, 20, 20, dtype=torch.float64)
    weights = {name: torch.stack([value * scale for scale in (0.9, 1.0, 1.1)]) for name, value in given.items()}
    each = [functional_call(network, {n: v[i] for n, v in weights.items()}, tasks[i]) for i in range(3)]
    assert_close(vmap(lambda w, x: call(network, w, x))(weights, tasks), torch.stack(each), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"size": 8},
            r"size=8 is too small for pools=4, which need 16×16 pixels at least; give pools=3 or fewer",
        ),
        ({"size": "auto"}, "size='auto' is for a configuration"),
        ({"ways": "auto"}, "ways='auto' is for a configuration"),
        ({"size": [28, 28, 1]}, r"size=\[28, 28, 1\] must be one number, or \[height, width\]"),
        ({"width": 0}, "width=0 must be a whole number, at least 1"),
        ({"ways": 0}, "ways=0 must be a whole number, at least 1"),
        ({"pools": 5}, "pools=5 must be from 0 to 4"),
        ({"norm": "LayerNorm"}, "norm='LayerNorm' must be 'BatchNorm2d' or 'GroupNorm'"),
    ],
)
def test_what_it_cannot_be_is_said(options, told):
    with pytest.raises(InputError, match=told):
        Conv4(**{"channels": 1, "size": 28, **options})


def test_an_mlp_flattens_images():
    network = MLP([2 * 3 * 4, 5, 2])
    x = torch.randn(6, 2, 3, 4)
    assert torch.equal(network(x), network(x.flatten(1)))
    # of [rows, …, inputs] it keeps the form
    assert MLP([4, 5, 2])(x).shape == (6, 2, 3, 2)
    assert isinstance(network.out, nn.Linear)
