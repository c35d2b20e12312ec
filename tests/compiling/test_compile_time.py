"""How long compiling takes: it is bounded, a signal ends it, what is waited for is told, and noise is not."""

import logging
import os
import re
import signal
import time
import warnings
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fits import Kill, KilledError, last, same, trainer

from metalit.callbacks import BestCheckpoint, LastCheckpoint, StopOnSignal
from metalit.compiling import patience, program
from metalit.compiling.compiled import Compiled
from metalit.compiling.durations import expected, remember
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError, StoppedError
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner, two_level
from metalit.networks import MLP
from metalit.problems import FewShot, ThetaPhi
from metalit.training.batches import Batches
from metalit.training.ranks import compile_patience


def compiler(monkeypatch, before=lambda: None):
    """In place of the compiler: what was traced runs as it stands, after ``before``."""

    def compile(graph, _):
        before()
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(program, "compile_graph", compile)


def idle():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        sum(range(100))


def learner(fused=1, **options):
    torch.manual_seed(0)
    network = MLP([1, 4, 1])
    return MetaLearner(FewShot(network), SGD(0.05), Unrolled(1), eval_steps=1, fused_steps=fused, **options)


def fit(root, module, *callbacks, ckpt_path=None):
    data = TaskDataModule(Sine(), *[Episodes(2, 5, 5)] * 3)
    callbacks = [BestCheckpoint(), LastCheckpoint(), StopOnSignal(), *callbacks]
    run = trainer(root, 4, callbacks=callbacks, log_every_n_steps=4)
    run.fit(module, data, ckpt_path=ckpt_path)
    return module


def test_a_compiler_that_takes_too_long_is_given_up_in_one_line(monkeypatch):
    compiler(monkeypatch, idle)
    said = []
    slow = Compiled(lambda x: 3 * x, name="it", tell=said.append, seconds=0.3)
    for _ in range(2):
        assert torch.equal(slow(torch.ones(2)), torch.full((2,), 3.0))
    assert slow.failed
    told = "it is not compiled, and runs as it stands: compiling was given up: it takes longer than 0.3 s"
    assert said[1:] == [told]


@pytest.mark.parametrize("fused", [1, 2])
def test_a_run_whose_compilation_is_given_up_goes_on(fused, monkeypatch, tmp_path, capsys):
    compiler(monkeypatch, idle)
    found = fit(tmp_path / "slow", learner(fused, compile=True, compile_seconds=0.3))
    assert capsys.readouterr().out.count("compiling was given up: it takes longer than 0.3 s") == 1
    assert same(found, fit(tmp_path / "plain", learner(fused)))


@pytest.mark.parametrize("fused", [1, 2])
def test_a_signal_ends_a_compilation_and_nothing_differs(fused, monkeypatch, tmp_path):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        idle()

    def fitted(root, *callbacks, **options):
        return fit(root, learner(fused, compile=True), *callbacks, **options)

    compiler(monkeypatch)
    whole = fitted(tmp_path / "whole")
    # before the first step, and again before the first one after it was resumed
    compiler(monkeypatch, stop)
    with pytest.raises(StoppedError, match=r"^stopped by a signal before the first outer step$") as stopped:
        fitted(tmp_path / "run")
    assert stopped.value.checkpoint is None
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    compiler(monkeypatch)
    with pytest.raises(KilledError):
        fitted(tmp_path / "run", Kill(2))
    compiler(monkeypatch, stop)
    told = r"^stopped by a signal after outer step 2, saved in .*last\.ckpt$"
    with pytest.raises(StoppedError, match=told) as stopped:
        fitted(tmp_path / "run", ckpt_path=last(tmp_path / "run"))
    assert (stopped.value.step, str(stopped.value.checkpoint)) == (2, last(tmp_path / "run"))
    compiler(monkeypatch)
    assert same(fitted(tmp_path / "run", ckpt_path=last(tmp_path / "run")), whole)


