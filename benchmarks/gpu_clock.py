"""A clock for fits on a GPU: how long a step takes, how many kernels it launches, how long the card works."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

WARM_UP, WINDOWS, PROFILED = 5, 5, 3  # calls, windows, calls
WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


class Clock(Callback):
    """Times windows of calls of the Trainer, then looks at some calls with torch's profiler, then ends the fit.

    Args:
        device: ``cuda``, or ``cpu``, where nothing is launched.
        seconds: how long all windows take together.
        block: a window has a multiple of so many steps; tasks are drawn for 64 steps at once.
        only_once: end after the first call.
    """

    def __init__(self, device: str, seconds: float, block: int = 1, only_once: bool = False) -> None:
        self.device = device
        self.seconds = seconds
        self.block = block
        self.only_once = only_once
        self.calls = 0
        self.window = 0
        self.windows: list[float] = []
        self.trace: dict[str, float] = {}
        self.profiler: profile | None = None

    def on_train_batch_end(self, trainer: Trainer, learner: LightningModule, *_: Any) -> None:
        """Open and close windows."""
        self.calls += 1
        self.fused = getattr(learner, "fused_steps", 1)
        if self.only_once:
            trainer.should_stop = True
        elif self.profiler is not None:
            if self.calls == self.until:
                self._close_profile()
                trainer.should_stop = True
        elif self.calls == WARM_UP:
            self._open(2)
        elif self.calls > WARM_UP and self.calls == self.until:
            taken = self._now() - self.begun
            if self.window == 0:  # the first two calls tell how many there can be
                count = max(1, round(self.seconds / WINDOWS / (taken / 2)))
                block = -(-self.block // self.fused)
                self.window = -(-count // block) * block
            else:
                self.windows.append(taken / self.window / self.fused)
            if len(self.windows) == WINDOWS:
                self._open_profile()
            else:
                self._open(self.window)

    def _open(self, calls: int) -> None:
        self.until, self.begun = self.calls + calls, self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _open_profile(self) -> None:
        self._now()
        kind = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
        self.profiler = profile(activities=[kind])
        self.until = self.calls + (1 if self.fused > 1 else PROFILED)
        self.profiler.start()

    def _close_profile(self) -> None:
        self._now()
        self.profiler.stop()
        steps = self.fused * (1 if self.fused > 1 else PROFILED)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        self.trace = {name: value / steps for name, value in summary(events).items()}

    def found(self) -> dict[str, float]:
        """Milliseconds, kernels, launches and copies of a step, and the share of the time that the card works."""
        per_step = 1e3 * statistics.mean(self.windows)
        busy = self.trace["busy ms"] / per_step
        return {"ms per step": per_step, **self.trace, "share of the time": busy}


def summary(events: list[dict[str, Any]]) -> dict[str, float]:
    """What a trace holds: kernels, launches, copies, operators of torch, and how long the card works."""
    whole = [event for event in events if event.get("ph") == "X"]
    kinds = [event.get("cat", "") for event in whole]
    calls = [event["name"] for event in whole if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in whole if event.get("cat") in WORK)
    busy, last = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return {
        "kernels": kinds.count("kernel"),
        "launches": sum("launch" in name.lower() for name in calls),
        "copies": kinds.count("gpu_memcpy"),
        "waits": sum("synchronize" in name.lower() for name in calls),
        "operators": kinds.count("cpu_op"),
        "busy ms": busy / 1e3,
    }


@contextmanager
def told() -> Iterator[list[str]]:
    """The lines that are printed."""
    lines: list[str] = []
    text = StringIO()
    with redirect_stdout(text):
        yield lines
    lines += text.getvalue().splitlines()
