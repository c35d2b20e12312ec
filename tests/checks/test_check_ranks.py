"""Which processes can train as one: what would train alone, or hold a part of the parameters, is refused."""

from types import SimpleNamespace

import pytest
from fits import bare
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from ranks import meta, sine

from metalit.checks.ranks import check_ranks
from metalit.errors import InputError

TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "none"}
SLURM = {"JOB_ID": 17, "JOB_NAME": "train", "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 2}


@pytest.mark.parametrize("starter", ["torchrun", "SLURM"])
def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch, starter):
    names = TORCHRUN if starter == "torchrun" else {f"SLURM_{name}": value for name, value in SLURM.items()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    count = "WORLD_SIZE" if starter == "torchrun" else "SLURM_STEP_NUM_TASKS"
    monkeypatch.setenv(count, "2")
    with pytest.raises(InputError, match=r"trainer\.devices.*2 processes were started.* 1 device.* on each of 1 node"):
        bare(tmp_path, 1, devices=1).fit(meta(), sine())
    monkeypatch.setenv(count, "1")
    bare(tmp_path, 1, devices=1).fit(meta(), sine())


def test_tasks_of_an_interactive_job_are_refused(tmp_path, monkeypatch):
    """Which Lightning takes for processes that know nothing of each other."""
    for name, value in {**SLURM, "JOB_NAME": "interactive", "STEP_NUM_TASKS": 2}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(InputError, match=r"2 processes were started.*use sbatch"):
        bare(tmp_path, 1, devices=1).fit(meta(), sine())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a notebook in a larger job
    bare(tmp_path, 1, devices=1).fit(meta(), sine())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_split_parameters_are_refused(strategy):
    with pytest.raises(InputError, match=rf"trainer\.strategy: {strategy.__name__} .*use ddp"):
        check_ranks(SimpleNamespace(strategy=strategy()))
    environment = SimpleNamespace(cluster_environment=SimpleNamespace(creates_processes_externally=False))
    check_ranks(SimpleNamespace(strategy=DDPStrategy(), world_size=2, _accelerator_connector=environment))
