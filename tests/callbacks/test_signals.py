"""A run that a signal stops: when it leaves, what it has saved, and whether its job is requeued."""

import os
import signal

import pytest
import torch
from fits import last, same, trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from metalit.callbacks import BestCheckpoint, LastCheckpoint, StopOnSignal
from metalit.callbacks.signals import ignore_signals, requeue
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError, StoppedError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot
from metalit.training.agreement import Agreement


class Send(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def fit(folder, steps=8, signals=(), ckpt_path=None, fused=1, **options):
    torch.manual_seed(0)
    module = MetaLearner(FewShot(MLP([1, 8, 1])), SGD(0.05), Unrolled(1), eval_steps=1, fused_steps=fused)
    data = TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(4, 5, 5), Episodes(4, 5, 5))
    callbacks = [BestCheckpoint(), LastCheckpoint(), StopOnSignal(), *signals]
    run = trainer(folder, steps, **{"val_check_interval": 4, "callbacks": callbacks, **options})
    run.fit(module, data, ckpt_path=ckpt_path)
    return module


NEVER = {"limit_val_batches": 0}
EPOCHS = {"limit_train_batches": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 2}


# every fourth step is followed by a validation, but for NEVER
@pytest.mark.parametrize(("step", "options"), [(1, {}), (4, {}), (6, {}), (4, NEVER), (2, EPOCHS), (4, EPOCHS)])
def test_a_signal_stops_the_run_after_its_step_which_is_saved_and_resumed(tmp_path, step, options):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=f"after outer step {step}, saved in .*last.ckpt") as stopped:
        fit(tmp_path / "stopped", signals=[Send(signal.SIGTERM, step)], **options)
    assert signal.getsignal(signal.SIGTERM) == before
    assert stopped.value.step == step
    assert not stopped.value.requeue
    assert str(stopped.value.checkpoint) == last(tmp_path / "stopped")
    kept = torch.load(stopped.value.checkpoint, weights_only=True)
    assert kept["global_step"] == step
    best = [state["best_model_score"] for name, state in kept["callbacks"].items() if name.startswith("Best")]
    assert (best[0] is not None) == (step >= 4 and options is not NEVER)
    resumed = fit(tmp_path / "stopped", ckpt_path=last(tmp_path / "stopped"), **options)
    assert same(resumed, fit(tmp_path / "whole", **options))


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    fit(tmp_path, signals=[Send(signal.SIGTERM, 8)])
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_as_training_ends_is_not_lightnings(tmp_path):
    """Whose handler talks to the other ranks, which may be leaving."""
    found, stop = [], StopOnSignal()

    class Look(Callback):
        def on_train_end(self, *_):
            found.append(signal.getsignal(signal.SIGTERM).__self__)

    fit(tmp_path, callbacks=[BestCheckpoint(), LastCheckpoint(), stop, Look(), SendIn(signal.SIGTERM, "on_train_end")])
    assert found == [stop]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigusr1_that_nobody_hears_stops_the_run_outside_of_slurm_too(tmp_path):
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(StoppedError, match="after outer step 2, saved in") as stopped:
        fit(tmp_path, signals=[Send(signal.SIGUSR1, 2)])
    assert not stopped.value.requeue
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_sigusr1_is_left_to_a_handler_of_the_users_but_in_a_job_of_slurm(tmp_path, monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        fit(tmp_path / "alone", signals=[Send(signal.SIGUSR1, 2)])
        assert heard == [1]
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        with pytest.raises(StoppedError) as stopped:
            fit(tmp_path / "job", signals=[Send(signal.SIGUSR1, 2)])
        assert stopped.value.requeue
        assert stopped.value.step == 2
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_lightning_saves_and_requeues_nothing_by_itself(tmp_path, monkeypatch):
    job = {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 17, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NTASKS_PER_NODE": 1}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    found = []

    class Look(Callback):
        def on_sanity_check_start(self, trainer, *_):
            found.append(type(trainer._accelerator_connector.cluster_environment))
            found.extend(signal.getsignal(number).__self__ for number in (signal.SIGTERM, signal.SIGUSR1))

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = StopOnSignal()
    fit(tmp_path, callbacks=[BestCheckpoint(), LastCheckpoint(), stop, Look()])
    assert found == [SLURMEnvironment, stop, stop]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


class SendIn(Callback):
    """Sends this process a signal in some hook."""

    def __init__(self, number, hook):
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("number", "hook"),
    [
        (signal.SIGUSR1, "on_fit_start"),
        (signal.SIGUSR1, "on_sanity_check_end"),
        (signal.SIGTERM, "on_sanity_check_end"),
        (signal.SIGTERM, "on_train_start"),
    ],
)
def test_a_signal_before_training_stops_the_run_after_its_first_step(tmp_path, monkeypatch, number, hook):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(StoppedError) as stopped:
            fit(tmp_path, signals=[SendIn(number, hook)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (stopped.value.step, stopped.value.requeue) == (1, number == signal.SIGUSR1)
    assert torch.load(stopped.value.checkpoint, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_ignored_while_a_stopped_run_leaves(tmp_path, monkeypatch, number):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(StoppedError):
            fit(tmp_path, signals=[Send(signal.SIGUSR1, 2), SendIn(number, "on_exception")])
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        ignore_signals()
        os.kill(os.getpid(), number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_run_of_fused_steps_stops_after_a_call(tmp_path):
    options = {"fused": 3, "steps": 9, "log_every_n_steps": 3, "val_check_interval": 9}
    with pytest.raises(StoppedError, match="after outer step 6, saved") as stopped:
        fit(tmp_path / "stopped", signals=[Send(signal.SIGTERM, 4)], **options)
    assert torch.load(stopped.value.checkpoint, weights_only=True)["global_step"] == 6
    resumed = fit(tmp_path / "stopped", ckpt_path=last(tmp_path / "stopped"), **options)
    assert same(resumed, fit(tmp_path / "whole", **options))


def test_a_run_that_saves_nothing_by_intent_is_left_to_lightning(tmp_path):
    found = []

    class Look(Callback):
        def on_train_batch_start(self, *_):
            found.append(getattr(signal.getsignal(signal.SIGTERM), "__self__", None))

    stop = StopOnSignal()
    fit(tmp_path, callbacks=[BestCheckpoint(), LastCheckpoint(), stop, Look()], fast_dev_run=1)
    assert len(found) == 1
    assert found[0] is not stop


def test_a_signal_ends_a_run_at_once_that_is_failing(tmp_path):
    found = []

    class Fail(Callback):
        def on_train_batch_start(self, *_):
            raise ValueError

        def on_exception(self, *_):
            found.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(ValueError):  # noqa: PT011
        fit(tmp_path, signals=[Fail()])
    assert found == [signal.SIG_DFL]


def test_a_run_that_saves_nothing_cannot_be_stopped_so(tmp_path):
    with pytest.raises(InputError, match=r"StopOnSignal: .*LastCheckpoint"):
        fit(tmp_path, callbacks=[StopOnSignal()])


@pytest.mark.parametrize(
    ("job", "asked"),
    [
        ({"SLURM_JOB_ID": "17"}, "requeue 17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 18_3"),
    ],
)
def test_a_job_is_requeued_by_its_number(tmp_path, monkeypatch, job, asked):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue() is None
    assert (tmp_path / "asked").read_text().strip() == asked
    script.write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    assert requeue() == f"scontrol {asked}: no such job"
    script.unlink()
    assert "No such file" in requeue()


def test_what_one_rank_wishes_all_grant():
    agreement = Agreement()
    agreement.request("save", lambda: False)
    agreement.request("stop", lambda: True)
    assert agreement.requests() == [0.0, 1.0]
    agreement.resolve([0.5, 0.0])  # another rank of two wants to save, and all know by now that none wants to stop
    assert agreement.any_rank("save")
    assert not agreement.any_rank("stop")
    assert not agreement.any_rank("requeue")
