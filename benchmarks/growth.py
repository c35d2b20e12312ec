"""How metalit's step grows with tasks, threads and processes."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch

from benchmarks.harness import ONE_THREAD, Contender, DifferentWorkError, Missing, Race, markdown, rounds, say, section
from metalit.adapt import Outer
from metalit.data import Sine
from metalit.data.base import task_keys
from metalit.hypergradients import Unrolled
from metalit.hypergradients.base import over_tasks
from metalit.inner import SGD
from metalit.modules.estimates import Estimates, Found, packed
from metalit.networks import MLP
from metalit.problem import Task
from metalit.problems import FewShot

TASKS = (25, 250, 2500)
KINDS = ("not compiled", "compiled", "compiled, `tasks_per_chunk: 25`")
INNER_STEPS, LR, POINTS = 1, 0.01, 10


class Worker:
    """A process of its own that takes steps when it is told: the number of threads is bound when torch starts."""

    def __init__(self, kind: str, tasks: int, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.growth", kind, str(tasks), str(threads)]
        count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            command, env={**os.environ, **ONE_THREAD, **count}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answer = self._answer()
        self.loss = float(answer) if answer else None  # none where it cannot be compiled

    def begin(self, steps: int) -> None:
        """Take steps, and do not wait."""
        print(steps, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Wait until they are taken."""
        if not self._answer():
            raise RuntimeError("a process of the benchmark ended before its time")

    def advance(self, steps: int) -> None:
        """Take steps."""
        self.begin(steps)
        self.end()

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


def serve(kind: str, count: int, threads: int) -> None:
    """What a worker does: say the loss, then take as many steps as each line says."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    problem, index = FewShot(MLP([1, 40, 40, 1])), torch.arange(count)
    drawn = Sine().sample("train", index, task_keys(0, "train", index), POINTS, POINTS)
    tasks = Task(*(part._replace(x=part.x.float(), y=part.y.float()) for part in drawn[:2]), drawn.key)
    outer = {"problem": {name: value.detach() for name, value in problem.outer().items()}, "optimizer": {}}
    step = partial(over_tasks, Unrolled(INNER_STEPS), problem, SGD(LR))
    compiles, chunk = kind != "not compiled", 25 if "chunk" in kind else None

    def estimate(outer: Outer, tasks: Task, start: None) -> Found:
        found = step(outer, tasks)
        return Found(packed(found.loss, found.gradient), found.inner, {})

    estimates = Estimates(estimate, problem, compiles, chunk, "the step", say)
    loss = float(estimates(outer, tasks, None).packed[0])
    if estimates.compiled is not None and estimates.compiled.failed:
        return
    print(loss, flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            estimates(outer, tasks, None)
        print("done", flush=True)


def run(quick: bool) -> str:
    """Measure."""
    started = time.perf_counter()
    workers: dict[tuple[str, int, str], list[Worker]] = {}
    missing = []
    for kind in KINDS:
        for tasks in TASKS:
            one, two, other = (Worker(kind, tasks, threads) for threads in (1, 2, 1))
            if None in (one.loss, two.loss, other.loss):
                missing.append(Missing(_name(kind, tasks, ""), "it cannot be compiled here"))
                continue
            workers[kind, tasks, ""] = [one]
            workers[kind, tasks, "2 threads"] = [two]
            workers[kind, tasks, "2 processes"] = [one, other]
    for (_, tasks, _), group in workers.items():
        expected = workers["not compiled", tasks, ""][0].loss
        if any(abs(worker.loss - expected) > 1e-4 * abs(expected) for worker in group):
            raise DifferentWorkError(
                f"the losses of {tasks} tasks differ: {[worker.loss for worker in group]}, {expected}"
            )
    say(f"{len(workers)} contenders are ready after {time.perf_counter() - started:.0f} s")
    race = Race(
        [Contender(_name(*key), partial(together, group)) for key, group in workers.items()],
        seconds=0.1 if quick else 0.5,
    ).run(rounds(quick))
    for worker in {id(worker): worker for worker in chain(*workers.values())}.values():
        worker.close()
    rows = []
    for kind, tasks, mode in workers:
        name, alone, least = _name(kind, tasks, mode), _name(kind, tasks, ""), _name(kind, TASKS[0], "")
        faster = (2 if mode == "2 processes" else 1) * race.ratio(alone, name)
        each = race.ratio(name, least) * TASKS[0] / tasks if not mode else None
        shown = f"{faster:.3g}" if mode else ""
        rows.append([name, "" if each is None else f"{each:.3g}", shown, *race.times(name)])
    rows += [[name, "", "", why, "", ""] for name, why in missing]
    header = [
        "",
        "time per task ÷ that at 25",
        "work in the same time, alone = 1",
        "ms per step, median",
        "quartiles",
        "rounds",
    ]
    about = (
        "One evaluation of the meta-gradient of the benchmark meta_step, with one inner step and more tasks, in "
        "processes of their own: one thread, two threads, and two processes with one thread each that run at the same "
        "time. All find the same losses, to 1e-4; a step of two processes is one of each."
    )
    return section("growth: more tasks, threads, processes", about, markdown(header, rows))


def _name(kind: str, tasks: int, mode: str) -> str:
    return f"{kind}, {tasks:,} tasks{f', {mode}' if mode else ''}"


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
