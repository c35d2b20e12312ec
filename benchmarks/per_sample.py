"""The gradient of every row of a batch: metalit beside Opacus, BackPACK and a loop of backward calls."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Contender, Missing, Race, check_same, not_installed, one_core, rounds, section
from metalit.autodiff import per_sample_gradients

ROWS, CLASSES, SIDE = 256, 10, 28
METALIT = "metalit, `per_sample_gradients`"
PRECISION = 1e-9  # of the check, in double precision
Gradients = Callable[[], list[Tensor]]
Way = Callable[[nn.Module, Tensor, Tensor], Gradients]


def mlp() -> nn.Module:
    """784-256-256-10."""
    sizes = [SIDE * SIDE, 256, 256]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], CLASSES))


def conv4(filters: int = 32) -> nn.Module:
    """Four blocks of a 3 × 3 convolution, ReLU and pooling, and a linear layer; BatchNorm would mix the rows."""
    layers = [
        part
        for channels in (1, filters, filters, filters)
        for part in (nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, CLASSES))


def by_metalit(network: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """One call."""
    return lambda: list(per_sample_gradients(network, x, y, loss=F.cross_entropy).values())


def by_opacus(network: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """The hooks of ``GradSampleModule``."""
    wrapped = importlib.import_module("opacus").GradSampleModule(deepcopy(network), loss_reduction="sum")
    parameters = list(wrapped.parameters())

    def gradients() -> list[Tensor]:
        wrapped.zero_grad(set_to_none=True)
        F.cross_entropy(wrapped(x), y, reduction="sum").backward()
        return [parameter.grad_sample for parameter in parameters]

    return gradients


def by_backpack(network: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """The extension ``BatchGrad``."""
    backpack = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").BatchGrad
    extended = backpack.extend(deepcopy(network))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = list(extended.parameters())

    def gradients() -> list[Tensor]:
        extended.zero_grad(set_to_none=True)
        with backpack.backpack(extension()):
            loss(extended(x), y).backward()
        return [parameter.grad_batch for parameter in parameters]

    return gradients


def by_loop(network: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """One row after the other."""
    own = deepcopy(network)
    parameters = list(own.parameters())

    def gradients() -> list[Tensor]:
        found = []
        for row, label in zip(x.split(1), y.split(1), strict=True):
            own.zero_grad(set_to_none=True)
            F.cross_entropy(own(row), label).backward()
            found.append([parameter.grad for parameter in parameters])
        return [torch.stack(column) for column in zip(*found, strict=True)]

    return gradients


WAYS = {
    METALIT: (by_metalit, "metalit"),
    "Opacus, `GradSampleModule`": (by_opacus, "opacus"),
    "BackPACK, `BatchGrad`": (by_backpack, "backpack"),
    "torch, a loop of `backward`": (by_loop, "torch"),
}
NETWORKS = {
    "MLP 784-256-256-10": mlp,
    "Conv4, 32 filters": conv4,
    "Conv4, 64 filters": lambda: conv4(64),
}


def run(quick: bool) -> str:
    """Measure, for each network."""
    one_core()
    # the peers' hooks are right where the inputs need no gradient
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    parts = []
    for title, make in NETWORKS.items():
        torch.manual_seed(0)
        network = make()
        x, y = torch.randn(ROWS, 1, SIDE, SIDE), torch.randint(CLASSES, (ROWS,))
        ways = {name: way for name, (way, package) in WAYS.items() if not not_installed(package)}
        missing = [Missing(name, f"{WAYS[name][1]} is not installed") for name in WAYS if name not in ways]
        check(ways, deepcopy(network).double(), x.double(), y)
        contenders = [Contender(name, partial(_times, way(network, x, y))) for name, way in ways.items()]
        race = Race(contenders, seconds=0.1 if quick else 0.3).run(rounds(quick))
        parts += [f"### {title}", race.table(list(ways), {"÷ metalit": METALIT}, missing, "batch")]
    about = (
        f"The gradient of the cross-entropy of each of {ROWS} rows (pictures of {SIDE} × {SIDE}) by every weight, in "
        "single precision, on one core. All give the same gradients, to 1e-9 of the largest in double precision (in "
        "single, a row that lies at a kink of ReLU or pooling may fall to either side)."
    )
    return section("per_sample: the gradient of every row", about, *parts)


def check(ways: Mapping[str, Way], network: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise an error unless all agree with the loop."""
    expected = by_loop(network, x, y)()
    for name, way in ways.items():
        for found, right in zip(way(network, x, y)(), expected, strict=True):
            check_same(name, found, right, PRECISION)


def _times(gradients: Gradients, count: int) -> None:
    for _ in range(count):
        gradients()
