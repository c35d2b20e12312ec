"""Where a process of several fails, those that it has started end, frozen or not; the reason is one line."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from metalit.__main__ import main
from metalit.cli import parent, peers
from metalit.errors import StoppedError


@pytest.fixture
def frozen(monkeypatch):
    """A process of another rank that is frozen, and the trainer that has started it."""
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(peers, "started_processes", lambda strategy: [process])
    monkeypatch.setattr(peers, "cluster_environment", lambda trainer: LightningEnvironment())
    monkeypatch.setattr(peers, "_GRACE", 0.05)
    monkeypatch.setenv(parent._FIRST, "")
    yield process, SimpleNamespace(strategy=None)
    process.kill()
    process.wait()


def test_one_that_is_frozen_ends_with_the_one_that_fails(frozen):
    process, trainer = frozen
    with pytest.raises(ZeroDivisionError), peers.ending_together(trainer):
        1 / 0  # noqa: B018
    assert os.environ[parent._FIRST] == str(os.getpid())
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("error", [None, StoppedError(3, None, False)])
def test_those_that_leave_by_themselves_are_left_alone(frozen, error):
    process, trainer = frozen
    try:
        with peers.ending_together(trainer):
            if error:
                raise error
    except StoppedError:
        pass
    assert process.poll() is None


def test_a_first_process_that_is_frozen_is_woken(monkeypatch):
    woken = []
    monkeypatch.setattr(os, "kill", lambda *arguments: woken.append(arguments))
    monkeypatch.setenv(parent._FIRST, str(os.getppid()))
    assert main(["fit", "--config=missing.yaml"]) == 2
    assert woken == [(os.getppid(), signal.SIGCONT)]
    monkeypatch.setenv(parent._FIRST, str(os.getpid()))
    assert main(["fit", "--config=missing.yaml"]) == 2
    assert len(woken) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.distributed.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined."),
            "Timed",
        ),
        (RuntimeError("[/a/gloo/tcp/pair.cc:553] Connection closed by peer [::1]:6. This is\ntypically"), "Connection"),
        (RuntimeError("[/a/gloo/tcp/buffer.cc:78] Timed out waiting 20000ms for recv"), "Timed out waiting 20000ms"),
    ],
)
def test_another_process_that_is_gone_is_told(error, reason, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("metalit.__main__._run", fail)
    assert main(["fit"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"metalit: error: another process of this run is gone, or hangs ({reason}")
    assert "--ckpt_path auto" in line
    assert not peers.lost_others(RuntimeError("in gloo"))
    assert not peers.lost_others(torch.distributed.DistNetworkError("port: 29500, EADDRINUSE"))
