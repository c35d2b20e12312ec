"""What the tests share: one thread, the repository as working folder, and the command line as a function."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from costs import Costs
from hypothesis import settings
from repository import ROOT, TINY, TINY_BY_CLASS

# before torch is imported, in this process and in those that tests start; one that only shares out tests needs none
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "1"  # worth it from the fifth program on
settings.register_profile("metalit", deadline=None, derandomize=True, database=None)
settings.load_profile("metalit")


LONGEST = {"training", "compiling", "modules", "callbacks", "test_processes.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no process is left with it at the end."""
    items.sort(key=lambda item: not LONGEST & {*item.path.parts})


def pytest_configure(config: pytest.Config) -> None:
    """Count what tests cost."""
    config.pluginmanager.register(Costs(), "costs")


@pytest.fixture(scope="session", autouse=True)
def programs_are_counted(pytestconfig: pytest.Config) -> Iterator[None]:
    """Each compiled program is one of the costs of its test."""
    from metalit.compiling.compiled import CompiledProgram

    begin, costs = CompiledProgram.__init__, pytestconfig.pluginmanager.get_plugin("costs")

    def counted(*args: Any, **options: Any) -> None:
        costs.add("compiled programs")
        begin(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledProgram, "__init__", counted)
        yield


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name their data relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def signals_stay_as_they_were() -> Iterator[None]:
    """What ends in the middle of a fit leaves Lightning's handlers to the next test of the same process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def metalit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process, logging below ``tmp_path``; returns exit status and output."""
    from metalit.__main__ import main

    def run(subcommand: str, config: str, *options: str, tiny: bool = True) -> tuple[int, str]:
        pytestconfig.pluginmanager.get_plugin("costs").add("command lines")
        parts = yaml.safe_load(Path(config).read_text())
        classes = [parts[part]["class_path"] for part in ("model", "data") if part in parts]
        sizes = [*TINY, *(size for name in classes for size in TINY_BY_CLASS.get(name, ()))] if tiny else []
        status = main(
            [subcommand, "--config", config, f"--trainer.default_root_dir={tmp_path}", *sizes, *map(str, options)]
        )
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


_KEPT: dict[str, Path] = {}


@pytest.fixture
def trained(
    metalit: Callable[..., tuple[int, str]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], None]:
    """Put a run of a config below ``tmp_path``, trained once for all tests that only read it."""

    def put(config: str) -> None:
        if config not in _KEPT:
            root = tmp_path_factory.mktemp("kept")
            assert metalit("fit", config, f"--trainer.default_root_dir={root}")[0] == 0
            _KEPT[config] = root / "lightning_logs"
        shutil.copytree(_KEPT[config], tmp_path / "lightning_logs", dirs_exist_ok=True)

    return put


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process of its own."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)

    return run
