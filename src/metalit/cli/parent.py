"""Processes that Lightning starts end with the one that started them, also before they have met."""

import os
import signal
import sys
import threading
import time

_FIRST = "METALIT_FIRST_PROCESS"


def mark_first() -> None:
    """Hand this process's id to the processes that it starts."""
    os.environ[_FIRST] = str(os.getpid())


def end_with_first() -> None:
    """In a process of another rank than the first: end it within a second once the first one is gone."""
    first, rank = os.environ.get(_FIRST), os.environ.get("LOCAL_RANK", "0")
    if first is not None and rank != "0":
        threading.Thread(target=_watch, args=(int(first), rank), daemon=True).start()


def wake_first() -> None:
    """In a process of another rank, which fails: wake the first one if it is frozen, so that it notices and ends."""
    first = os.environ.get(_FIRST)
    if first is not None and int(first) == os.getppid():
        os.kill(int(first), signal.SIGCONT)


def _watch(first: int, rank: str) -> None:
    while os.getppid() == first:
        time.sleep(0.5)
    sys.stderr.write(f"metalit: rank {rank}: stopped: the process that started it is gone\n")
    os._exit(1)
