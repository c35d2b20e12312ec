"""What the tests of the supervised learner share: small networks, their data, and training by hand."""

import math
from functools import partial

import torch
from fits import blobs
from torch import nn

from metalit.autodiff import WeightNoise
from metalit.data import BatchDataModule
from metalit.keys import fold
from metalit.networks import MLP

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.01),
}

DECAY = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)


def batchnorm(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def mlp(*sizes, **options):
    torch.manual_seed(0)
    return MLP(sizes or [4, 8, 3], **options)


def classes(**options):
    return BatchDataModule(blobs(), **{"batch_size": 16, **options})


def batch(data, step):
    """In float64, the batch of a step."""
    if data.trainer is None:
        data.setup("fit")
    index = torch.arange(step * data.number, (step + 1) * data.number)
    return data.draw("train", index)


def noise(network, loss, number):
    weights = {name: value.detach() for name, value in network.named_parameters()}
    alpha = WeightNoise(0.1)(weights, dict, fold(torch.tensor(7), number))
    return list(alpha.values())


def sam(network, loss, number, rho=0.3):
    slopes = torch.autograd.grad(loss(), list(network.parameters()))
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    return [rho * slope / norm for slope in slopes]


def assert_equal_networks(network, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, **TIGHT)
