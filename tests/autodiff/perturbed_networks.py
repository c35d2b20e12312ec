"""What the tests of gradients at perturbed weights share: networks, losses, and a copy at w + α."""

import copy
from functools import partial

import torch
from cases import draw
from torch import nn
from torch.testing import assert_close

from metalit.networks import MLP

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


X = torch.ones(4, 2)
