"""Signs of life where there is no terminal."""

import re
import threading

import pytest
from fits import trainer
from lightning.pytorch import Callback

from metalit.callbacks import SignsOfLife
from metalit.callbacks.signs import _duration
from metalit.compiling.patience import patiently
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot


def small():
    module = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
    return module, TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(4, 5, 5), Episodes(8, 5, 5))


class Slow(Callback):
    """Holds up a run, after each of the hooks that are named, until two lines more are printed; keeps those."""

    def __init__(self, monkeypatch, *hooks):
        self.lines, self.printed = [], threading.Semaphore(0)
        monkeypatch.setattr("builtins.print", self.keep)
        for hook in hooks:
            setattr(self, hook, self.wait)

    def wait(self, *_):
        while self.printed.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.printed.acquire(timeout=60)

    def keep(self, line, **_):
        self.lines.append(line)
        self.printed.release()


def told(lines, pattern):
    return [line for line in lines if re.fullmatch(pattern, line)]


def test_tell_step_rate_time_left_and_the_last_validation(tmp_path, monkeypatch):
    module, data = small()
    slow = Slow(monkeypatch, "on_train_batch_start", "on_validation_batch_end")
    run = trainer(tmp_path, 4, callbacks=[SignsOfLife(0.01), slow])
    run.fit(module, data)
    assert all(line.startswith("metalit: ") for line in slow.lines)
    # the thread may print between the step and the hook that records its error
    assert told(slow.lines, r"metalit: step 1 of 4, [\d.e+]+ steps/s, \d+ s left(, train/loss [\d.]+)?")
    assert told(slow.lines, r"metalit: step 1 of 4, still at it, train/loss [\d.]+")
    assert told(slow.lines, r"metalit: step 2 of 4, validating: \d batch\(es\) done, train/loss [\d.]+")
    assert told(slow.lines, r"metalit: step 3 of 4, .*, train/loss [\d.]+, val/loss [\d.]+")


def test_tell_of_a_long_test_and_end_with_it(tmp_path, monkeypatch):
    module, data = small()
    slow = Slow(monkeypatch, "on_test_batch_end")
    signs = SignsOfLife(0.01)
    trainer(tmp_path, callbacks=[signs, slow]).test(module, data, verbose=False)
    assert told(slow.lines, r"metalit: testing: 1 batch\(es\) done")
    assert signs._over.is_set()


def test_end_with_a_run_that_fails(tmp_path):
    module, data = small()

    class Fails(Callback):
        def on_train_batch_start(self, *_):
            raise KeyError

    signs = SignsOfLife()
    with pytest.raises(KeyError):
        trainer(tmp_path, callbacks=[signs, Fails()]).fit(module, data)
    assert signs._over.is_set()


def test_are_silent_while_a_compiler_has_signs_of_its_own(tmp_path, monkeypatch):
    module, _ = small()
    run = trainer(tmp_path)
    signs, looked = SignsOfLife(0.001), threading.Semaphore(0)
    lines = []
    monkeypatch.setattr("builtins.print", lambda line, **_: lines.append(line))
    monkeypatch.setattr("metalit.callbacks.signs.is_waiting", lambda: looked.release() or True)
    signs.setup(run, module, "fit")
    patiently(lambda: [looked.acquire(timeout=60) for _ in range(3)], 60, print)
    signs.teardown(run, module, "fit")
    assert lines == []


def test_durations_are_as_a_person_says_them():
    assert [_duration(seconds) for seconds in (0.4, 89, 91, 5400, 86400)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "24 h 0 min",
    ]
