"""What the outer optimiser's step raises is told; what hooks raise within it stays what it is."""

import pytest
import torch
from fits import bare, regression
from lightning.pytorch import Callback

from metalit.data import BatchDataModule
from metalit.errors import InputError
from metalit.modules import SupervisedLearner


def fit(optimizer, tmp_path, *callbacks):
    torch.manual_seed(0)
    learner = SupervisedLearner(torch.nn.Linear(3, 1), optimizer=optimizer)
    data = BatchDataModule(regression(), batch_size=4)
    bare(tmp_path, 2, callbacks=list(callbacks)).fit(learner, data)


class Waits(Callback):
    def on_before_optimizer_step(self, *_):
        pass


class Fails(Callback):
    def on_before_optimizer_step(self, *_):
        raise KeyError("a callback's")


@pytest.mark.parametrize("callbacks", [[], [Waits()]], ids=["alone", "by Lightning"])
@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (lambda groups: torch.optim.Adam(groups, capturable=True), "Adam cannot step: AssertionError: If capturable"),
        (torch.optim.SparseAdam, "SparseAdam cannot step: RuntimeError: SparseAdam does not support dense gradients"),
    ],
)
def test_an_optimiser_that_cannot_step_is_told(optimizer, told, callbacks, tmp_path):
    with pytest.raises(InputError, match=f"model.optimizer: {told}"):
        fit(optimizer, tmp_path, *callbacks)


def test_an_error_of_a_callback_is_its_own(tmp_path):
    with pytest.raises(KeyError, match="a callback's"):
        fit(torch.optim.SGD, tmp_path, Fails())
