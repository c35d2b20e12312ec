"""What it costs to be one of two ranks: `fit` under DDP beside processes that train alone."""

import os
import socket
import sys
import time
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.harness import Contender, DifferentWorkError, Race, markdown, rounds, say, section
from benchmarks.workers import Worker, together, told
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

TASKS = (25, 250, 2500)
ALONE, BESIDE, RANKS = "one process", "two that do not know of each other", "two ranks"


class Obey(Callback):
    """Takes steps when it is told."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            loss = float(pl_module.mean_over_ranks(torch.ones(())))
            self.goes_on = told(loss, sys.stdin.readline, partial(print, flush=True))
        if trainer.global_step >= 1 and not self.goes_on():
            sys.stdout.flush()
            os._exit(0)


def started(tasks: int, rank: int, ranks: int, port: int = 0) -> Worker:
    """A process that trains on so many tasks."""
    apart = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "benchmarks.ranks", str(tasks), str(ranks)]
    return Worker(command, {**apart, "WORLD_SIZE": str(ranks)} if ranks > 1 else {})


def serve(tasks: int, ranks: int) -> None:
    """What a worker does: fit, as many steps as each line says."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # what Lightning says is no answer
    module = MetaLearner(FewShot(MLP([1, 40, 40, 1])), SGD(0.01), Unrolled(1), eval_steps=1, compile=True)
    data = TaskDataModule(Sine(), Episodes(tasks * ranks, 10, 10), Episodes(2, 5, 5), Episodes(2, 5, 5))
    obey = Obey()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 0}
    trainer = Trainer(
        max_steps=10_000_000, max_epochs=-1, accelerator="cpu", devices=ranks, val_check_interval=10_000_000,
        strategy="ddp" if ranks > 1 else "auto", num_sanity_val_steps=0, limit_val_batches=0, callbacks=[obey],
        enable_model_summary=False, **quiet,
    )  # fmt: skip
    sys.stdout = answers
    module._batches.tell = module._batches.compiled.tell = say
    trainer.fit(module, data)


def run(quick: bool) -> str:
    """Measure."""
    begun = time.perf_counter()
    workers: dict[tuple[int, str], list[Worker]] = {}
    for tasks in TASKS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        one, other = (started(tasks, 0, 1) for _ in range(2))
        ranks = [started(tasks, rank, 2, port) for rank in range(2)]
        if any(worker.ready() is None for worker in (one, other, *ranks)):
            raise DifferentWorkError(f"a process of {tasks} tasks did not begin to train")
        workers |= {(tasks, ALONE): [one], (tasks, BESIDE): [one, other], (tasks, RANKS): ranks}
    say(f"{len(workers)} contenders are ready after {time.perf_counter() - begun:.0f} s")
    contenders = [Contender(_name(*key), partial(together, group)) for key, group in workers.items()]
    race = Race(contenders, seconds=0.1 if quick else 0.5).run(rounds(quick))
    for worker in {id(worker): worker for worker in chain(*workers.values())}.values():
        worker.close()
    rows = []
    for tasks, mode in workers:
        name, alone, beside = (_name(tasks, each) for each in (mode, ALONE, BESIDE))
        work = (1 if mode == ALONE else 2) * race.ratio(alone, name)
        cost = f"{race.ratio(name, beside):.3g}" if mode == RANKS else ""
        rows.append([name, f"{race.ratio(name, alone):.3g}", cost, f"{work:.3g}", *race.times(name)])
    header = [
        "tasks of each process",
        "time of a step ÷ that of one process",
        "÷ that of two that do not know of each other",
        "work in the same time, one process = 1",
        "ms per step, median",
        "quartiles",
        "rounds",
    ]
    about = (
        "`fit` of the benchmark meta_step, compiled, one thread for each process: alone; twice at the same time; "
        "and as two ranks under DDP with gloo, which draw twice the tasks and step alike. No step is "
        "fused, logged or saved."
    )
    return section("ranks: two processes that train together", about, markdown(header, rows))


def _name(tasks: int, mode: str) -> str:
    return f"{tasks:,}, {mode}"


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
