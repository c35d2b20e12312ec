"""What the tests of derivatives for each row share: small networks, and a loop over rows."""

import copy

import torch
from cases import draw
from torch import nn

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


# modules against a loop
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)
        self.register_buffer("shift", torch.arange(3.0))

    def forward(self, x, y):
        return torch.tanh(self.first(x) + self.shift) * self.second(y)


def tied():
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    module[2].weight = module[0].weight
    return module
