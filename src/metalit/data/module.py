"""The DataModule: draws the tasks of every split, and reads the user's points for prediction."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metalit.data.base import Episodes, Split, TaskDistribution, task_keys
from metalit.data.classes.asked import AskedClasses, asked_classes
from metalit.data.draws import StreamDataModule
from metalit.data.stream import EvalStream, Fused
from metalit.data.table import Asked, read_asked
from metalit.errors import InputError
from metalit.notices import warn
from metalit.problem import Task

_PICTURED_QUERIES = 200


class TaskDataModule(StreamDataModule):
    """Tasks for training, validation and test, a pure function of (seed, split, index).

    Args:
        tasks: where they come from.
        train, val, test: how many tasks, of how many rows.
        seed: the seed of every draw; independent of ``seed_everything``, which seeds the network's initial weights.
        predict_file: for prediction: a CSV file of new tasks with the columns of the distribution; rows with y are
            support, rows without are asked. Of classes, a CSV file of one task whose column of the class is empty where
            it is asked, or an ``.npz`` of ``support_x``, ``support_y`` and ``query_x``.
        predict_one_task: whether that file has no column of tasks, because all its rows are of one.
        predict_folder: for prediction of classes of images: a folder with a subfolder of examples for each class; the
            images that lie beside the subfolders are asked.

    Raises:
        InputError: a number that is not positive or that the tasks cannot give; ``train.tasks`` that the ranks do not
            divide; no ``max_steps``; no ``predict_file`` in prediction; a split without a task where it is needed.
    """

    def __init__(
        self,
        tasks: TaskDistribution,
        train: Episodes = Episodes(tasks=25),
        val: Episodes = Episodes(tasks=200),
        test: Episodes = Episodes(tasks=600),
        seed: int = 0,
        predict_file: str | None = None,
        predict_one_task: bool = False,
        predict_folder: str | None = None,
    ) -> None:
        if train.tasks == "all":
            raise InputError("data.train.tasks='all': give the number of tasks of one outer step, such as 25")
        super().__init__(train.tasks, "data.train.tasks", seed)
        self.tasks = tasks
        self.episodes: dict[Split, Episodes] = {"train": train, "val": val, "test": test}
        self.predict_file = predict_file
        self.predict_one_task = predict_one_task
        self.predict_folder = predict_folder
        for split, episodes in self.episodes.items():
            for name in ("tasks", "shots", "queries", "ways"):
                value = getattr(episodes, name)
                other = {"shots": (), "ways": (None,)}.get(name, ("all",))
                if not (isinstance(value, int) and value >= 1) and value not in other:
                    raise InputError(f"data.{split}.{name}={value!r} must be a whole number, at least 1")

    def setup(self, stage: str) -> None:
        """Check everything before anything is trained."""
        if stage == "predict":
            self.asked = self._read_asked()
            return
        self.tasks.needs(self.episodes)
        self.tasks.prepare()
        self._check_wanted(stage)
        for split, episodes in self.episodes.items():
            self.tasks.check(split, episodes)
            if episodes.tasks == "all" and self.tasks.count(split) is None:
                raise InputError(
                    f"data.{split}.tasks='all': {type(self.tasks).__name__} has no last task, so give a number"
                )
        ranks = self.ranks.number
        for split in ("val", "test"):
            if 0 < self._count(split) < ranks:
                raise InputError(
                    f"data.{split}.tasks={self._count(split)} leaves some of {ranks} processes without a task; "
                    f"give {ranks} at least"
                )
        if stage == "fit":
            self.check_divisible()

    def _read_asked(self) -> Asked | AskedClasses:
        file, folder = self.predict_file, self.predict_folder
        if self.tasks.of_classes and (file is None) == (folder is None):
            raise InputError(
                "data.predict_folder: predict needs examples of classes; add --data.predict_folder DIR or "
                "--data.predict_file FILE.npz or FILE.csv, one of them"
            )
        if self.tasks.of_classes:
            return asked_classes(self.tasks, folder, file)
        if folder is not None:
            raise InputError(f"data.predict_folder={folder!r}: tasks of {type(self.tasks).__name__} have no classes")
        if file is None:
            raise InputError("data.predict_file: predict needs a CSV file of points; add --data.predict_file FILE")
        return read_asked(file, self.tasks.columns, self.tasks.levels, self.predict_one_task)

    def _check_wanted(self, stage: str) -> None:
        """A split may have no task where none is asked for; training without validation goes by its last step."""
        evaluated: dict[str, Split] = {"validate": "val", "test": "test"}
        needed = evaluated.get(stage)
        if needed and self.tasks.count(needed) == 0:
            verb = "test" if needed == "test" else "validate"  # Lightning's stage is a word with a prefix
            raise InputError(f"data.tasks.{needed}: no task is held out for {needed}, so there is nothing to {verb}")
        if stage == "fit" and self.tasks.count("train") == 0:
            raise InputError("data.tasks: all is held out, so there is nothing to train on; give smaller fractions")
        if stage == "fit" and self.tasks.count("val") == 0:
            if self.trainer:
                self.trainer.limit_val_batches = 0  # so that what waits for a validation is refused
            warn(
                "data.tasks.val: no task is held out for validation, so there is no best checkpoint: the last one is "
                "what is learned (--ckpt_path last)"
            )

    def draw(self, split: Split, index: Tensor) -> Task:
        """Return the tasks with these global indices, still to be loaded."""
        return self.tasks.of_size(split, index, task_keys(self.seed, split, index), self.episodes[split])

    def loaded(self, split: Split, index: Tensor) -> Task:
        """Return the same tasks as a network takes them, normalised, on the CPU."""
        return self.tasks.load(self.draw(split, index), torch.device("cpu"))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Load the tasks of an outer step now that it is due."""
        if isinstance(batch, Fused):
            return batch._replace(tasks=self.tasks.load(batch.tasks, device))
        if isinstance(batch, Task):
            return self.tasks.load(batch, device)
        if isinstance(batch, AskedClasses):  # still to be read
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def eval_stream(self, split: Split) -> EvalStream | list[Task]:
        """This rank's share of the split's tasks: the same ones every time."""
        tasks = self._count(split)
        return EvalStream(partial(self.draw, split), tasks, self.number, *self.ranks) if tasks else []

    def predict_dataloader(self) -> "UserTasks | UserClasses":
        """The user's tasks, one by one; every rank gets all of them."""
        return UserClasses(self.asked) if isinstance(self.asked, AskedClasses) else UserTasks(self.asked)

    def pictured(self, split: Split, count: int) -> Task:
        """The first tasks of a split, with enough query points to draw the truth by."""
        index = torch.arange(count)
        size = self.episodes[split]
        if not self.tasks.of_classes:
            size = replace(size, queries=_PICTURED_QUERIES if self.tasks.count(split) is None else "all")
        tasks = self.tasks.of_size(split, index, task_keys(self.seed, split, index), size)
        return self.tasks.load(tasks, torch.device("cpu"))

    def _count(self, split: Split) -> int:
        tasks, there_are = self.episodes[split].tasks, self.tasks.count(split)
        if there_are == 0:
            return 0
        return cast(int, there_are) if tasks == "all" else tasks  # which has an end: see TaskDistribution.check


class UserTask(NamedTuple):
    """A new task of the user's, in the user's units and in ``float64``."""

    name: str
    support_x: Tensor
    support_y: Tensor
    x: Tensor  # of all its rows, support first
    grid: Tensor  # inputs by which to draw the fit, where there is one input column; else none


@dataclass(frozen=True)
class UserTasks:
    """Iterates over the user's tasks."""

    asked: Asked

    def __len__(self) -> int:
        return len(self.asked.rows)

    def __iter__(self) -> Iterator[UserTask]:
        all_x, all_y = torch.tensor(self.asked.x), torch.tensor(self.asked.y)
        for name, rows in self.asked.rows.items():
            x, support = all_x[rows], slice(self.asked.shots[name])
            grid = torch.linspace(float(x.min()), float(x.max()), _PICTURED_QUERIES, dtype=x.dtype).unsqueeze(-1)
            yield UserTask(name, x[support], all_y[rows][support], x, grid if x.shape[1] == 1 else x[:0])


@dataclass(frozen=True)
class UserClasses:
    """Iterates over the user's only task of classes."""

    asked: AskedClasses

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[AskedClasses]:
        yield self.asked
