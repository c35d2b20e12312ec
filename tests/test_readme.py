"""What the README promises: its Python runs, its commands exist, its files are there."""

import importlib
import logging
import re
import warnings
from pathlib import Path

import pytest

import metalit.modules

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README.read_text()))
    assert {"fit", "test"} <= named <= targets


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README.read_text())) | set(
        re.findall(r"(?:configs|data|docs)/[\w/]+\.\w+", README.read_text())
    )
    assert "configs/sine_maml.yaml" in named
    missing = [path for path in named if "NAME" not in path and not Path(path).exists()]
    assert not missing


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(number, trained, tmp_path, monkeypatch, capfd, caplog):
    """In a folder where ``sine_maml`` has been trained for a few steps."""
    root = Path.cwd()
    trained("configs/sine_maml.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(root / "configs")
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    for chatty, level in ((logger, "INFO"), (logger.getChild("utilities.rank_zero"), "NOTSET")):  # as they are at first
        chatty.setLevel(level)
    exec(compile(blocks("python")[number], f"README.md block {number}", "exec"), {"__name__": "readme"})
    assert "Epoch" not in "".join(capfd.readouterr())
    assert not caplog.messages


def test_a_fit_in_python_has_no_warning_of_lightnings_own_making():
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        importlib.reload(metalit.modules)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning, stacklevel=1)
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["another"]
