"""Disks that fill up, cannot be written, or are gone: one line, the last checkpoint whole, and then the run goes on."""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ended, start_ranks
from kills import CASES, left_by, undisturbed
from tally import Tally

from metalit.__main__ import main
from metalit.checkpoints import read_checkpoint

pytestmark = pytest.mark.trust
TIMES = int(os.environ.get("METALIT_DISKS", "5"))
# a folder that cannot be made is named with what the system says, too
WORDS = {
    "full": "no space left on device",
    "read-only": "read-only file system",
    "gone": "(the folder of the run was removed|no such file or directory)",
}
BY_NAME = {case.name: case for case in CASES}


class Disks(Tally):
    """How often a disk failed, and what was lost."""

    def __str__(self) -> str:
        lost = f"{len(self.faults)} lost, differing or not told"
        return f"{self.done.total()} failures of the disk ({self.by_kind}); {lost}"


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=64M", "tmpfs", str(place)):
        pytest.skip("mounting a disk of its own needs the rights of root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", ["meta", "bilevel", "supervised", "matrix"])
def test_nothing_is_lost(name, kind, tmp_path, disk, trust):
    case, draw, done = BY_NAME[name], random.Random(f"{name} {kind}"), Disks()
    expected, seconds = undisturbed(case, tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    log, runs, away = tmp_path / "log", disk / "lightning_logs", disk / "away"
    for _ in range(TIMES):
        if kind == "full":
            _mount("-o", f"remount,size={4096 * (1 + draw.randrange(size // 4096))}", str(disk))
        ranks = start_ranks(1, log, main, case.command(disk))
        if kind != "full":
            time.sleep(draw.uniform(0.1, 0.9) * seconds)
        if kind == "read-only":
            _mount("-o", "remount,ro", str(disk))
        if kind == "gone" and runs.exists():
            runs.rename(away)
        (status,) = ended(ranks, 120)
        if away.exists():
            shutil.rmtree(runs, ignore_errors=True)
            away.rename(runs)
        told = [line for line in log.read_text().splitlines() if line.startswith("metalit: error: ")]
        _mount("-o", "remount,rw,size=64M", str(disk))
        if status:
            done.done[kind] += 1
            fine = status in (1, 2) and len(told) == 1 and "Traceback" not in log.read_text()
            if not (fine and re.search(WORDS[kind], told[0].lower())):
                done.faults.append(f"{name}, {kind}: status {status}: {log.read_text()[-1500:]}")
        else:  # it has ended, and begins anew
            shutil.rmtree(runs)
        log.unlink()
        for saved in disk.rglob("*.ckpt"):
            read_checkpoint(saved)
    (status,) = ended(start_ranks(1, log, main, case.command(disk)), 300)
    assert status == 0, log.read_text()
    found = left_by(disk)
    for key in expected:
        if key.startswith(("last", "best", "file")) and str(expected[key]) != str(found.get(key)):
            done.faults.append(f"{name}, {kind}: {key} is {found.get(key)!r:.200}, not {expected[key]!r:.200}")
    trust("disks", done)
    assert not done.faults, "\n".join(done.faults)
