"""What the tests share: one thread, the repository as working folder, and the command line as a function."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings

ROOT = Path(__file__).parent.parent
TINY = ("--trainer.max_steps=6", "--trainer.val_check_interval=0.5", "--trainer.log_every_n_steps=2")
TINY_BY_CLASS = {
    "TaskDataModule": ("--data.train.tasks=4", "--data.val.tasks=6", "--data.test.tasks=6", "--figures.tasks=0"),
    "MetaLearner": ("--model.compile=false", "--model.fused_steps=1"),  # which have tests of their own
    "BilevelLearner": ("--model.eval_steps=5",),
}

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too
settings.register_profile("metalit", deadline=None, derandomize=True, database=None)
settings.load_profile("metalit")


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name their data relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def metalit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process, logging below ``tmp_path``; returns exit status and output."""
    from metalit.__main__ import main

    def run(subcommand: str, config: str, *options: str, tiny: bool = True) -> tuple[int, str]:
        parts = yaml.safe_load(Path(config).read_text())
        classes = [parts[part]["class_path"] for part in ("model", "data") if part in parts]
        sizes = [*TINY, *(size for name in classes for size in TINY_BY_CLASS.get(name, ()))] if tiny else []
        status = main(
            [subcommand, "--config", config, f"--trainer.default_root_dir={tmp_path}", *sizes, *map(str, options)]
        )
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process of its own."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)

    return run
