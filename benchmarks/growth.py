"""How metalit's step grows with tasks, threads and processes."""

import sys
import time
from functools import partial
from itertools import chain

import torch

from benchmarks.harness import Contender, DifferentWorkError, Missing, Race, markdown, rounds, say, section
from benchmarks.workers import Worker, together, told
from metalit.adapt import Outer
from metalit.data import Sine
from metalit.data.base import task_keys
from metalit.hypergradients import Unrolled
from metalit.hypergradients.base import over_tasks
from metalit.inner import SGD
from metalit.networks import MLP
from metalit.problem import Task
from metalit.problems import FewShot
from metalit.training.batches import Batches, StepResult
from metalit.training.outer_gradient import OuterGradient

TASKS = (25, 250, 2500)
KINDS = ("not compiled", "compiled", "compiled, `tasks_per_chunk: 25`")
INNER_STEPS, LR, POINTS = 1, 0.01, 10


def started(kind: str, tasks: int, threads: int) -> Worker:
    """A worker with so many threads, whose number is bound when torch starts."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return Worker([sys.executable, "-m", "benchmarks.growth", kind, str(tasks), str(threads)], count)


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

    def result(outer: Outer, tasks: Task) -> StepResult:
        found = step(outer, tasks)
        return StepResult(OuterGradient.of(found.loss, found.gradient), {}, found.inner)

    batches = Batches(result, problem, compiles, chunk, "the step", say)
    loss = float(batches(outer, tasks).gradient.loss)
    if compiles and not batches.is_compiled:
        return
    goes_on = told(loss, sys.stdin.readline, partial(print, flush=True))
    while goes_on():
        batches(outer, tasks)


def run(quick: bool) -> str:
    """Measure."""
    begun = time.perf_counter()
    losses: dict[tuple[str, int], list[float | None]] = {}
    workers: dict[tuple[str, int, str], list[Worker]] = {}
    missing = []
    for kind in KINDS:
        for tasks in TASKS:
            one, two, other = (started(kind, tasks, threads) for threads in (1, 2, 1))
            losses[kind, tasks] = [worker.ready() for worker in (one, two, other)]
            if None in losses[kind, tasks]:
                missing.append(Missing(_name(kind, tasks, ""), "it cannot be compiled here"))
                continue
            workers[kind, tasks, ""] = [one]
            workers[kind, tasks, "2 threads"] = [two]
            workers[kind, tasks, "2 processes"] = [one, other]
    for kind, tasks, _ in workers:
        expected = losses["not compiled", tasks][0]
        if any(abs(loss - expected) > 1e-4 * abs(expected) for loss in losses[kind, tasks]):
            raise DifferentWorkError(f"the losses of {tasks} tasks differ: {losses[kind, tasks]}, {expected}")
    say(f"{len(workers)} contenders are ready after {time.perf_counter() - begun:.0f} s")
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
