"""Signals: a run that is told to stop does so after the same step on all ranks, saved, and is requeued by SLURM."""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from metalit.callbacks.checkpoints import LastCheckpoint
from metalit.errors import InputError, StoppedError
from metalit.modules.base import OuterLearner
from metalit.patience import give_up, is_waiting
from metalit.private_lightning import cluster_environment


class StopOnSignal(Callback):
    """SIGTERM or SIGUSR1 on any rank ends the run at the end of the step that it comes in, or of the first.

    SLURM's SIGUSR1 has the job put back into the queue too. Outside of SLURM, a handler that is not Python's default is
    left to hear it.

    The handler takes a note and ends what is being compiled, and nothing else; the ranks agree with the next gradient
    (:class:`~metalit.training.agreement.Agreement`), :class:`~metalit.callbacks.LastCheckpoint` saves, after the
    validation if one is due, and all ranks leave. A run that is alone, and compiles before its first step, has nothing
    to save and leaves at once. Lightning's own handlers would save in mid-step, or wait for a rank that got no signal;
    they are put aside while training lasts. Once the run leaves, further signals are ignored, which ranks may get late.
    ``Trainer(fast_dev_run=True)``, which saves nothing, is left to Lightning.

    Raises:
        InputError: when training starts, without a ``LastCheckpoint``.
        StoppedError: at the start of the step after the one that was saved.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self._before: dict[int, Any] = {}
        self._stops = self._requeues = False
        self._trainer: Trainer | None = None
        self._first = 0

    def setup(self, trainer: Trainer, pl_module: OuterLearner, stage: str) -> None:
        """Keep Lightning from saving and requeueing by itself."""
        if stage != "fit":
            return
        if not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks):
            raise InputError("StopOnSignal: there is nothing to save with; add the callback LastCheckpoint")
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        self._received, self._stops, self._requeues = set(), False, False
        before = signal.getsignal(signal.SIGUSR1)
        self._before = {signal.SIGUSR1: before} if in_slurm() or before is signal.SIG_DFL else {}
        # not yet SIGTERM: nothing is trained that would have to be saved
        if in_slurm():
            self._listen(trainer, *self._before)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: OuterLearner) -> None:
        """Listen in place of Lightning."""
        self._listen(trainer, signal.SIGTERM, *self._before)

    def on_train_start(self, trainer: Trainer, pl_module: OuterLearner) -> None:
        """Listen in place of Lightning, and say to the other ranks what was heard."""
        self._listen(trainer, signal.SIGTERM, *self._before)
        self._trainer, self._first = trainer, trainer.global_step
        pl_module.agreement.request("stop", lambda: bool(self._received))
        pl_module.agreement.request("requeue", lambda: in_slurm() and signal.SIGUSR1 in self._received)

    def on_train_batch_end(self, trainer: Trainer, pl_module: OuterLearner, *_: Any) -> None:
        """Ask whether to go on."""
        self._stops = self._stops or pl_module.agreement.any_rank("stop")
        self._requeues = self._requeues or pl_module.agreement.any_rank("requeue")

    def on_train_batch_start(self, trainer: Trainer, pl_module: OuterLearner, *_: Any) -> None:
        """Leave."""
        if self._stops:
            saver = next(callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
            raise StoppedError(trainer.global_step, Path(saver.best_model_path), self._requeues)

    def teardown(self, trainer: Trainer, pl_module: OuterLearner, stage: str) -> None:
        """Leave SLURM's signal to whom it was left before, as Lightning has done with SIGTERM."""
        leave_signals(self._before)
        self._before, self._trainer = {}, None

    def on_exception(self, trainer: Trainer, pl_module: OuterLearner, exception: BaseException) -> None:
        """Let a signal end the process at once: Lightning's handler would wait for ranks that may be gone."""
        ends = signal.SIG_IGN if isinstance(exception, StoppedError) else signal.SIG_DFL
        leave_signals(dict.fromkeys((signal.SIGTERM, *self._before), ends))

    def _listen(self, trainer: Trainer, *numbers: int) -> None:
        if not trainer.fast_dev_run:
            leave_signals(dict.fromkeys(numbers, self._note))

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.add(number)
        if is_waiting():
            give_up("a signal stops the run", self._stopped_at_once())

    def _stopped_at_once(self) -> StoppedError | None:
        """The end of a run that has nothing to save: its first step, uncompiled, would differ in the last digits."""
        trainer = self._trainer
        if trainer is None or trainer.world_size > 1 or trainer.global_step > self._first:
            return None
        begun = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        return StoppedError(trainer.global_step, begun, signal.SIGUSR1 in self._received)


def in_slurm() -> bool:
    """Whether this is a job of SLURM."""
    return "SLURM_JOB_ID" in os.environ


def leave_signals(handlers: Mapping[int, Any]) -> None:
    """Leave signals to handlers, in the main thread, which alone may; in a notebook it may be another that trains."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """From now on: one that comes late, to this rank or in haste, must not keep the job from being requeued."""
    leave_signals(dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN))


def requeue() -> str | None:
    """Put this SLURM job, or task of an array, back into the queue; returns why not, if it was refused."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"scontrol requeue {job}: {error}"
    return f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}" if done.returncode else None
