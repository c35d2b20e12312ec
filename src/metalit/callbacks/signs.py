"""Lines in a plain log that tell how far a run is, where there is no terminal for a progress bar."""

import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage

from metalit.compiling.patience import is_waiting
from metalit.notices import say

_SECONDS = 8.0
_DOING = {
    RunningStage.SANITY_CHECKING: "trying the validation out",
    RunningStage.VALIDATING: "validating",
    RunningStage.TESTING: "testing",
    RunningStage.PREDICTING: "predicting",
}


class SignsOfLife(Callback):
    """Prints a line every few seconds: the step, the rate, the time left, the last errors.

    A thread prints them, since a single step or a validation may take long. It prints nothing while a function is
    being compiled, which is told elsewhere.

    Args:
        seconds: the time between two lines.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self.seconds = seconds
        self._over: threading.Event | None = None
        self._batch = 0
        self._scores: dict[str, float] = {}
        self._recorded_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the thread."""
        self._end()
        if trainer.is_global_zero:
            self._over, self._batch, self._scores = threading.Event(), 0, {}
            threading.Thread(target=self._print_lines, args=(trainer, self._over), daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the thread."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the thread."""
        self._end()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Record the training error, twice for each line: to ask for it may take longer than a step."""
        if monotonic() - self._recorded_at >= self.seconds / 2:
            self._recorded_at = monotonic()
            self._record(trainer, "train/")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count batches anew."""
        self._batch = 0

    def on_validation_batch_end(self, *_: Any) -> None:
        """Count."""
        self._batch += 1

    def on_test_batch_end(self, *_: Any) -> None:
        """Count."""
        self._batch += 1

    def on_predict_batch_end(self, *_: Any) -> None:
        """Count."""
        self._batch += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scores."""
        if not trainer.sanity_checking:
            self._record(trainer, "val/")

    def _record(self, trainer: Trainer, prefix: str) -> None:
        """Record what a progress bar would show; the thread itself must not ask the Trainer for it."""
        shown = trainer.progress_bar_metrics
        found = {name: float(shown[name]) for name in shown if name.startswith(prefix)}
        self._scores = dict(sorted((self._scores | found).items()))

    def _end(self) -> None:
        if self._over is not None:
            self._over.set()

    def _print_lines(self, trainer: Trainer, over: threading.Event) -> None:
        step, time = trainer.global_step, monotonic()
        while not over.wait(self.seconds):
            last_step, last_time, step, time = step, time, trainer.global_step, monotonic()
            if not is_waiting():
                say(", ".join(self._parts(trainer, (step - last_step) / (time - last_time))))

    def _parts(self, trainer: Trainer, rate: float) -> Iterator[str]:
        fits, most = trainer.state.fn == "fit", trainer.max_steps
        if fits:
            yield f"step {trainer.global_step}{f' of {most}' if most > 0 else ''}"
        doing = _DOING.get(trainer.state.stage) if trainer.state.stage else None
        if doing:
            yield f"{doing}: {self._batch} batch(es) done"
        elif fits and rate > 0:
            yield f"{rate:.3g} steps/s"
            if most > 0:
                yield f"{_duration((most - trainer.global_step) / rate)} left"
        elif fits:
            yield "still at it"
        yield from (f"{name} {value:.4g}" for name, value in self._scores.items())


def _duration(seconds: float) -> str:
    """How long, as a person would say it.

    >>> _duration(7.6), _duration(600.0), _duration(8000.0)
    ('8 s', '10 min', '2 h 13 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
