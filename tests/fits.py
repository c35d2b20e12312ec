"""What tests of learners under the Trainer share: a lean trainer, what it logged, a kill, and small tables."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data.rows import Rows, RowSource
from metalit.tree import leaves


def trainer(tmp_path, steps=4, **options):
    defaults = {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": 0.5,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": TensorBoardLogger(tmp_path, name="run", version=0, default_hp_metric=False),
        "callbacks": [BestCheckpoint(), LastCheckpoint()],
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
    }
    return Trainer(**{**defaults, **options})


def bare(tmp_path, steps=4, **options):
    """A trainer that writes nothing."""
    return trainer(tmp_path, steps, **{"logger": False, "callbacks": [], "enable_checkpointing": False, **options})


def last(tmp_path):
    return str(tmp_path / "run/version_0/checkpoints/last.ckpt")


def events(tmp_path):
    found = EventAccumulator(
        str(tmp_path / "run" / "version_0"), size_guidance={"scalars": 0, "images": 0, "histograms": 0}
    )
    found.Reload()
    return found


def scalars(tmp_path):
    found = events(tmp_path)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def parameters(module):
    return {name: value.detach().clone() for name, value in leaves(module.outer())}


def same(first, second):
    """Whether two trees, or two learners' outer variables, are equal bit for bit."""
    if isinstance(first, torch.nn.Module):
        first, second = parameters(first), parameters(second)
    first, second = dict(leaves(first)), dict(leaves(second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class KilledError(Exception):
    """Nobody catches it, as nobody catches a signal that kills."""


class Kill(Callback):
    """Ends a run before the step after ``step``."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise KilledError


def told_once(fit, what):
    """Run ``fit``, and return the one warning that holds ``what``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    (found,) = [str(warning.message) for warning in caught if what in str(warning.message)]
    return found


@dataclass(frozen=True)
class Given(RowSource):
    """A table in memory."""

    rows: Rows

    def read(self):
        return self.rows


def regression(rows=60, inputs=3, outputs=1, seed=0):
    """A linear function of standard normal inputs, with noise; ``outputs`` is 1 for what DataModules take."""
    generator = torch.Generator().manual_seed(seed)
    x, w, e = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    return Given(Rows(x, x @ w + 0.3 * e, [f"x{column}" for column in range(inputs)], "y", []))


def blobs(rows=120, inputs=4, classes=3, spread=0.7, seed=0):
    """Normal clouds about the vertices of a cube, one for each class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    centres = 2.0 * (torch.arange(classes)[:, None] >> torch.arange(inputs) & 1) - 1.0
    x = centres[y] + spread * torch.randn(rows, inputs, generator=generator)
    names = [f"x{column}" for column in range(inputs)]
    return Given(Rows(x.double(), y, names, "kind", [str(number) for number in range(classes)]))


def given_checkpoint(root):
    """Checkpoints that the command line has saved after two steps of a config, by its name, each trained once."""
    from repository import TINY_BY_CLASS

    from metalit.__main__ import main

    found = {}

    def checkpoint(name):
        if name not in found:
            config = Path(__file__).parent.parent / f"configs/{name}.yaml"
            text = config.read_text()
            sizes = [size for kind, sizes in TINY_BY_CLASS.items() if kind in text for size in sizes]
            steps = ("--trainer.max_steps=2", "--trainer.val_check_interval=1.0")
            assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={root}", *sizes, *steps]) == 0
            path = root / f"lightning_logs/{name}/version_0/checkpoints/last.ckpt"
            found[name] = torch.load(path, weights_only=True)
        return found[name]

    return checkpoint
