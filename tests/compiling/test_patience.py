"""Waiting: for a value, for so long at most, until it is given up, with signs of life."""

import cProfile
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from metalit.compiling import patience
from metalit.compiling.patience import GivenUpError, give_up, is_waiting, patiently


def never(passed):
    pytest.fail("a sign of life")


def idle():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        sum(range(100))


def catches_exceptions():
    for _ in range(3):
        try:
            idle()
        except Exception:
            pytest.fail("it is no failure of a part")


def catches_everything():
    for _ in range(2):
        with suppress(BaseException):  # as libraries do
            idle()
    idle()


def makes_it_another_error():
    try:
        idle()
    except BaseException as error:
        raise RuntimeError("many lines") from error


def waits_for_a_process():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=True)


class Finalised:
    """Is given up while Python clears it away."""

    def __del__(self):
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            sum(range(100))


def clears_away():
    Finalised()
    idle()


def test_nothing_is_raised_where_python_would_print_it(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with pytest.raises(GivenUpError):
        patiently(clears_away, 0.2, never)
    assert not printed


SLOW = [idle, catches_exceptions, catches_everything, makes_it_another_error, waits_for_a_process]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """And nothing is left behind."""
    monkeypatch.setattr(patience, "_AGAIN", 0.1)
    monkeypatch.setattr(patience, "_TICK", 0.05)
    before = signal.getsignal(signal.SIGURG), threading.active_count()
    yield
    assert (signal.getsignal(signal.SIGURG), threading.active_count()) == before
    assert not is_waiting()


def test_a_value_is_returned():
    assert patiently(lambda: (is_waiting(), 3), 60.0, never) == (True, 3)


def test_an_error_is_raised():
    def wrong():
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        patiently(wrong, 60.0, never)


@pytest.mark.parametrize("slow", SLOW)
def test_what_takes_too_long_is_given_up(slow):
    with pytest.raises(GivenUpError, match=r"^it takes longer than 0\.2 s$") as raised:
        patiently(slow, 0.2, never)
    assert raised.value.instead is None


@pytest.mark.parametrize("slow", SLOW[:-1])
def test_what_takes_too_long_in_another_thread_is_given_up(slow):
    found = []

    def run():
        try:
            patiently(slow, 0.2, never)
        except GivenUpError as error:
            found.append(str(error))
        # what was not raised in time is not raised later
        sum(range(100_000))
        found.append("goes on")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["it takes longer than 0.2 s", "goes on"]


@pytest.mark.parametrize("seconds", [0.2, 60.0], ids=["given up", "ended in time"])
def test_what_ended_in_another_thread_leaves_profilers_alone(seconds):
    def run():
        with suppress(GivenUpError):
            patiently(idle if seconds < 1 else int, seconds, never)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    faulthandler.dump_traceback_later(30, exit=True)  # no signal is heard where it hangs
    profile = cProfile.Profile()
    try:
        assert profile.runcall(lambda: sum(range(10))) == 45
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("slow", SLOW)
def test_a_signal_ends_it(slow):
    before = signal.signal(signal.SIGUSR1, lambda *_: give_up("told to", KeyError("instead")))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(GivenUpError, match="told to") as raised:
            patiently(slow, 60.0, never)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(raised.value.instead, KeyError)


def test_what_comes_first_is_not_ended_half_done():
    done = []

    def first():
        give_up("told to")
        done.append("first")

    with pytest.raises(GivenUpError, match="told to"):
        patiently(lambda: done.append("then"), 60.0, never, first)
    assert done == ["first"]


def test_giving_up_where_nothing_is_waited_for_does_nothing():
    give_up("nothing")


def test_signs_of_life_come_until_it_ends(monkeypatch):
    monkeypatch.setattr(patience, "_SIGN", 0.2)
    signs = []

    def waits():
        while len(signs) < 3:
            time.sleep(0.01)
        return "done"

    assert patiently(waits, 60.0, signs.append) == "done"
    assert all(sign >= 0.2 * (number + 1) for number, sign in enumerate(signs))
