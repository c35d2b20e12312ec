"""The tasks of a learner's first outer step, without a trainer."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from metalit.data.draws import KeysDataModule, StreamDataModule
from metalit.data.given import tasks_of
from metalit.data.stream import Fused
from metalit.errors import InputError
from metalit.modules import BilevelLearner, MetaLearner
from metalit.modules.base import OuterLearner


def first_step_of(learner: OuterLearner, data: Any) -> Any:
    """The batch of the first outer step: of a DataModule, a loader, nothing (keys), or the batch itself.

    Raises:
        InputError: no data, or data of which there is no batch.
    """
    if data is None and isinstance(learner, BilevelLearner):
        data = KeysDataModule(learner.draws, learner.seed)
    if data is None:
        raise InputError(f"check: a {type(learner).__name__} needs data; give its tasks, or a DataModule")
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        if isinstance(data, StreamDataModule):
            batch = data.draw("train", torch.arange(data.number))
        else:
            batch = _first(data.train_dataloader())
        batch = data.transfer_batch_to_device(batch, learner.device, 0)
    else:
        batch = _first(data) if isinstance(data, torch.utils.data.DataLoader) else data
    if isinstance(batch, Fused):
        raise InputError("check: give the tasks of one outer step, not of several that are fused")
    return tasks_of(batch, torch.tensor(0)) if isinstance(learner, MetaLearner) else batch


def _first(loader: Any) -> Any:
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError("check: the training data has no batch")
    return batch
