"""Ranks that are forked from this process: each has imported torch already, which takes longer than a small fit."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import find_free_network_port


def start_ranks(
    number: int, log: Path, fn: Callable[..., int | None], *args: Any, environment: Mapping[str, str] | None = None
) -> list[ForkProcess]:
    """Start ``fn(*args)`` on so many ranks, that Lightning takes for its own; what they say goes to ``log``."""
    context, port = multiprocessing.get_context("fork"), str(find_free_network_port())
    ranks = []
    for rank in range(number):
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": str(rank)} if number > 1 else {}
        ranks.append(context.Process(target=_run, args=(log, {**own, **(environment or {})}, fn, args)))
        ranks[-1].start()
    return ranks


def ended(ranks: list[ForkProcess], seconds: float = 600) -> list[int | None]:
    """The exit statuses of the ranks, that have so many seconds to end."""
    try:
        for rank in ranks:
            rank.join(seconds)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run_ranks(number: int, log: Path, fn: Callable[..., int | None], *args: Any) -> None:
    """Run ``fn(*args)`` on so many ranks to its end."""
    statuses = ended(start_ranks(number, log, fn, *args))
    assert statuses == [0] * number, log.read_text()


def _run(log: Path, environment: Mapping[str, str], fn: Callable[..., int | None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    sys.exit(fn(*args))
