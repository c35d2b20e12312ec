"""How the supervised learner is judged, and what it logs."""

import copy
import math
from functools import partial

import pytest
import torch
from cases import draw
from fits import bare, blobs, regression, scalars, trainer
from supervised_learners import batch, batchnorm, classes, mlp, sam
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from metalit.autodiff import SAM, WeightNoise
from metalit.data import BatchDataModule
from metalit.errors import InputError
from metalit.modules import SupervisedLearner


def test_evaluation_uses_running_statistics_and_changes_nothing(tmp_path):
    network, data = batchnorm(), classes()
    module = SupervisedLearner(network)
    run = bare(tmp_path)
    run.fit(module, data)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    run.validate(module, data, verbose=False)
    points = data.splits.val
    with torch.no_grad():
        prediction = copy.deepcopy(network).eval()(points.x.float())
    assert module.scores["learned"]["loss"] == pytest.approx(float(F.cross_entropy(prediction, points.y)), rel=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training


def test_logs_the_loss_at_the_weights_and_how_sharp_it_is(tmp_path):
    network, data = mlp(), classes()
    points = batch(data, 0)
    copied = copy.deepcopy(network).double()
    before = F.cross_entropy(copied(points.x), points.y)
    (alpha,) = [sam(copied, lambda: F.cross_entropy(copied(points.x), points.y), 0, 0.2)]
    weights = float(torch.cat([value.flatten() for value in copied.parameters()]).norm())
    for value, change in zip(copied.parameters(), alpha, strict=True):
        value.data += change
    after = F.cross_entropy(copied(points.x), points.y)
    slopes = torch.autograd.grad(after, list(copied.parameters()))
    expected = {
        "loss": float(before),
        "sharpness": float(after - before),
        "perturbation_norm": 0.2,
        "weight_norm": weights,
        "grad_norm": float(torch.cat([slope.flatten() for slope in slopes]).norm()),
    }
    trainer(tmp_path, steps=2, log_every_n_steps=1).fit(SupervisedLearner(network, None, SAM(0.2)), data)
    logged = scalars(tmp_path)
    for name, value in expected.items():
        assert logged[f"train/{name}"][0] == (1, pytest.approx(value, rel=1e-4)), name
    assert float(after) > float(before)


def test_noise_logs_its_size_alone(tmp_path):
    trainer(tmp_path, steps=2).fit(SupervisedLearner(mlp(), None, WeightNoise(0.1)), classes())
    logged = scalars(tmp_path)
    # 67 weights
    assert logged["train/perturbation_norm"][0][1] == pytest.approx(0.1 * 67**0.5, rel=0.3)
    assert "train/sharpness" not in logged


def test_plain_training_logs_no_perturbation(tmp_path):
    trainer(tmp_path, log_every_n_steps=2).fit(SupervisedLearner(mlp()), classes())
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["train/weight_norm"]] == [2, 4]
    assert not {"train/perturbation_norm", "train/sharpness"} & logged.keys()
    assert {"val/loss", "val/accuracy"} <= logged.keys()


@pytest.mark.parametrize("size", [7, 30, 64])
def test_scores_are_means_over_rows_whatever_the_batches(size, tmp_path):
    data = BatchDataModule(blobs(spread=2.0), batch_size=size)
    module = SupervisedLearner(mlp()).double()
    run = bare(tmp_path, steps=2, precision="64-true")
    run.fit(module, data)
    for split, judge in (("val", run.validate), ("test", run.test)):
        judge(module, data, verbose=False)
        points = data.points(split)
        with torch.no_grad():
            prediction = module(points.x)
        accuracy = MulticlassAccuracy(3, average="micro")(prediction, points.y)
        assert module.scores == {
            "learned": {
                "loss": pytest.approx(float(F.cross_entropy(prediction, points.y)), rel=1e-12),
                "accuracy": pytest.approx(float(accuracy), rel=1e-6),
            }
        }
        assert 0 < module.scores["learned"]["accuracy"] < 1
        assert float(run.callback_metrics[f"{split}/loss"]) == pytest.approx(module.scores["learned"]["loss"], rel=1e-6)


def test_real_targets_have_no_accuracy(tmp_path):
    data = BatchDataModule(regression(), batch_size=7)
    module = SupervisedLearner(mlp(3, 1), optimizer=partial(torch.optim.SGD, lr=0.2)).double()
    run = trainer(tmp_path, steps=100, precision="64-true", val_check_interval=1.0, log_every_n_steps=1000)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    points = data.points("test")
    with torch.no_grad():
        expected = MeanSquaredError()(module(points.x), points.y)
    assert module.scores == {"learned": {"loss": pytest.approx(float(expected), rel=1e-6)}}
    assert float(expected) < 0.1
    logged = scalars(tmp_path)
    assert logged["test/loss"][0] == (100, pytest.approx(float(expected), rel=1e-5))
    assert "val/accuracy" not in logged


def test_a_loss_of_ones_own_and_rows_from_any_loader(tmp_path):
    x = draw(20, 3, seed=1).float()
    rows = DataLoader(list(zip(x, x[:, :2], strict=True)), batch_size=8)
    module = SupervisedLearner(mlp(3, 2), nn.L1Loss(reduction="none"))
    run = bare(tmp_path, steps=3)
    run.fit(module, rows, rows)
    with torch.no_grad():
        expected = (module(x) - x[:, :2]).abs().mean()
    assert module.scores["learned"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_rows_whose_loss_is_nan_count(tmp_path):
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.where(torch.arange(len(x)) == 0, torch.nan, 1.0)[:, None]

    module = SupervisedLearner(Broken(4, 3))
    bare(tmp_path).validate(module, classes(), verbose=False)
    assert math.isnan(module.scores["learned"]["loss"])


def test_one_logit_for_two_classes_where_the_criterion_takes_it(tmp_path):
    class Binary(nn.BCEWithLogitsLoss):
        def forward(self, prediction, target):
            return super().forward(prediction[:, 0], target.double())

    network, data = mlp(4, 1), BatchDataModule(blobs(classes=2), batch_size=16)
    module = SupervisedLearner(network, Binary(reduction="none"), optimizer=partial(torch.optim.SGD, lr=0.1))
    run = bare(tmp_path, 20, precision="64-true")
    run.fit(module, data)
    run.test(module, data, verbose=False)
    points = data.points("test")
    right = ((module(points.x.double())[:, 0] > 0) == (points.y == 1)).double().mean()
    assert module.scores["learned"]["accuracy"] == pytest.approx(float(right))
    with pytest.raises(InputError, match="one output for each of 2 classes"):
        bare(tmp_path, 1).fit(SupervisedLearner(mlp(4, 1)), BatchDataModule(blobs(classes=2), batch_size=16))
