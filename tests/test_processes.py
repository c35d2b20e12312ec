"""Processes that are killed, frozen or told to stop: the others must not go on alone, and nothing may be lost."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forks import ended as ended_ranks
from forks import start_ranks
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from repository import ROOT
from torch.utils._pytree import tree_leaves

from metalit.__main__ import main

RUN = (
    "fit",
    "--config=configs/sine_maml.yaml",
    "--config=configs/trainer/cpu.yaml",
    "--model.compile=false",
    "--model.fused_steps=1",
    "--data.train.tasks=4",
    "--data.val.tasks=4",
    "--figures.tasks=0",
    "--trainer.val_check_interval=1.0",
    "--trainer.num_sanity_val_steps=0",
    "--last_checkpoint.seconds=0.3",
)
TWO = ("--trainer.strategy=ddp", "--trainer.devices=2")


def start(root, *options, before=("-m", "metalit"), environment=None):
    command = [sys.executable, *before, *RUN, f"--trainer.default_root_dir={root}", *options]
    # no pipe: a frozen process would keep it open
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    process.output = output
    return process


def ended(process, seconds=600):
    """Exit status and output; whatever is left of the process is killed."""
    try:
        status = process.wait(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.output.seek(0)
    return status, process.output.read()


def forked(ranks, root, *options, **environment):
    """The run in so many processes that need not start Python; root/log is what they say."""
    root.mkdir(exist_ok=True)
    devices = (f"--trainer.devices={ranks}", f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}")
    arguments = [*RUN, *devices, f"--trainer.default_root_dir={root}", *options]
    return start_ranks(ranks, root / "log", main, arguments, environment=environment)


def checkpoint(root, alive, seconds=600):
    """Wait for the first checkpoint that the run saves."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and alive():
        found = list(Path(root).rglob("last.ckpt"))
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


def running(process):
    return lambda: process.poll() is None


def child(process):
    """The process id of rank 1, which this process has started."""
    started = [(task / "children").read_text().split() for task in Path(f"/proc/{process.pid}/task").iterdir()]
    pids = [pid for some in started for pid in some]
    ranks = [pid for pid in pids if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return int(ranks[0])


def values(path):
    state = torch.load(path, weights_only=True)
    return state["global_step"], tree_leaves([state["state_dict"], state["optimizer_states"], state["lr_schedulers"]])


def same_end(root, other, step):
    """Two runs have ended after that step, with the same values bit for bit."""
    ends = [values(next(folder.rglob("last.ckpt"))) for folder in (root, other)]
    assert ends[0][0] == ends[1][0] == step
    for found, expected in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.long)])
def test_two_ranks_stop_together_where_one_is_told_to_and_go_on_as_if_they_had_not(tmp_path, who):
    options = ("--ckpt_path=auto", "--model.scheduler.init_args.T_max=1000")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    ranks = forked(2, stopped, *options, "--trainer.max_steps=1000000")
    checkpoint(stopped, ranks[0].is_alive)
    os.kill(ranks[who].pid, signal.SIGTERM)
    statuses, output = ended_ranks(ranks), (stopped / "log").read_text()
    assert statuses == [143, 143], output
    assert output.count("stopped by a signal after outer step ") == 1
    assert "--ckpt_path last" in output
    (saved,) = stopped.rglob("last.ckpt")
    step = values(saved)[0]
    assert f"outer step {step}, saved in {saved}" in output
    assert step > 0
    for root in (stopped, whole):
        statuses = ended_ranks(forked(2, root, *options, f"--trainer.max_steps={step + 15}"))
        assert statuses == [0, 0], (root / "log").read_text()
    assert "going on from" in (stopped / "log").read_text()
    assert "going on from" not in (whole / "log").read_text()
    same_end(stopped, whole, step + 15)


