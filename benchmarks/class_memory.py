"""The memory that the tasks of images take beside the images."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.harness import DifferentWorkError, markdown, section
from metalit.data import Classes, ClassSource, ClassTasks, Episodes, TaskDataModule
from metalit.data.stream import TrainStream

SIZE, CLASSES, EXAMPLES, STEPS = 84, 64, 200, 64
EPISODES = Episodes(tasks=4, ways=5, shots=5, queries=15)
LIMIT = 2**30


@dataclass(frozen=True)
class Noise(ClassSource):
    """Colour images of noise."""

    def read_classes(self) -> Classes:
        shape = (CLASSES * EXAMPLES, 3, SIZE, SIZE)
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        names = [str(number) for number in range(CLASSES)]
        return Classes.of(names, torch.arange(CLASSES).repeat_interleave(EXAMPLES), values)


def measure() -> None:
    """Print the peak memory of this process after each stage, in bytes."""
    _tell("torch, Lightning and metalit are imported")
    data = TaskDataModule(ClassTasks(Noise(), val=0, test=0), EPISODES, EPISODES, EPISODES)
    data.tasks.prepare()
    _tell("the images are there, and their mean and deviation")
    stream = iter(TrainStream(partial(data.draw, "train"), 4, STEPS, lambda: 0))
    for _ in range(STEPS):
        data.transfer_batch_to_device(next(stream), torch.device("cpu"), 0)
    _tell(f"{STEPS} outer steps are drawn, and each was loaded when it was due")


def _tell(stage: str) -> None:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, stage)


def run(quick: bool) -> str:
    """A process of its own is measured; it must stay below a GiB beside the images."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.class_memory"], stdout=subprocess.PIPE, text=True, check=True
    )
    images, rows = CLASSES * EXAMPLES * 3 * SIZE**2, []
    for stage, line in enumerate(done.stdout.splitlines()):
        peak, title = line.split(" ", 1)
        beside = int(peak) - (images if stage else 0)
        if beside > LIMIT:
            raise DifferentWorkError(f"{title}: {beside} bytes beside the images are more than {LIMIT}")
        rows.append([title, f"{int(peak) / 2**20:.0f}", f"{beside / 2**20:.0f}"])
    about = (
        f"{CLASSES * EXAMPLES:,} images of 3 × {SIZE} × {SIZE}, {images / 2**20:.0f} MiB in 8 bits; tasks of 5 ways, "
        "5 shots and 15 queries, 4 in each outer step. What the network takes comes on top."
    )
    return section("Memory of images", about, markdown(["", "peak, MiB", "beside the images, MiB"], rows))


if __name__ == "__main__":
    measure()
