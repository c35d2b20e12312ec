"""Where runs lie on disk, ``<root>/lightning_logs/<experiment>/version_N/``, and the checkpoints in them."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOENT
from os import getpid, stat_result
from os.path import samestat
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from metalit.errors import InputError
from metalit.locks import FolderLock
from metalit.notices import show, warn

_STARTED = "training has begun"
_WHERE = "_metalit_where"


def version_folder(checkpoint: Path, experiment: Path) -> str | None:
    """The name ``version_N`` of the run that a checkpoint belongs to, if it is one of this experiment's."""
    folder = checkpoint.resolve().parent.parent
    return folder.name if folder.parent == experiment.resolve() and folder.name.startswith("version_") else None


def find_checkpoint(name: str, experiment: Path) -> Path:
    """Return the checkpoint that a user means.

    Args:
        name: ``last`` or ``best`` for the newest version of the experiment that has one, and where none was ever
            validated, so that there is no best one, the last one; else a path.
        experiment: the folder of the experiment.

    Raises:
        InputError: there is none.
    """
    if name not in ("last", "best"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"ckpt_path={name!r}: there is no such file (looked in {Path.cwd()}); or say best or last")
        return path
    found, last = _checkpoints(name, experiment), _checkpoints("last", experiment)
    if last and max(last) > max(found, default=-1):
        newest, taken = max(last), found[max(found)] if found else last[max(last)]
        warn(f"version_{newest} has no best checkpoint, as nothing was validated: taking {taken}")
        return taken
    if not found:
        raise InputError(
            f"ckpt_path={name}: no version in {str(experiment)!r} has a {name}.ckpt; train one first: metalit fit"
        )
    return found[max(found)]


def has_checkpoint(name: str, experiment: Path) -> bool:
    """Whether any version of an experiment has a checkpoint of this name."""
    return bool(_checkpoints(name, experiment))


def _checkpoints(name: str, experiment: Path) -> dict[int, Path]:
    paths = {number: folder / "checkpoints" / f"{name}.ckpt" for number, folder in _versions(experiment).items()}
    return {number: path for number, path in paths.items() if path.is_file()}


def _versions(experiment: Path) -> dict[int, Path]:
    # by number: a folder that the user renamed, such as version_3_old, is no version any more
    return {
        int(folder.name.removeprefix("version_")): folder
        for folder in experiment.glob("version_*")
        if folder.name.removeprefix("version_").isdigit()
    }


