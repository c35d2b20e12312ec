"""What a config may name as the maker of an optimiser: nothing else is called."""

import sys
from pathlib import Path

import pytest
import yaml

MAML = "configs/sine_maml.yaml"
MODULE = """
from collections.abc import Callable
from pathlib import Path

import torch


def touches(command=None, **_):
    Path({mark!r}).touch()
    return 0


def says_nothing(lr):
    touches()
    return lambda groups: torch.optim.SGD(groups, lr)


def makes(lr: float) -> Callable[..., torch.optim.SGD]:
    return lambda groups: torch.optim.SGD(groups, lr)


def makes_at_once(groups) -> torch.optim.SGD:
    return torch.optim.SGD(groups, 0.25)


class Touches:
    def __init__(self, *_, **__):
        touches()


class Own(torch.optim.SGD):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, and the file that what must not be called makes."""
    (tmp_path / "ownmakers.py").write_text(MODULE.format(mark=str(tmp_path / "mark")))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mark"
    sys.modules.pop("ownmakers", None)


@pytest.fixture
def named(metalit, tmp_path):
    def run(value, key="optimizer"):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {key: value}}}))
        more = ("--model.scheduler=null",) if key == "optimizer" else ()
        return metalit("fit", MAML, f"--config={tmp_path / 'more.yaml'}", *more, "--trainer.max_steps=2")

    return run


def spec(path, **given):
    return {"class_path": path, "init_args": given}


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (spec("os.system", command="touch mark"), "may not name 'os.system'"),
        (spec("subprocess.Popen", args="touch"), "may not name 'subprocess.Popen'"),
        (spec("builtins.eval"), "may not name 'builtins.eval'"),
        (spec("ownmakers.touches", command="it"), "ownmakers.touches is a function that does not say"),
        (spec("ownmakers.says_nothing", lr=0.1), "ownmakers.says_nothing is a function that does not say"),
        ("ownmakers.touches", "ownmakers.touches"),
        (spec("ownmakers.Touches"), "ownmakers.Touches"),
        (spec("builtins.print"), "builtins.print"),
    ],
)
def test_what_makes_something_else_is_refused_and_not_called(value, told, key, named, own, tmp_path):
    status, output = named(value, key)
    assert status == 2
    message = output.strip().splitlines()[-1]
    assert message.startswith(f"metalit: error: model.{key}")
    assert told in message
    assert not own.exists()
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not Path("mark").exists()


@pytest.mark.parametrize(
    "value", [spec("ownmakers.makes", lr=0.25), "ownmakers.makes_at_once", spec("ownmakers.Own", lr=0.25)]
)
def test_what_makes_an_optimiser_is_used(value, named, own, tmp_path):
    status, output = named(value)
    assert status == 0, output
    (path,) = tmp_path.rglob("last.ckpt")
    import torch

    assert torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.25