def test_a_signal_of_slurm_to_one_rank_requeues_the_job_once(tmp_path):
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    script.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ranks = forked(2, tmp_path / "runs", "--trainer.max_steps=1000000", **job)
    checkpoint(tmp_path / "runs", ranks[0].is_alive)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    statuses, output = ended_ranks(ranks), (tmp_path / "runs/log").read_text()
    assert statuses == [0, 0], output
    assert output.count("put back into the queue") == 1
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.parametrize("who", ["rank 1", pytest.param("rank 0", marks=pytest.mark.long)])
def test_no_rank_goes_on_alone_where_another_is_killed(tmp_path, who):
    process = start(tmp_path, *TWO, "--trainer.max_steps=1000000")
    checkpoint(tmp_path, running(process))
    other = child(process)
    os.kill(other if who == "rank 1" else process.pid, signal.SIGKILL)
    status, output = ended(process)
    assert status != 0, output
    assert "best checkpoint" not in output
    until = time.monotonic() + 60
    while Path(f"/proc/{other}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()


def test_a_rank_ends_with_the_first_one_before_they_have_met(tmp_path):
    """Rank 0 is killed as soon as it has started rank 1, which still imports torch."""
    process = start(tmp_path, *TWO, "--trainer.max_steps=1000000")
    other = None
    while other is None and process.poll() is None:
        with suppress(IndexError, OSError):
            other = child(process)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{other}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()
    _, output = ended(process)
    assert "metalit: rank 1: stopped: the process that started it is gone" in output


@pytest.mark.long
def test_a_rank_that_freezes_ends_the_run_after_the_timeout(tmp_path):
    ddp = (
        "--config=configs/trainer/gpus.yaml",
        "--config=configs/trainer/cpu.yaml",
        "--trainer.devices=2",
        "--trainer.strategy.timeout=0:00:30",
        "--trainer.strategy.process_group_backend=gloo",
    )
    process = start(tmp_path, *ddp, "--trainer.max_steps=1000000")
    checkpoint(tmp_path, running(process))
    other = child(process)
    os.kill(other, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        status, output = ended(process)
    finally:
        os.kill(other, signal.SIGKILL)
    assert status != 0, output
    assert 20 < time.monotonic() - begun < 120


NODES = (
    *("--config=configs/trainer/nodes.yaml", "--config=configs/trainer/cpu.yaml"),
    *("--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy.process_group_backend=gloo"),
)
SHORT = ("--trainer.max_steps=20", "--trainer.precision=64-true", "--trainer.val_check_interval=10")


def check_two_nodes_were_one(tmp_path, outputs):
    """What two nodes have written below two/ is what one process writes."""
    assert ended_ranks(forked(1, tmp_path / "one", *SHORT)) == [0], (tmp_path / "one/log").read_text()
    assert [text.count("best checkpoint") for text in outputs] == [1, 0]
    (one,), (two,) = ((tmp_path / name).rglob("last.ckpt") for name in ("one", "two"))
    assert values(one)[0] == values(two)[0] == 20
    for found, expected in zip(values(two)[1], values(one)[1], strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(list((tmp_path / "two").rglob("events*"))) == len(list((tmp_path / "one").rglob("events*")))


def test_two_nodes_that_torchrun_has_started_are_one_process(tmp_path):
    shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    arguments = [*RUN, *NODES, *SHORT, f"--trainer.default_root_dir={tmp_path / 'two'}"]
    nodes = []
    for node in ("0", "1"):
        own = {**shared, "RANK": node, "GROUP_RANK": node}
        nodes += start_ranks(1, tmp_path / f"log{node}", main, arguments, environment=own)
    statuses, outputs = ended_ranks(nodes), [(tmp_path / f"log{node}").read_text() for node in (0, 1)]
    assert statuses == [0, 0], outputs
    check_two_nodes_were_one(tmp_path, outputs)


@pytest.mark.long
def test_two_nodes_of_torchrun_are_one_process(tmp_path):
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    rendezvous.append(f"--master-port={find_free_network_port()}")
    nodes = [
        start(
            tmp_path / "two",
            *(*NODES, *SHORT),
            before=["-m", "torch.distributed.run", *rendezvous, f"--node-rank={node}", "-m", "metalit"],
        )
        for node in (0, 1)
    ]
    outputs = [ended(node) for node in nodes]
    assert [status for status, _ in outputs] == [0, 0], outputs
    check_two_nodes_were_one(tmp_path, [text for _, text in outputs])


@pytest.mark.long
def test_another_number_of_processes_goes_on_where_one_was(tmp_path):
    options = ("--trainer.precision=64-true", "--model.scheduler.init_args.T_max=20", "--ckpt_path=auto")
    for root, steps, more in (("parts", 10, ()), ("parts", 20, TWO), ("whole", 20, ())):
        status, output = ended(start(tmp_path / root, *options, f"--trainer.max_steps={steps}", *more))
        assert status == 0, output
        assert ("at step 10" in output) == (more == TWO)
    ends = [values(next((tmp_path / root).rglob("last.ckpt"))) for root in ("parts", "whole")]
    assert ends[0][0] == ends[1][0] == 20
    for found, expected in zip(ends[0][1], ends[1][1], strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
