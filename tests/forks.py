"""Ranks that are forked from this process: each has imported torch already, which takes longer than a small fit."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port


def run_ranks(number: int, log: Path, fn: Callable[..., None], *args: Any) -> None:
    """Run ``fn(*args)`` on so many ranks, where Lightning takes them for its own; what they say goes to ``log``."""
    context, port = multiprocessing.get_context("fork"), find_free_network_port()
    ranks = [context.Process(target=_run, args=(rank, number, port, log, fn, args)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(600)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * number, log.read_text()


def _run(rank: int, number: int, port: int, log: Path, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    if number > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    fn(*args)
