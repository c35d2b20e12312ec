"""Processes of their own that take steps when they are told."""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

from benchmarks.harness import ONE_THREAD


class Worker:
    """A process that says a loss, and then takes as many steps as each line says.

    Args:
        command: what to run; it calls :func:`told`, or answers likewise.
        environment: variables beside those of this process; torch has one thread if they do not say otherwise.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env={**os.environ, **ONE_THREAD, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ready(self) -> float | None:
        """Wait until it is; returns its loss, or None where it has ended."""
        answer = self._answer()
        return float(answer) if answer else None

    def begin(self, steps: int) -> None:
        """Take steps, and do not wait."""
        print(steps, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Wait until they are taken."""
        if not self._answer():
            raise RuntimeError("a process of the benchmark ended before its time")

    def close(self) -> None:
        """Let it go."""
        self.process.communicate()

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()


def together(workers: Sequence[Worker], steps: int) -> None:
    """All take steps at the same time."""
    for worker in workers:
        worker.begin(steps)
    for worker in workers:
        worker.end()


def told(loss: float, read: Callable[[], str], say: Callable[[str], None]) -> Callable[[], bool]:
    """In the worker: says the loss, and returns a function to call before each step, which tells whether to go on."""
    say(f"{loss}")
    left: list[int] = []

    def goes_on() -> bool:
        if left and left[0] == 0:
            left.clear()
            say("done")
        if not left:
            line = read()
            if not line:
                return False
            left.append(int(line))
        left[0] -= 1
        return True

    return goes_on
