"""What a supervised learner cannot train is refused before its first step, and a trial leaves no trace."""

import copy
from functools import partial

import pytest
import torch
from fits import Kill, KilledError, bare, blobs, parameters, regression, same, trainer
from supervised_learners import TIGHT, batch, batchnorm, classes, mlp
from torch import nn
from torch.nn import functional as F

from metalit.data import BatchDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.modules import SupervisedLearner


def test_what_is_not_finite_stops(tmp_path):
    module = SupervisedLearner(mlp(3, 1), optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(NonFiniteError, match=r"at outer step 2\. .*No checkpoint"):
        trainer(tmp_path, log_every_n_steps=100, steps=6).fit(module, BatchDataModule(regression()))
    assert not list(tmp_path.rglob("*.ckpt"))


REFUSED = {
    "width": (lambda: mlp(5, 3), None, classes, r"cannot take inputs of shape \(2, 4\), 4 column"),
    "classes": (lambda: mlp(4, 2), None, classes, r"\(2, 2\) for two rows.*one output for each of 3 classes"),
    "outputs": (lambda: mlp(3, 2), None, partial(BatchDataModule, regression()), r", 2\) and the targets \(\d+, 1\)"),
    "reduction": (mlp, nn.CrossEntropyLoss(), classes, 'reduction="none"'),
}  # fmt: skip


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name, sanity, tmp_path):
    network, loss, data, told = REFUSED[name]
    module = SupervisedLearner(network(), loss)
    before = parameters(module)
    run = bare(tmp_path, num_sanity_val_steps=sanity)
    with pytest.raises(InputError, match=told):
        run.fit(module, data())
    assert run.global_step == 0
    assert same(module.outer(), before)


def test_a_trial_leaves_no_trace(tmp_path):
    network = batchnorm()
    with pytest.raises(KilledError):
        bare(tmp_path, callbacks=[Kill(0)]).fit(SupervisedLearner(network), classes())
    assert int(network[1].num_batches_tracked) == 0
    assert float(network[1].running_mean.abs().max()) == 0
    # the trial takes two rows of training, where validation may have but one
    bare(tmp_path).fit(SupervisedLearner(batchnorm()), BatchDataModule(blobs(), batch_size=16, val=0.008))


def test_refused_at_once():
    with pytest.raises(InputError, match="Flatten has no parameter that could be trained"):
        SupervisedLearner(nn.Flatten())

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

    with pytest.raises(InputError, match="has trainable parameters"):
        SupervisedLearner(mlp(), Weighted())
    with pytest.raises(InputError, match="clip_norm=-1"):
        SupervisedLearner(mlp(), clip_norm=-1.0)


def test_a_trial_leaves_the_buffers_of_a_layer_under_two_names(tmp_path):
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 3))
    held = norm.running_mean
    bare(tmp_path, 1).fit(SupervisedLearner(network), classes())
    assert norm.running_mean is held


def test_optimizers_that_evaluate_the_loss_themselves_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.optimizer: LBFGS evaluates the loss several times"):
        bare(tmp_path, 1).fit(SupervisedLearner(mlp(), optimizer=partial(torch.optim.LBFGS, lr=0.1)), classes())


class Penalised(nn.Module):
    """The squared error with a penalty on weights that it holds beside the network."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters_of = parameters

    def forward(self, prediction, target):
        return F.mse_loss(prediction, target, reduction="none") + sum(p.square().sum() for p in self.parameters_of())


def test_a_penalty_in_the_loss_is_part_of_the_gradient(tmp_path):
    network, data = mlp(3, 1), BatchDataModule(regression(), batch_size=7)
    by_network = Penalised(network.parameters)

    def loss(prediction, target):
        return F.mse_loss(prediction, target) + sum(p.square().sum() for p in copied.parameters())

    module = SupervisedLearner(network, by_network, optimizer=partial(torch.optim.SGD, lr=0.1)).double()
    copied = copy.deepcopy(module.network)
    bare(tmp_path, 1, precision="64-true").fit(module, data)
    points = batch(data, 0)
    slopes = torch.autograd.grad(loss(copied(points.x), points.y), list(copied.parameters()))
    for value, before, slope in zip(module.network.parameters(), copied.parameters(), slopes, strict=True):
        torch.testing.assert_close(value, before - 0.1 * slope, **TIGHT)


def test_a_loss_whose_gradient_would_be_lost_in_part_is_refused_before_training(tmp_path):
    network = mlp(3, 1)
    kept = list(network.parameters())
    run = bare(tmp_path, 1)
    with pytest.raises(InputError, match=r"loss: it reaches the module's 'out\.weight' by another way"):
        run.fit(SupervisedLearner(network, Penalised(lambda: kept)), BatchDataModule(regression(), batch_size=7))
    assert run.global_step == 0
