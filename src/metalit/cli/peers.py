"""The processes of one run end together: none is left where another one fails, and one line says so."""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from lightning.pytorch import Trainer

from metalit.cli.parent import mark_first
from metalit.errors import StoppedError
from metalit.private_lightning import cluster_environment, started_processes
from metalit.runs import where_it_failed

_GRACE = 2.0  # seconds in which the others may say themselves why they end
_SOURCE = re.compile(r"^\[[^\]]*\.cc:\d+\] ")
_LONGEST = 160  # letters of a reason


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Where this process fails, those that it has started end too: one that is frozen never would by itself."""
    if not cluster_environment(trainer).creates_processes_externally:
        mark_first()
    try:
        yield
    except StoppedError:  # all leave after the same step
        raise
    except Exception:
        _end(started_processes(trainer.strategy))
        raise


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        process.kill()


def lost_others(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone, or does not answer.

    >>> lost_others(RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60034."))
    True
    """
    between = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )
    return between and "EADDRINUSE" not in str(error)


def explain(error: BaseException) -> str:
    """What was being done, what torch says, and the way out.

    >>> explain(RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:60034. GLHF"))[:92]
    'another process of this run is gone, or hangs (Connection closed by peer [127.0.0.1]:60034);'
    """
    doing, _ = where_it_failed(error)
    reason = _SOURCE.sub("", str(error).strip()).splitlines()[0].split(". ")[0].rstrip(".")[:_LONGEST]
    return (
        f"another process of this run is gone, or hangs{f', {doing}' if doing else ''} ({reason}); see what it said; "
        "the same command with --ckpt_path auto goes on from the last checkpoint, if there is one"
    )
