"""Where each microsecond of an outer step of ``metalit fit`` goes."""

import statistics
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from benchmarks.harness import markdown, one_core, rounds, say, section
from benchmarks.meta_step import Terminal
from metalit.cli.command_line import MetalitCLI
from metalit.compiling.program import CompiledProgram
from metalit.data.module import TaskDataModule
from metalit.modules.base import OuterLearner
from metalit.modules.diagnosis import Diagnosis
from metalit.modules.meta import MetaLearner
from metalit.training.fused_loop import FusedLoop

CONFIG = Path(__file__).with_name("meta_step.yaml")
WINDOW, FUSED = 1000, 100
# from the outside to the inside: what a part takes is its own time less that of the parts inside
PARTS = {
    "drawing the tasks": (TaskDataModule, "draw"),
    "the Trainer's loop and hooks, the progress bar": (_TrainingEpochLoop, "advance"),
    "the learner between its steps: slicing the tasks, counting, the schedule": (MetaLearner, "training_step"),
    "reading and writing parameters and Adam's state, Adam's numbers": (FusedLoop, "__call__"),
    "the compiled step: hypergradient and Adam": (CompiledProgram, "__call__"),
    "what is logged: norms of the inner and outer variable, found in the program": (Diagnosis, "__call__"),
    "`self.log`": (OuterLearner, "log"),
    "TensorBoard": (OuterLearner, "write_scalars"),
}


class Clock(Callback):
    """Adds up, over each window of steps, the time spent in each part and not in another one."""

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.found: list[Counter[str]] = []
        self.spent: Counter[str] = Counter()
        self.open: list[list[Any]] = []

    def timed(self, name: str, fn: Any) -> Any:
        """``fn``, watched."""

        @wraps(fn)
        def watched(*args: Any, **options: Any) -> Any:
            self.open.append([0.0])
            begun = time.perf_counter()
            try:
                return fn(*args, **options)
            finally:
                taken = time.perf_counter() - begun
                (inside,) = self.open.pop()
                self.spent[name] += taken - inside
                if self.open:
                    self.open[-1][0] += taken

        return watched

    def on_train_batch_end(self, trainer: Trainer, learner: LightningModule, *_: Any) -> None:
        """Close a window; the first one, in which everything is compiled, is left out."""
        if trainer.global_step % WINDOW == 0:
            if trainer.global_step > WINDOW:
                self.found.append(Counter({name: 1e6 * spent / WINDOW for name, spent in self.spent.items()}))
                self.found[-1]["all"] = 1e6 * (time.perf_counter() - self.began) / WINDOW
            self.spent.clear()
            self.began = time.perf_counter()
            trainer.should_stop = len(self.found) >= self.windows


class _ClockedCLI(MetalitCLI):
    def __init__(self, args: list[str], clock: Clock) -> None:
        self._clock = clock
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self._clock)
        return trainer


def measure(inner_steps: int, windows: int) -> Clock:
    """Run a fit, with everything as shipped but validation, which is timed elsewhere."""
    clock = Clock(windows)
    options = [f"--model.hypergradient.steps={inner_steps}", f"--model.fused_steps={FUSED}"]
    options += ["--trainer.limit_val_batches=0"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(Terminal()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches = [
            patch.object(owner, name, clock.timed(part, getattr(owner, name))) for part, (owner, name) in PARTS.items()
        ]
        for each in patches:
            each.start()
        try:
            _ClockedCLI(["fit", f"--config={CONFIG}", *options, f"--trainer.default_root_dir={folder}"], clock)
        finally:
            for each in patches:
                each.stop()
    return clock


def run(quick: bool) -> str:
    """Measure at 1 and at 5 inner steps."""
    one_core()
    columns = {}
    for inner_steps in (1, 5):
        say(f"{inner_steps} inner step(s)")
        found = measure(inner_steps, rounds(quick)).found
        columns[f"{inner_steps} inner step{'s' * (inner_steps > 1)}"] = {
            name: statistics.median(window[name] for window in found) for name in ("all", *PARTS)
        }
    rows = [[name, *(f"{column[name]:.1f}" for column in columns.values())] for name in (*PARTS, "all")]
    rest = [column["all"] - sum(column[name] for name in PARTS) for column in columns.values()]
    rows.insert(-1, ["the rest: the loop around them, and the clocks themselves", *(f"{value:.1f}" for value in rest)])
    about = (
        f"Microseconds for each outer step of the fit of meta_step, `fused_steps: {FUSED}`, a log every 100 steps: the "
        f"medians over {rounds(quick)} windows of {WINDOW} steps. What a part takes is less what the parts inside take."
    )
    return section("profile: where the time of a fit goes", about, markdown(["µs per outer step", *columns], rows))
