"""Learners of every kind, that are trained on several ranks."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from fits import blobs, last, regression, trainer
from kinds import Kinds, namer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from metalit.autodiff import SAM, WeightNoise
from metalit.callbacks import BestCheckpoint, FitFigures, LastCheckpoint, ReportWriter
from metalit.data import BatchDataModule, Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.hypergradients import Annealed, Implicit, Unrolled
from metalit.inner import SGD, Adam, MetaSGD
from metalit.linsolve import CG
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, FewShot, Logistic, Ridge
from metalit.tree import flatten

STEPS = 20
ADAM = partial(torch.optim.Adam, lr=0.01)
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS)
# one that would let the ranks drift apart if they judged differently
PLATEAU = partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.05)


def network(*sizes):
    torch.manual_seed(0)
    return MLP(sizes, activation="Tanh")


def dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def meta(inner=None, problem=None, until=0, **options):
    options = {"eval_steps": 3, "optimizer": ADAM, "scheduler": COSINE, **options}
    unrolled = Unrolled(2, Annealed([0.5, 0.5], [0.1, 0.9], over=30), until)  # so that each step must know its number
    return MetaLearner(problem or FewShot(network(1, 8, 1)), inner or SGD(0.05), unrolled, **options)


def per_step():
    torch.manual_seed(0)
    network = MLP([1, 8, 1], activation="Tanh", norm="LayerNorm", context=2)
    return FewShot(network, adapt=["hidden*", "context"], proximal=0.1, reset=["context"], per_step=["norm*"])


def sine():
    return TaskDataModule(Sine(), Episodes(12, 5, 5), Episodes(12, 5, 5), Episodes(6, 5, 5))


def ridge(inner=None, **options):
    problem = Ridge(3, -1.0, batch=8, outer_batch=5)
    return BilevelLearner(
        problem, inner or SGD(0.1), Unrolled(3), **{"optimizer": ADAM, "scheduler": PLATEAU, **options}
    )


def logistic(**options):
    problem = Logistic(4, -1.0, batch=8, outer_batch=5)
    return BilevelLearner(problem, SGD(0.1), Implicit(3, CG(5), damping=0.1), **{"optimizer": ADAM, **options})


def cleaning(**options):
    problem = Cleaning(network(4, 6, 2), 30, decay=0.01, batch=8, outer_batch=8)
    return BilevelLearner(problem, SGD(0.2), Unrolled(2), **{"optimizer": ADAM, **options})


def splits(source):
    return SplitsDataModule(source, draws=24)


def supervised(perturbation=None, **options):
    return SupervisedLearner(dropout(), None, perturbation, **{"optimizer": ADAM, "scheduler": PLATEAU, **options})


def rows():
    return BatchDataModule(blobs(rows=150), batch_size=24)


def two_classes():
    return splits(blobs(rows=60, classes=2))


def half():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30))]}


DOUBLE = {"precision": "64-true"}


def judged():
    """Where each rank judges tasks of its own, and the scheduler goes by all."""
    return BilevelLearner(FewShot(network(1, 8, 1)), SGD(0.05), Unrolled(2), optimizer=ADAM, scheduler=PLATEAU)


def uneven():
    return TaskDataModule(Sine(), Episodes(12, 5, 5), Episodes(5, 5, 5), Episodes(6, 5, 5))


def kinds():
    return TaskDataModule(Kinds(spread=1.5), Episodes(12, 2, 3), Episodes(7, 2, 3), Episodes(9, 2, 3))


CASES = {
    "MAML": (meta, sine, DOUBLE),
    "MAML, chunks": (lambda: meta(tasks_per_chunk=3), sine, DOUBLE),
    "MAML, annealed order": (lambda: meta(until=10), sine, DOUBLE),
    "MAML, fused": (lambda: meta(fused_steps=2), sine, DOUBLE | {"log_every_n_steps": 2}),
    "MAML++": (lambda: meta(problem=per_step()), sine, DOUBLE),
    "Meta-SGD, clipped": (lambda: meta(MetaSGD(0.05), clip_norm=0.1), sine, DOUBLE),
    "ridge, warm": (lambda: ridge(warm_start=True), lambda: splits(regression()), DOUBLE),
    "ridge, warm, momenta": (lambda: ridge(Adam(0.05), warm_start=True), lambda: splits(regression()), DOUBLE),
    "ridge, chunks": (lambda: ridge(tasks_per_chunk=3), lambda: splits(regression()), DOUBLE),
    "logistic, implicit, warm": (lambda: logistic(warm_start=True), two_classes, DOUBLE),
    "cleaning": (cleaning, two_classes, DOUBLE),
    "classes": (namer, kinds, DOUBLE),
    "tasks, judged": (judged, uneven, DOUBLE),
    "supervised": (supervised, rows, DOUBLE),
    "supervised, chunks": (lambda: supervised(rows_per_chunk=5), rows, DOUBLE),
    "noise": (lambda: supervised(WeightNoise(0.01)), rows, DOUBLE),
    "SAM": (lambda: supervised(SAM(0.1)), rows, DOUBLE),
    "SAM, chunks": (lambda: supervised(SAM(0.1), rows_per_chunk=3), rows, DOUBLE),
}
COMPILED = {
    "MAML, compiled": (lambda: meta(compile=True), sine, DOUBLE),
    "MAML, compiled, chunks, fused": (
        lambda: meta(compile=True, tasks_per_chunk=4, fused_steps=2),
        sine,
        DOUBLE | {"log_every_n_steps": 2},
    ),
    "ridge, compiled, warm": (lambda: ridge(compile=True, warm_start=True), lambda: splits(regression()), DOUBLE),
}
HALF = {
    "MAML, half": (meta, sine, half),
    "cleaning, half": (cleaning, two_classes, half),
    "SAM, half": (lambda: supervised(SAM(0.1)), rows, half),
}
ALL = CASES | COMPILED | HALF


def fit(root: Path, ranks: int, name: str, halfway: int) -> None:
    """Train one of them; where ``halfway`` is not 0, it is stopped after that step, and goes on from its checkpoint."""
    make, data, options = ALL[name]
    for until in filter(None, (halfway, STEPS)):
        module = make()
        callbacks = [FitFigures(tasks=2 if name == "MAML" else 0), ReportWriter(), BestCheckpoint(), LastCheckpoint()]
        given = options() if callable(options) else options
        devices = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
        settings = {"log_every_n_steps": 1, "val_check_interval": 4, "callbacks": callbacks, **given, **devices}
        run = trainer(root / name, until, num_sanity_val_steps=0, **settings)
        resumed = halfway and until == STEPS
        run.fit(module, data(), ckpt_path=last(root / name) if resumed else None)
        if name == "classes":
            tested = trainer(root / "classes, tested", callbacks=[ReportWriter()], **given, **devices)
            tested.test(module, data(), verbose=False)
        assert name not in COMPILED or module.is_compiled, name
        own = flatten(module.outer()).detach()
        for other in module.all_gather(own).reshape(ranks, -1):
            assert torch.equal(own, other), f"{name}: the ranks drifted apart"


def fit_each(root: Path, ranks: int, halfway: int, names: Iterable[str]) -> None:
    """Train several, one after the other."""
    for name in names:
        fit(root, ranks, name, halfway)
