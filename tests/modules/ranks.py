"""Trains on as many processes as it is told: ``python ranks.py FOLDER RANKS``."""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fits import blobs, last, regression, trainer
from lightning.pytorch.cli import ReduceLROnPlateau

from metalit.autodiff import SAM
from metalit.callbacks import BestCheckpoint, LastCheckpoint, ScoreTable
from metalit.data import BatchDataModule, SplitsDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import BilevelLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import Ridge


def fit(root: Path, ranks: int) -> None:
    """A bilevel learner, which is resumed, and SAM."""
    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "precision": "64-true"}
    # a scheduler that would let the ranks drift apart if they judged differently
    scheduler = partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.05)
    optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    for steps in (4, 8):
        module = BilevelLearner(
            Ridge(3, -1.0, batch=8, outer_batch=5), SGD(0.1), Unrolled(3), warm_start=True,
            optimizer=optimizer, scheduler=scheduler,
        )  # fmt: skip
        callbacks = [ScoreTable(), BestCheckpoint(), LastCheckpoint()]
        run = trainer(root / "bilevel", steps, val_check_interval=2, callbacks=callbacks, **options)
        run.fit(
            module, SplitsDataModule(regression(), draws=2), ckpt_path=None if steps == 4 else last(root / "bilevel")
        )
    torch.manual_seed(0)
    module = SupervisedLearner(MLP([4, 8, 3]), None, SAM(0.2), optimizer=partial(torch.optim.Adam, lr=0.01))
    run = trainer(root / "SAM", 4, **options)
    run.fit(module, BatchDataModule(blobs(rows=124), batch_size=16))


if __name__ == "__main__":
    fit(Path(sys.argv[1]), int(sys.argv[2]))
