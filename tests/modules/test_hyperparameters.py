"""What TensorBoard's HPARAMS tab shows of a run."""

from functools import partial

import numpy as np
import pytest
import torch
from fits import Kill, KilledError, blobs, last, regression, scalars, trainer
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data import BatchDataModule, Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.hypergradients import Implicit, Unrolled
from metalit.inner import SGD, Learned, Newton
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import FewShot, Ridge


def shown(folder):
    """The hyperparameters and the names of the metrics, as the tab gets them."""
    found, metrics = {}, set()
    for file in folder.glob("events*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name != "hparams":
                    continue
                data = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for name, kept in data.session_start_info.hparams.items():
                    found[name] = getattr(kept, kept.WhichOneof("kind"))
                metrics |= {info.name.tag for info in data.experiment.metric_infos}
    return found, metrics


def run_of(tmp_path):
    return tmp_path / "run/version_0"


def meta(lr=0.05, **options):
    learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(lr), Unrolled(2), eval_steps=2, **options)
    return learner, TaskDataModule(Sine(), Episodes(4, 5, 6), Episodes(4, 5, 6), Episodes(4, 5, 6))


def test_the_first_five_are_what_runs_are_compared_by(tmp_path):
    warm = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.5)  # the rate is the one that was given
    learner, data = meta(Learned(0.05), optimizer=partial(torch.optim.AdamW, lr=0.25), scheduler=warm)
    trainer(tmp_path, 2).fit(learner, data)
    found, metrics = shown(run_of(tmp_path))
    assert [(name, found[name]) for name in sorted(found)][:5] == [
        ("inner lr", 0.05),
        ("inner steps", 2.0),
        ("lr", 0.25),
        ("network", "MLP 1-4-1"),
        ("optimizer", "AdamW"),
    ]
    assert {name: found[name] for name in ("shots", "queries", "tasks", "outer steps", "source")} == {
        "shots": 5.0,
        "queries": 6.0,
        "tasks": 4.0,
        "outer steps": 2.0,
        "source": "Sine",
    }
    assert found["problem"] == "FewShot, SGD, Unrolled"
    assert metrics == {"val/loss_best"}


def test_a_run_of_the_command_line_shows_no_more(metalit, tmp_path):
    metalit("fit", "configs/sine_maml.yaml")
    found, metrics = shown(tmp_path / "lightning_logs/sine_maml/version_0")
    assert (found["inner lr"], found["lr"], found["scheduler"]) == (0.01, 0.003, "CosineAnnealingLR")
    assert metrics == {"val/loss_best"}
    assert all("/" not in name and value != "None" for name, value in found.items())


def test_the_loss_is_the_best_one_also_of_a_run_that_goes_on(tmp_path):
    def rising():
        return meta(optimizer=partial(torch.optim.SGD, lr=0.2, maximize=True))

    torch.manual_seed(0)
    learner, data = rising()
    callbacks = [BestCheckpoint(), LastCheckpoint(0.0)]
    with pytest.raises(KilledError):
        trainer(tmp_path, 4, val_check_interval=1, callbacks=[*callbacks, Kill(2)]).fit(learner, data)
    run = trainer(tmp_path, 4, val_check_interval=1)
    learner, data = rising()
    run.fit(learner, data, ckpt_path=last(tmp_path))
    losses = [value for _, value in scalars(tmp_path)["val/loss"]]
    best = [value for _, value in scalars(tmp_path)["val/loss_best"]]
    assert len(losses) == 4
    assert min(losses[:2]) < min(losses[2:])
    assert best == list(np.minimum.accumulate(losses))


def test_the_highest_where_that_is_the_best(tmp_path):
    torch.manual_seed(0)
    learner = SupervisedLearner(MLP([4, 3]), optimizer=partial(torch.optim.SGD, lr=0.1, maximize=True))
    run = trainer(tmp_path, 4, callbacks=[BestCheckpoint("val/accuracy")])
    run.fit(learner, BatchDataModule(blobs(), batch_size=30))
    found, metrics = shown(run_of(tmp_path))
    assert metrics == {"val/accuracy_best"}
    values = [value for _, value in scalars(tmp_path)["val/accuracy"]]
    assert scalars(tmp_path)["val/accuracy_best"][-1][1] == max(values)
    assert (found["network"], found["tasks"]) == ("MLP 4-3", 30.0)


def test_of_a_bilevel_learner_without_checkpoints(tmp_path):
    learner = BilevelLearner(Ridge(3), Newton(), Implicit(1)).double()
    trainer(tmp_path, 2, callbacks=[]).fit(learner, SplitsDataModule(regression()))
    assert shown(run_of(tmp_path)) == ({}, set())
    assert scalars(tmp_path)["val/loss"]
