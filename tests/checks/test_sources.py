"""Data and learners: what does not fit together is told in one line, and whose loaders are used."""

import pytest
import torch
from fits import bare
from lightning.pytorch import LightningDataModule
from tiny import DATA, LEARNERS, meta, supervised
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metalit.errors import InputError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problem import Problem
from metalit.problems import FewShot


def few_shot():
    return BilevelLearner(FewShot(MLP([1, 4, 1])), SGD(0.1), Unrolled(1))


def pairs(columns=4):
    return DataLoader(TensorDataset(torch.randn(8, columns), torch.arange(8) % 3), batch_size=4)


MAKE = {**LEARNERS, "few shot": few_shot}
OTHERS = {**DATA, "pairs": pairs, "alone": lambda: DataLoader(torch.randn(8, 4), batch_size=4)}
TAKES = {
    "meta": ({"meta"}, "MetaLearner takes"),
    "bilevel": ({"bilevel"}, "Ridge is posed on Splits"),
    "supervised": ({"supervised", "pairs"}, "SupervisedLearner takes"),
    "few shot": ({"meta"}, "FewShot is posed on Task"),
}


@pytest.mark.parametrize("does", ["fit", "validate", "test"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", MAKE)
def test_every_learner_with_every_data(kind, other, does, tmp_path):
    takes, told = TAKES[kind]
    module, data, run = MAKE[kind](), OTHERS[other](), bare(tmp_path, steps=1, val_check_interval=1.0)
    given = {"datamodule": data} if other in DATA else {"train_dataloaders" if does == "fit" else "dataloaders": data}
    if other in takes:
        getattr(run, does)(module, **given)
        return
    with pytest.raises(InputError, match=f"^data: .*{told}") as caught:
        getattr(run, does)(module, **given)
    assert "\n" not in str(caught.value)
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("make", "does", "told"),
    [
        (meta, "fit", "no train_dataloader.*MetaLearner takes a TaskDataModule"),
        (meta, "test", "no test_dataloader.*MetaLearner takes a TaskDataModule"),
        (supervised, "fit", "no train_dataloader.*SupervisedLearner takes a BatchDataModule"),
        (supervised, "validate", "no val_dataloader"),
        (few_shot, "predict", "BilevelLearner does not adapt"),
    ],
)
def test_no_data(make, does, told, tmp_path):
    with pytest.raises(InputError, match=told):
        getattr(bare(tmp_path), does)(make())
    with pytest.raises(InputError, match=told.replace("loader.", "loader in LightningDataModule.")):
        getattr(bare(tmp_path), does)(make(), datamodule=LightningDataModule())


class ByRows(Problem):
    """Weight decay on tasks that are pairs of tensors."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-1.0))

    def init(self, outer, task):
        return {"w": torch.zeros(3)}

    def inner_loss(self, inner, outer, task, step):
        x, y = task
        return (x[:5] @ inner["w"] - y[:5]).square().mean() + outer["a"].exp() * inner["w"].square().sum()

    def outer_loss(self, inner, outer, task):
        x, y = task
        return (x[5:] @ inner["w"] - y[5:]).square().mean()


def rows():
    return DataLoader(TensorDataset(torch.randn(16, 10, 3), torch.randn(16, 10)), batch_size=4)


def test_a_training_loader_of_ones_own_brings_no_validation(tmp_path):
    module = BilevelLearner(ByRows(), SGD(0.05), Unrolled(2))
    run = bare(tmp_path, 8, val_check_interval=2)
    run.fit(module, rows())
    assert run.global_step == 8
    assert not run.callback_metrics.keys() & {"val/loss"}
    run = bare(tmp_path, 8, val_check_interval=2)
    run.fit(module, rows(), rows())
    assert "val/loss" in run.callback_metrics
    with pytest.raises(InputError, match=r"model\.problem fails with TypeError"):
        bare(tmp_path).validate(module)


def test_a_learner_that_brings_its_own_validation_keeps_it(tmp_path):
    class Mine(SupervisedLearner):
        def val_dataloader(self):
            return pairs()

    run = bare(tmp_path, 2, val_check_interval=1.0)
    run.fit(Mine(MLP([4, 3])), pairs())
    assert "val/loss" in run.callback_metrics


@pytest.mark.parametrize("does", ["fit", "validate", "test"])
def test_several_loaders_are_not_mixed(does, tmp_path):
    run = bare(tmp_path)
    given = (pairs(), [pairs(), pairs()]) if does == "fit" else ([pairs(), pairs()],)
    with pytest.raises(InputError, match="there are 2 loaders to evaluate"):
        getattr(run, does)(supervised(), *given)
    assert run.global_step == 0


def test_predictions(tmp_path):
    module, x = supervised().eval(), torch.randn(8, 4)
    for batches in (
        DataLoader(x, batch_size=4),
        DataLoader(TensorDataset(x), batch_size=4),
        DataLoader(TensorDataset(x, torch.zeros(8)), batch_size=4),
    ):
        found = bare(tmp_path).predict(module, batches)
        torch.testing.assert_close(torch.cat(found), module(x))
    with pytest.raises(InputError, match=r"predict adapts to the points of a file.*adapt\(x, y\)"):
        bare(tmp_path).predict(MetaLearner(FewShot(MLP([1, 2, 1])), SGD(0.1), Unrolled(1)), pairs(1))
