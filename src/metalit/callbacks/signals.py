"""Signals: a run that is told to stop ends after the same step on all ranks, is saved, and is requeued by SLURM."""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from metalit.callbacks.checkpoints import LastCheckpoint
from metalit.callbacks.learner import learner_of
from metalit.compiling.patience import give_up, is_waiting
from metalit.errors import InputError, StoppedError
from metalit.private_lightning import cluster_environment


class StopOnSignal(Callback):
    """Ends and saves the run after the step in which any rank receives SIGTERM or SIGUSR1.

    Under SLURM, SIGUSR1 also puts the job back into the queue. Outside of SLURM, the user's own handler for SIGUSR1
    stays in place.

    The handler only records the signal, and ends a compilation that is under way. The ranks learn of it with the next
    gradient (:class:`~metalit.training.agreement.Agreement`). Then :class:`~metalit.callbacks.LastCheckpoint` saves,
    after the validation if one is due, and all ranks leave. A single process that still compiles before its first step
    has nothing to save, and leaves at once. Lightning's own handlers would save in the middle of a step, or wait for a
    rank that received no signal: they are replaced while training lasts. Once the run leaves, further signals are
    ignored, because the other ranks may receive theirs late. ``Trainer(fast_dev_run=True)`` saves nothing and keeps
    Lightning's handlers.

    Raises:
        InputError: when training starts, without a ``LastCheckpoint``.
        StoppedError: at the start of the step after the one that was saved.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}
        self._stops = self._requeues = False
        self._trainer: Trainer | None = None
        self._first = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from saving and requeueing by itself."""
        if stage != "fit":
            return
        if not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks):
            raise InputError("StopOnSignal: there is nothing to save with; add the callback LastCheckpoint")
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        self._received, self._stops, self._requeues = set(), False, False
        previous = signal.getsignal(signal.SIGUSR1)
        self._previous = {signal.SIGUSR1: previous} if in_slurm() or previous is signal.SIG_DFL else {}
        # not yet SIGTERM: nothing is trained that would have to be saved
        if in_slurm():
            self._install(trainer, *self._previous)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers of Lightning."""
        self._install(trainer, signal.SIGTERM, *self._previous)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers of Lightning, and tell the other ranks of signals."""
        self._install(trainer, signal.SIGTERM, *self._previous)
        self._trainer, self._first = trainer, trainer.global_step
        agreement = learner_of(pl_module, self).agreement
        agreement.request("stop", lambda: bool(self._received))
        agreement.request("requeue", lambda: in_slurm() and signal.SIGUSR1 in self._received)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ask whether a rank was told to stop."""
        agreement = learner_of(pl_module, self).agreement
        self._stops = self._stops or agreement.any_rank("stop")
        self._requeues = self._requeues or agreement.any_rank("requeue")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave, if one was."""
        if self._stops:
            saver = next(callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
            raise StoppedError(trainer.global_step, Path(saver.best_model_path), self._requeues)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give SIGUSR1 its previous handler back, as Lightning has done with SIGTERM."""
        set_handlers(self._previous)
        self._previous, self._trainer = {}, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a signal end the process at once: Lightning's handler would wait for ranks that may be gone."""
        ends = signal.SIG_IGN if isinstance(exception, StoppedError) else signal.SIG_DFL
        set_handlers(dict.fromkeys((signal.SIGTERM, *self._previous), ends))

    def _install(self, trainer: Trainer, *numbers: int) -> None:
        if not trainer.fast_dev_run:
            set_handlers(dict.fromkeys(numbers, self._record))

    def _record(self, number: int, _: FrameType | None) -> None:
        self._received.add(number)
        if is_waiting():
            give_up("a signal stops the run", self._stopped_at_once())

    def _stopped_at_once(self) -> StoppedError | None:
        """How a run ends that has taken no step; a first step that is not compiled would differ in the last digits."""
        trainer = self._trainer
        if trainer is None or trainer.world_size > 1 or trainer.global_step > self._first:
            return None
        resumed = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        return StoppedError(trainer.global_step, resumed, signal.SIGUSR1 in self._received)


def in_slurm() -> bool:
    """Whether this is a job of SLURM."""
    return "SLURM_JOB_ID" in os.environ


def set_handlers(handlers: Mapping[int, Any]) -> None:
    """Set the handlers of signals, in the main thread alone, as Python asks; a notebook may train in another."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore signals from now on: one that comes late must not keep the job from being requeued."""
    set_handlers(dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN))


def requeue() -> str | None:
    """Put this SLURM job, or task of an array, back into the queue; returns why not, if it was refused."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"scontrol requeue {job}: {error}"
    return f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}" if done.returncode else None
