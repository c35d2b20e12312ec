"""What a long run takes while it goes on: memory, open files, threads, and the time of a step."""

import json
import os
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer

_PARTS = 100


class Sample(NamedTuple):
    """At an outer step: seconds, megabytes in memory, open files, threads."""

    step: int
    seconds: float
    megabytes: float
    files: int
    threads: int


class Watch(Callback):
    """Takes a hundred samples of a run, and writes them at its end."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.samples: list[Sample] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Take a sample after each hundredth of the steps."""
        taken = len(self.samples) * trainer.max_steps // _PARTS
        if trainer.global_step >= taken:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            size = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            files = len(os.listdir("/proc/self/fd"))
            self.samples.append(Sample(trainer.global_step, time.perf_counter(), size, files, threading.active_count()))

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Write them."""
        Path(self.file).write_text(json.dumps(self.samples))


class Soak(NamedTuple):
    """What a long run took near its start and at its end."""

    name: str
    steps: int
    megabytes: tuple[float, float]
    files: tuple[int, int]
    threads: tuple[int, int]
    microseconds: tuple[float, float]

    @classmethod
    def of(cls, name: str, samples: Sequence[Sample]) -> "Soak":
        """From a run's samples: the start is after a tenth of them, when all that is made once is made."""
        early, late = samples[_PARTS // 10 : 2 * _PARTS // 10], samples[-_PARTS // 10 :]

        def pace(some: Sequence[Sample]) -> float:
            pairs = pairwise(some)
            return 1e6 * median((b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs)

        return cls(
            name,
            samples[-1].step,
            (max(sample.megabytes for sample in early), max(sample.megabytes for sample in late)),
            (max(sample.files for sample in early), max(sample.files for sample in late)),
            (max(sample.threads for sample in early), max(sample.threads for sample in late)),
            (pace(early), pace(late)),
        )

    def __str__(self) -> str:
        def pair(values: tuple[float, float], form: str) -> str:
            return " then ".join(f"{value:{form}}" for value in values)

        return (
            f"{self.name}, {self.steps} steps: {pair(self.megabytes, '.0f')} MB, {pair(self.files, 'd')} open files, "
            f"{pair(self.threads, 'd')} threads, {pair(self.microseconds, '.0f')} µs a step"
        )