def experiment_folder(root: str | None, name: str) -> Path:
    """Where the runs of an experiment lie: ``<root>/lightning_logs/<name>``.

    Raises:
        InputError: a name that leads elsewhere.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or name.startswith("~"):
        raise InputError(
            f"experiment={name!r} must be the name of a folder in lightning_logs, without '..'; set "
            "trainer.default_root_dir to have lightning_logs elsewhere"
        )
    return Path(root or ".") / "lightning_logs" / name


def run_folder(trainer: Trainer) -> Path | None:
    """Where a run keeps its configuration, checkpoints, tables, figures and results; asked on rank 0.

    It is that of the :class:`RunFolder` among the trainer's callbacks. Without one, as in Python, it is where Lightning
    would write: the folder of the first logger, or else ``default_root_dir``; it is made if need be. None if nothing is
    to be written.
    """
    if trainer.fast_dev_run:
        return None
    own = next((callback for callback in trainer.callbacks if isinstance(callback, RunFolder)), None)
    if own is not None:
        return own.folder
    logger = trainer.logger
    found = None if logger is None else getattr(logger, "log_dir", None) or logger.save_dir
    folder = Path(found or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def where_it_failed(error: BaseException) -> tuple[str, Path | None]:
    """What was being done when an error was raised, in words, and in which run; nothing where no run was opened."""
    found: tuple[str, Path | None] = vars(error).get(_WHERE, ("", None))
    return found


class RunFolder(Callback):
    """The folder of a run of the command line, ``<experiment>/version_N``: its own, and the same on all ranks.

    A new one has a number that no other run has, however many are started at once. While a run trains, no other one can
    go on in its folder. A run that ends before its first outer step leaves the disk as it found it.

    Attributes:
        folder: where it is; None before it is opened, and where nothing is written.
        trained: whether an outer step was taken.
        greeting: what is printed, with the folder, once all checks are passed and training begins.

    Args:
        experiment: the folder of the experiment.
        version: the name of a folder in it that there is already, in which the run goes on.
    """

    def __init__(self, experiment: Path, version: str | None = None) -> None:
        self.experiment = experiment
        self.folder = experiment / version if version else None
        self.greeting = ""
        self._begun = False
        self._place: stat_result | None = None

    @contextmanager
    def opened(self, trainer: Trainer, trains: bool) -> Iterator[None]:
        """Open the folder, on rank 0: a new one is made; if the run trains, it is locked.

        Raises:
            InputError: another run trains in it, or it cannot be made.
        """
        if trainer.fast_dev_run or self not in trainer.callbacks or not trainer.is_global_zero:
            self.folder = None
            yield
            return
        with ExitStack() as stack:
            is_new = self.folder is None
            folder, above = self._claim() if self.folder is None else (self.folder, [])
            self.folder = folder
            earlier = set(folder.rglob("*"))
            if trains:
                stack.callback(FolderLock(folder).release)
                for left in folder.glob("checkpoints/.*.part"):  # by a process that was killed while it saved
                    left.unlink()
            self._place = folder.stat()
            failed = True
            try:
                yield
                failed = False
            except Exception as error:
                if isinstance(error, OSError):
                    error.filename = error.filename or str(folder)
                doing = getattr(trainer.state.fn, "value", "the start")
                vars(error)[_WHERE] = (f"in {doing} at outer step {trainer.global_step}", folder)
                raise
            finally:
                if is_new and not self.trained and (failed or trains):
                    shutil.rmtree(folder, ignore_errors=True)
                    for parent in above:
                        with suppress(OSError):  # another run may use it by now
                            parent.rmdir()
                elif failed and not trains:
                    # of this process alone: another one may train there
                    for path in set(folder.glob(f"events.out.tfevents.*.{getpid()}.*")) - earlier:
                        path.unlink(missing_ok=True)
                elif failed and trains and not self.trained:
                    for path in sorted(set(folder.rglob("*")) - earlier, reverse=True):
                        with suppress(OSError):
                            path.rmdir() if path.is_dir() else path.unlink()

    def _claim(self) -> tuple[Path, list[Path]]:
        """Make the next version of the experiment; returns it, and the folders above it that had to be made too."""
        above = [self.experiment, *self.experiment.parents]
        missing = [folder for folder in above if not folder.exists()]
        try:
            self.experiment.mkdir(parents=True, exist_ok=True)
            number = max(_versions(self.experiment), default=-1) + 1
            # another run may take a number first: only one can make the folder
            while True:
                folder = self.experiment / f"version_{number}"
                try:
                    folder.mkdir()
                except FileExistsError:
                    number += 1
                else:
                    return folder, missing
        except OSError as error:
            raise InputError(
                f"trainer.default_root_dir: the folder {self.experiment} cannot be made ({error.strerror}); name one "
                "that can be written with --trainer.default_root_dir"
            ) from None

    @property
    def trained(self) -> bool:
        """Whether an outer step was taken, in this process or in one that it started."""
        try:
            return self._begun or (self.folder is not None and _STARTED in (self.folder / ".lock").read_text())
        except OSError:
            return False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let all ranks know the folder, and have checkpoints saved there, whatever the loggers are."""
        folder: str | None = trainer.strategy.broadcast(None if self.folder is None else str(self.folder))
        self.folder = Path(folder) if folder else None
        if self.folder is None:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Say that all checks are passed, and where the run is."""
        if self.greeting:
            pl_module.check_batch(pl_module.cast(batch))
            show(f"{self.greeting}; logs: {self.folder}" if self.folder else self.greeting)
            self.greeting = ""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See that the folder is still the one that was opened: another run may have its name by now.

        Raises:
            FileNotFoundError: it is gone.
        """
        if self._place and self.folder and trainer.is_global_zero:
            try:
                same = samestat(self.folder.stat(), self._place)
            except FileNotFoundError:
                same = False
            if not same:
                raise FileNotFoundError(ENOENT, "the folder of the run was removed while it trained", str(self.folder))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note that an outer step was taken."""
        if not self._begun and self.folder and trainer.is_global_zero:
            with (self.folder / ".lock").open("a") as file:
                file.write(f"{_STARTED}\n")
        self._begun = True


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard's files to the folder of the run, with the most important ones first.

    The two losses are written as ``loss/train`` and ``loss/val`` too, since TensorBoard sorts its cards by name. The
    scalars of a test are left out: each would be a card with a single dot. :class:`~metalit.callbacks.ReportWriter`
    writes a picture and a table in their place.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.experiment.parent, run.experiment.name, default_hp_metric=False)
        self._run = run

    @property
    def version(self) -> str:
        """``version_N``; on other ranks than the first, which alone writes, it may not be known yet."""
        return self._run.folder.name if self._run.folder else "version_"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars, but those of a test."""
        curves = {name: value for name, value in metrics.items() if not name.startswith("test/")}
        first = {f"loss/{split}": metrics[f"{split}/loss"] for split in ("train", "val") if f"{split}/loss" in metrics}
        super().log_metrics(curves | first, step)
