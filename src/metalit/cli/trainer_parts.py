"""What a run of the command line gives its Trainer: the logger, the callbacks and the progress bar."""

import sys
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar

from metalit.callbacks import Ending, PredictionWriter, Progress, ReportWriter, SignsOfLife, StopOnSignal
from metalit.callbacks.record import RunRecord
from metalit.runs import RunFolder, RunLogger

_NOT_IN_BAREBONES = (
    *("logger", "callbacks", "enable_progress_bar"),
    *("log_every_n_steps", "enable_model_summary", "enable_checkpointing"),
)


def trainer_arguments(config: Namespace, run: RunFolder, record: RunRecord) -> dict[str, Any]:
    """The Trainer's arguments beside what the configuration says; ``barebones`` leaves all of ours out.

    Args:
        config: the section ``trainer`` of the configuration.
        run: the folder of the run.
        record: of the run.
    """
    if config.barebones:
        return dict.fromkeys(_NOT_IN_BAREBONES)
    found: dict[str, Any] = {}
    if config.logger in (None, True):
        found["logger"] = RunLogger(run)
    own = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
    own = [callback for callback in own if callback is not None]
    callbacks: list[Callback] = [ReportWriter(), PredictionWriter(), Ending(), record]
    if config.enable_checkpointing is not False:
        callbacks.append(StopOnSignal())
    if any(isinstance(callback, ProgressBar) for callback in own):
        found["enable_progress_bar"] = config.enable_progress_bar is not False
    elif config.enable_progress_bar is None:
        found["enable_progress_bar"] = sys.stdout.isatty()
        # first, because the others print below it once it has ended
        callbacks = [Progress() if sys.stdout.isatty() else SignsOfLife(), *callbacks]
    return found | {"callbacks": [run, *own, *callbacks]}


def wants(key: str, config: Namespace) -> bool:
    """Whether the callback that has a section of its own in the configuration, such as ``figures``, is wanted.

    What saves is not where nothing is to be kept: then nothing can be gone on from after a signal either.
    """
    saves = key in ("best_checkpoint", "last_checkpoint")
    return not config.barebones and not (saves and config.enable_checkpointing is False)
