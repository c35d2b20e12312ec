"""A ``fit`` of the command line: what it says, and how it ends."""

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from metalit.callbacks import BestCheckpoint, Ending, LastCheckpoint, ReportWriter
from metalit.callbacks.signals import ignore_signals, requeue
from metalit.cli.peers import ending_together
from metalit.cli.starting_point import StartingPoint
from metalit.errors import StoppedError
from metalit.modules import BilevelLearner
from metalit.notices import show

_Kind = TypeVar("_Kind", bound=Callback)


def train(trainer: Trainer, start: StartingPoint, **kwargs: Any) -> None:
    """Train, and say where everything is.

    Args:
        trainer: with our callbacks.
        start: what is gone on from.
        kwargs: what ``trainer.fit`` takes.

    Raises:
        StoppedError: a signal stopped it, and the job was not put back into its queue.
        SystemExit: it was interrupted.
    """
    going_on = f", going on from {start.checkpoint} at step {start.kept['global_step']}" if start.checkpoint else ""
    start.run.greeting = f"training {start.experiment.name} on {trainer.strategy.root_device}{going_on}"
    try:
        with ending_together(trainer), start.run.opened(trainer, trains=True):
            trainer.fit(**kwargs, weights_only=True)
            _say_why_it_ended(trainer, start, **kwargs)
    except SIGTERMException:
        # in what comes before training: how Lightning ends then, as if all were well
        raise SystemExit(143) from None
    except SystemExit:
        # how Lightning ends after Ctrl-C
        last = _callback(trainer, LastCheckpoint)
        way = "; the same command with --ckpt_path last goes on from the last checkpoint"
        show(f"interrupted{way if last and last.best_model_path else ', before anything was saved'}")
        raise SystemExit(130) from None
    except StoppedError as stopped:
        if _requeued(trainer, stopped):
            return
        raise
    _say_where(trainer, start)


def _requeued(trainer: Trainer, stopped: StoppedError) -> bool:
    """Put the job back into its queue, if that was asked for; says what became of it."""
    ignore_signals()
    refusal = requeue() if stopped.requeue and trainer.is_global_zero else None
    show(
        f"{stopped}; the same command with --ckpt_path last goes on from there" if stopped.checkpoint else str(stopped)
    )
    if stopped.requeue and refusal is None:
        show("the job is put back into the queue")
        return True
    if refusal:
        show(f"the job is not requeued: {refusal}")
    return False


def _say_where(trainer: Trainer, start: StartingPoint) -> None:
    best, folder = _callback(trainer, BestCheckpoint), start.run.folder
    if best and best.best_model_score is not None:
        show(f"best checkpoint: {best.best_model_path} ({best.monitor} = {float(best.best_model_score):.4g})")
    if folder and (folder / "figures").exists():
        show(f"figures:         {folder / 'figures'}")
    if isinstance(trainer.logger, TensorBoardLogger):
        show(f"TensorBoard:     tensorboard --logdir {start.experiment.parent}")


def _say_why_it_ended(trainer: Trainer, start: StartingPoint, model: Any, datamodule: Any = None, **_: Any) -> None:
    """Say why training ended; where there was none, do what the end of the run may not have come to."""
    ending = _callback(trainer, Ending)
    if ending is None:
        return
    (why, way), step = ending.reason(trainer), trainer.global_step
    if start.run.trained or not start.checkpoint:
        # of processes that multiprocessing has started, nothing comes back
        if step:
            show(f"training ended after outer step {step}: {why}")
        elif start.run.folder and not start.run.trained:
            show(f"nothing was trained: {why}; to train, {way}")
        return
    writer = _callback(trainer, ReportWriter)
    if start.resumes and isinstance(model, BilevelLearner) and trainer.limit_val_batches and writer:
        writer.ends_fit = True
        trainer.validate(model, datamodule, ckpt_path=start.checkpoint, weights_only=True, verbose=False)
    show(f"nothing to train: {start.checkpoint} is at outer step {step}, and {why}; to go on, {way}")


def _callback(trainer: Trainer, kind: type[_Kind]) -> _Kind | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