@pytest.mark.parametrize(
    "made", [learner, partial(BilevelLearner, ThetaPhi([1.0], [1.0]), SGD(), Unrolled())], ids=["meta", "bilevel"]
)
@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(made, seconds):
    with pytest.raises(InputError, match=rf"^model\.compile_seconds={seconds} must be a positive number of seconds"):
        made(compile_seconds=seconds)


def test_ranks_wait_for_each_other_half_their_patience_at_most():
    class Several:
        def __init__(self, size, seconds):
            self.world_size = size
            self.strategy = SimpleNamespace(_timeout=seconds and timedelta(seconds=seconds))

    for size, timeout, seconds in ((1, 60, 300), (2, 60, 30), (2, 1800, 300), (2, None, 300)):
        assert compile_patience(Several(size, timeout), 300) == seconds


def test_what_is_logged_is_compiled_no_longer_than_the_step(monkeypatch, tmp_path):
    waits = {}
    monkeypatch.setattr(two_level, "compile_patience", lambda trainer, seconds: seconds / 2)
    monkeypatch.setattr(Batches, "wait_at_most", lambda self, seconds: waits.update({self: seconds}))
    data = TaskDataModule(Sine(), *[Episodes(2, 5, 5)] * 3)
    trainer(tmp_path).validate(learner(compile=True, compile_seconds=8.0), data, verbose=False)
    assert list(waits.values()) == [4.0, 4.0]


# ---- what is told


def test_signs_of_life_say_how_long_it_takes(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(patience, "_SIGN", 0.3)
    said = []

    def waits():
        while not any("still" in line for line in said[1:]):
            time.sleep(0.01)

    compiler(monkeypatch, waits)
    for fn in (lambda x: 3 * x, lambda x: 4 * x):
        said.clear()
        assert not Compiled(fn, name="it", tell=said.append)(torch.ones(2)).isnan().any()
        begun, *signs, done = said
        assert begun.startswith("compiling it; ")
        assert done.startswith("compiled it in ")
        assert signs
        known = fn(1) == 4
        about = r" of about \d+ s" if known else ""
        assert all(re.fullmatch(rf"still compiling it: \d+ s{about}", line) for line in signs)


def test_a_program_is_expected_to_take_what_the_last_one_of_its_size_took(tmp_path):
    assert expected(tmp_path, 100) is None
    for size, seconds in ((100, 10.0), (1000, 50.0), (100, 20.0)):
        remember(tmp_path, size, seconds)
    assert expected(tmp_path, 100) == 20
    assert expected(tmp_path, 110) == pytest.approx(22)
    assert expected(tmp_path, 2000) == pytest.approx(100)
    for _ in range(200):
        remember(tmp_path, 7, 7.0)
    assert expected(tmp_path, 1000) == pytest.approx(1000)
    (file,) = tmp_path.iterdir()
    for broken in ("", "[1]", '[["a", 1]]', "{}"):
        file.write_text(broken)
        assert expected(tmp_path, 100) is None
    remember(tmp_path / "none", 1, 1.0)


@pytest.mark.parametrize("asked", [False, True])
def test_what_the_compiler_warns_of_is_not_the_users(asked, monkeypatch, caplog):
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    if asked:
        monkeypatch.setenv("TORCH_LOGS", "+inductor")
    log = logging.getLogger("compiler")

    def noise():
        warnings.warn("lowering of x is deprecated", FutureWarning, stacklevel=1)
        log.warning("x is missing a shim")

    compiler(monkeypatch, noise)

    def warns(x):
        warnings.warn("of the user's own", UserWarning, stacklevel=1)
        return 2 * x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Compiled(warns, tell=lambda line: None)(torch.ones(2))
    assert {str(warning.message) for warning in caught} == {"of the user's own"}
    log.warning("of the user's log")
    logged = [record.message for record in caplog.records if record.name == "compiler"]
    assert logged == ["x is missing a shim"] * asked + ["of the user's log"]
