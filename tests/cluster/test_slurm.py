"""A real SLURM of two nodes on this machine: a job is told to stop, is requeued and goes on.

    make test-cluster

It needs root, and Debian's slurm-wlm and munge; without them it is skipped, and says so.
"""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch.utils._pytree import tree_leaves

TOOLS = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "scontrol")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin")]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root and slurm-wlm, munge; lacks {MISSING}"),
]
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
TRAIN = (
    "--config=configs/sine_maml.yaml",
    "--model.compile=false",
    "--model.fused_steps=1",
    "--data.train.tasks=4",
    "--data.val.tasks=4",
    "--figures.tasks=0",
    "--trainer.max_steps=1500",
    "--trainer.val_check_interval=500",
)


def sh(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def until(condition, what, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come within {seconds} s")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _munge():
    """Start munge, if it does not run."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    user = pwd.getpwnam("munge")
    for folder in ("/run/munge", "/etc/munge", "/var/lib/munge", "/var/log/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        sh("chown", "-R", "munge:munge", folder)
    if not Path("/etc/munge/munge.key").exists():
        sh("mungekey", "--create", user=user.pw_uid, group=user.pw_gid)
    Path("/run/munge").chmod(0o755)
    sh("munged", user=user.pw_uid, group=user.pw_gid)
    until(lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0, "munge", 20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which its commands find the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["PATH"] += ":/usr/sbin"
    _munge()
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    ports = {name: free_port() for name in ("port", "first", "second")}
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, **ports))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        sh(*command, env=environment)
    try:
        until(lambda: sh("sinfo", "-h", "-o", "%D %t", env=environment).strip() == "2 idle", "two idle nodes", 60)
        yield environment
    finally:
        for file in folder.glob("*.pid"):
            subprocess.run(["kill", file.read_text().strip()], check=False)


def submit(cluster, root, name, *options):
    """Submit the shipped script, on the CPU; returns the job's number."""
    environment = {**cluster, "METALIT": f"{root}/metalit", "METALIT_TRAINER": "configs/trainer/cpu.yaml"}
    environment["MASTER_ADDR"] = "127.0.0.1"  # the nodes' names are SLURM's alone
    (root / "metalit").write_text(f'#!/bin/sh\nexec {sys.executable} -m metalit "$@"\n')
    (root / "metalit").chmod(0o755)
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--parsable"]
    command = ["sbatch", *shape, f"--job-name={name}", f"--output={root}/{name}.log", "scripts/slurm.sbatch", *TRAIN]
    command += ["--trainer.strategy=ddp", f"--trainer.default_root_dir={root}", *options]
    return sh(*command, env=environment, cwd=ROOT).strip()


def state(cluster, job):
    fields = sh("scontrol", "show", "job", job, env=cluster).split()
    return dict(field.split("=", 1) for field in fields if "=" in field)


def ended(cluster, job):
    def over():
        found = state(cluster, job)
        return found if found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT") else None

    return until(over, f"the end of job {job}", 400)


def values(root, name):
    (path,) = root.glob(f"lightning_logs/{name}_*/version_0/checkpoints/last.ckpt")
    kept = torch.load(path, weights_only=True)
    return kept["global_step"], tree_leaves(
        [kept[part] for part in ("state_dict", "optimizer_states", "lr_schedulers")]
    )


def test_a_job_that_is_told_to_stop_is_requeued_and_ends_as_if_it_had_not_been(cluster, tmp_path):
    job = submit(cluster, tmp_path, "stopped", "--last_checkpoint.seconds=0.5")
    log = tmp_path / "stopped.log"
    try:
        until(lambda: list(tmp_path.rglob("last.ckpt")), "a first checkpoint")
    except AssertionError:
        print(log.read_text() if log.exists() else state(cluster, job))
        raise
    sh("scancel", "--signal=USR1", job, env=cluster)
    until(lambda: "put back into the queue" in log.read_text(), "the requeue")
    step, _ = values(tmp_path, "stopped")
    assert 0 < step < 1500
    assert f"stopped by a signal after outer step {step}, saved in" in log.read_text()
    # SLURM lets a job that was requeued wait for two minutes, unless it is told not to; its nodes refuse it for seconds
    until(lambda: state(cluster, job)["JobState"] == "PENDING", "the job in the queue", 60)
    time.sleep(5)
    sh("scontrol", "update", f"JobId={job}", "StartTime=now", env=cluster)
    found = ended(cluster, job)
    told = log.read_text()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), told
    assert told.count("going on from") == 1
    assert f"at step {step}" in told
    assert told.count("put back into the queue") == 1
    assert not list(tmp_path.rglob("hpc_ckpt*"))

    assert ended(cluster, submit(cluster, tmp_path, "whole"))["JobState"] == "COMPLETED"
    ends = [values(tmp_path, name) for name in ("stopped", "whole")]
    assert ends[0][0] == ends[1][0] == 1500
    for value, other in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_a_job_that_is_cancelled_is_saved_and_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path, "cancelled", "--last_checkpoint.seconds=0.5", "--trainer.max_steps=1000000")
    until(lambda: list(tmp_path.rglob("last.ckpt")), "a first checkpoint")
    sh("scancel", job, env=cluster)
    found = ended(cluster, job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    log = tmp_path / "cancelled.log"
    until(lambda: "stopped by a signal after outer step" in log.read_text(), "the last words", 30)
    step, _ = values(tmp_path, "cancelled")
    assert f"after outer step {step}, saved in" in log.read_text()
