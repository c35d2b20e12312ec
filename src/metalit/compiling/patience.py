"""Waiting for what cannot be asked to end, such as a compiler: with signs of life, a bound, and an end on request."""

import ctypes
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Any, TypeVar

Value = TypeVar("Value")

_TICK = 0.25  # seconds between two looks
_SIGN = 10.0  # seconds between two signs of life
_AGAIN = 1.0  # seconds until what did not end is told again: libraries catch everything here and there
_SIGNAL: signal.Signals | None = getattr(
    signal, "SIGURG", None
)  # nobody minds it if it comes late: by default it is ignored
_waits: list["_Wait"] = []


class GivenUpError(BaseException):
    """Ends what is waited for. It is no ``Exception``: a compiler would take that for a failure of one of its parts.

    Attributes:
        instead: what is to be raised in its place, if anything.
    """

    def __init__(self, reason: str = "", instead: Exception | None = None) -> None:
        super().__init__(reason)
        self.instead = instead


def patiently(
    fn: Callable[[], Value],
    seconds: float,
    sign: Callable[[float], None],
    first: Callable[[], None] = lambda: None,
) -> Value:
    """Return ``fn()``.

    Args:
        fn: it may leave nothing half done where it is ended at any point.
        seconds: how long it may take.
        sign: is called every ten seconds with the seconds that have passed, in another thread.
        first: is called before, and never ended half done; it does not count.

    Raises:
        GivenUpError: it took longer, or :func:`give_up` was called; whatever processes it started are waited for no
            more.
    """
    wait = _Wait(seconds, sign)
    _waits.append(wait)
    try:
        first()
        wait.begin()
        value = fn()
    except BaseException:
        # what comes out may be what a library made of it
        if wait.error is not None:
            raise wait.error from None
        raise
    finally:
        wait.end()
        _waits.remove(wait)
    if wait.error is not None:  # it was caught, and forgotten
        raise wait.error
    return value


def is_waiting() -> bool:
    """Whether this process waits for something."""
    return bool(_waits)


def give_up(reason: str, instead: Exception | None = None) -> None:
    """End what this process waits for; also from a signal's handler.

    Args:
        reason: what the :class:`GivenUpError` says.
        instead: what it carries.
    """
    for wait in _waits:
        wait.give_up(GivenUpError(reason, instead))


class _Wait:
    """One call of :func:`patiently`, and the thread that watches it."""

    def __init__(self, seconds: float, sign: Callable[[float], None]) -> None:
        self.seconds = seconds
        self.sign = sign
        self.error: GivenUpError | None = None
        self.thread = threading.get_ident()
        self.signal = _SIGNAL if threading.current_thread() is threading.main_thread() else None
        self.before: Any = None
        self.interrupted = False
        self.over = threading.Event()
        self.over.set()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        """Start to watch."""
        self.over.clear()
        if self.error is not None:
            raise self.error
        if self.signal is not None:
            self.before = signal.signal(self.signal, self._raise)
        self.watcher.start()

    def end(self) -> None:
        """Watch no more."""
        self.over.set()
        if self.watcher.ident is None:
            return
        self.watcher.join()
        if self.signal is not None:
            signal.signal(self.signal, signal.SIG_DFL if self.before is None else self.before)
        elif self.interrupted:
            # not taken back: CPython 3.11 would look for it for ever, and hang in the next profile of the process
            with suppress(GivenUpError):
                self._raise_there()
                while True:
                    pass

    def give_up(self, error: GivenUpError) -> None:
        """End it: at once in its own thread, else soon."""
        self.error = self.error or error
        if threading.get_ident() == self.thread and not self.over.is_set():
            raise self.error

    def _watch(self) -> None:
        begun = monotonic()
        signs, told = 0, begun - _AGAIN
        while not self.over.wait(_TICK):
            now = monotonic()
            if now - begun > self.seconds and self.error is None:
                self.error = GivenUpError(f"it takes longer than {self.seconds:g} s")
            if self.error is not None and now - told >= _AGAIN:
                told = now
                self._interrupt()
            elif self.error is None and now - begun >= _SIGN * (signs + 1):
                signs = int((now - begun) / _SIGN)
                self.sign(now - begun)

    def _interrupt(self) -> None:
        if self.signal is not None:
            # a real one: it ends the wait for a process too
            signal.pthread_kill(self.thread, self.signal)
        else:
            self.interrupted = True
            self._raise_there()

    def _raise(self, _: int, frame: FrameType | None) -> None:
        if self.error is None or self.over.is_set():
            return
        while frame is not None:
            if frame.f_code.co_name == "__del__":  # Python would print the error there, and go on; it is told again
                return
            frame = frame.f_back
        raise self.error

    def _raise_there(self) -> None:
        """Raise in the other thread, as soon as it runs Python."""
        error = ctypes.py_object(GivenUpError)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), error)
