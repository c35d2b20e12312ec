"""Ranks that Lightning has started, of which one dies or freezes: the job ends with an error, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kills import META
from repository import ROOT
from struck import PLACES
from tally import Tally

from metalit.checkpoints import read_checkpoint

pytestmark = pytest.mark.trust
TIMEOUT = 20
# to start Python, to notice, and to end, on a busy machine
PATIENCE = 60
RUN = (
    *("fit", "--config=configs/sine_maml.yaml", "--config=configs/trainer/gpus.yaml"),
    *("--config=configs/trainer/cpu.yaml", *META, "--model.fused_steps=1", "--figures.tasks=0"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.max_steps=1000000", "--last_checkpoint.seconds=0.3"),
    *("--trainer.devices=2", "--trainer.strategy.process_group_backend=gloo"),
)


class Struck(Tally):
    """How often a rank died or froze, and what was wrong then."""

    def __str__(self) -> str:
        wrong = f"{len(self.faults)} jobs that went on, or left a process"
        return f"{self.done.total()} ranks of two ({self.by_kind}); {wrong}"


def _alive(session: int) -> Iterator[str]:
    """The states of the processes of a session: T is one that is frozen."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, own = status.read_text().rsplit(")", 1)[1].split()[:4]
            if int(own) == session and state != "Z":
                yield state


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "timeout"), [("SIGKILL", None), ("SIGSTOP", TIMEOUT)])
def test_the_job_ends_with_an_error(name, timeout, place, rank, tmp_path, trust):
    if (place, rank) == ("in a write", "1"):
        pytest.skip("the first rank alone writes")
    # without a timeout, they would wait for half an hour for one that is frozen
    waits = [f"--trainer.strategy.timeout=0:00:{timeout}"] if timeout else []
    struck = [sys.executable, "tests/trust/struck.py", name, rank, place]
    log, done = tmp_path / "log", Struck(Counter({f"{'killed' if name == 'SIGKILL' else 'frozen'} {place}": 1}))
    with log.open("w") as file:
        process = subprocess.Popen(
            [*struck, *RUN, *waits, f"--trainer.default_root_dir={tmp_path}"],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        status = process.wait((timeout or 0) + 2 * PATIENCE)
        until = time.monotonic() + PATIENCE
        while any(_alive(process.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        if status == 0 or any(_alive(process.pid)):
            done.faults.append(f"status {status}, left: {[*_alive(process.pid)]}")
    except subprocess.TimeoutExpired:
        done.faults.append(f"it goes on: {[*_alive(process.pid)]}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for saved in tmp_path.rglob("*.ckpt"):
        read_checkpoint(saved)
    text = log.read_text()
    if "Traceback" in text or "has not foreseen" in text:
        done.faults.append("a traceback")
    trust("ranks", done)
    assert not done.faults, f"{done.faults}\n{text}"
