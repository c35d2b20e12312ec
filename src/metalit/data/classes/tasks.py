"""Tasks of classes: N-way K-shot episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metalit.data.base import WAYS, Episodes, Split, TaskDistribution
from metalit.data.classes.arrays import tensor_of
from metalit.data.classes.base import Classes, ClassSource
from metalit.data.classes.baselines import class_baselines
from metalit.data.classes.scaling import class_scaling
from metalit.data.classes.splits import ClassPartition
from metalit.data.held_out import HeldOut
from metalit.data.scaling import Scaling
from metalit.data.table import Columns
from metalit.errors import InputError
from metalit.keys import distinct, fold
from metalit.notices import warn
from metalit.problem import Points, Task

_TURNS = 4  # of a quarter each


@dataclass(frozen=True)
class ClassTasks(TaskDistribution):
    """Each task is of a few classes: few examples of each are support, others are query (Vinyals et al. 2016).

    Classes are split into train, val and test, never examples; where they come in groups, as characters do in
    alphabets, whole groups are. Means and standard deviations of the inputs come from the training classes alone. A
    task draws its classes, their order, which is their labels, and examples of each, no example twice. What is drawn
    are the numbers of examples; their values are gathered when the task is due (:meth:`load`).

    Args:
        source: where the classes come from.
        val, test: what is held out for validation and test: a fraction of the classes (0 for none, 1 for all, for a
            learner that was trained on other data), about which is made of whole groups where there are some; a list
            of names of classes and groups; or a file of names, one a line, or in a column ``label`` or ``class`` of a
            CSV file.
        train: such a list or file of what is trained on; all that is left if not given.
        split_seed: the seed of the split.
        rotations: whether quarter turns of a class are classes of their own, in the same split (Santoro et al. 2016).
        skip_small: leave out classes with fewer examples than the shots and queries of their split.

    Raises:
        InputError: from :meth:`prepare` and :meth:`check`, with the way out: what the source raises; a class in two
            splits; a single way, or fewer classes than ways; a class with too few examples.
    """

    source: ClassSource
    val: HeldOut = 0.2
    test: HeldOut = 0.2
    train: str | Sequence[str | int] | None = None
    split_seed: int = 0
    rotations: bool = False
    skip_small: bool = False

    def __post_init__(self) -> None:
        self._partition.check()

    @property
    def _partition(self) -> ClassPartition:
        return ClassPartition(self.train, self.val, self.test, self.split_seed)

    @property
    def columns(self) -> Columns:
        """The inputs, which are the channels of images, and the class."""
        return Columns("task", self._classes.columns, ["class"])

    def needs(self, sizes: Mapping[Split, Episodes]) -> None:
        """Leave out smaller classes, with ``skip_small``."""
        least = {split: size.shots + (size.rows or 1) for split, size in sizes.items()}
        if self.skip_small and self.__dict__.get("_least") != least:
            self.__dict__.update(_least=least)
            for found in ("_splits", "_own_scaling"):
                self.__dict__.pop(found, None)

    def prepare(self) -> None:
        """Read the source."""
        self._own_scaling  # noqa: B018

    def check(self, split: Split, size: Episodes) -> None:
        """There are enough classes, and enough examples of each."""
        numbers = self._splits[split]
        ways, there_are = size.ways or WAYS, len(numbers) * self._turns
        if not there_are:
            return
        if ways < 2:
            raise InputError(f"data.{split}.ways={ways}: there is nothing to tell apart; give 2 at least")
        if ways > there_are:
            raise InputError(
                f"data.{split}.ways={ways}: only {there_are} class(es) are for {split}; lower the ways or "
                f"change data.tasks.{'val and data.tasks.test' if split == 'train' else split}"
            )
        counts = self._classes.counts[numbers]
        fewest = int(counts.argmin())
        least = int(counts[fewest])
        if size.rows is None:
            raise InputError(
                f"data.{split}.queries='all': classes may have different numbers of examples, so give a number for "
                f"each class, at most {max(least - size.shots, 1)}"
            )
        needed = size.shots + size.rows
        short = int((counts < needed).sum())
        if short:
            raise InputError(
                f"data.{split}: the class {self._classes.names[int(numbers[fewest])]!r} has only {least} "
                f"example(s), and shots={size.shots} and queries={size.rows} need {needed} ({short} such class(es) of "
                f"{len(counts)}): lower them, or leave small classes out with data.tasks.skip_small=true"
            )

    def count(self, split: Split) -> int | None:
        """None, since tasks are drawn without an end, or 0 where no class is held out."""
        return None if len(self._splits[split]) else 0

    def input_shape(self) -> Sequence[int]:
        """That of the source."""
        return self.source.shape()

    @property
    def of_classes(self) -> bool:
        """They are."""
        return True

    def class_names(self, split: Split) -> Sequence[str]:
        """The names of the classes of a split, those that are turned after all that are not."""
        names = [self._classes.names[number] for number in self._splits[split].tolist()]
        return [*names, *(f"{name} {90 * turn}°" for turn in range(1, self._turns) for name in names)]

    def scaling(self) -> Scaling | None:
        """The scaling of the training classes, None without any."""
        return self._own_scaling

    def sample(self, split: Split, index: Tensor, key: Tensor, shots: int, queries: int | None) -> Task:
        """Return 5-way tasks of this size; see :meth:`of_size`."""
        return self.of_size(split, index, key, Episodes(shots=shots, queries="all" if queries is None else queries))

    def of_size(self, split: Split, index: Tensor, key: Tensor, size: Episodes) -> Task:
        """Draw classes, and examples of each: x are ``[tasks, rows]`` numbers of examples, class by class."""
        assert size.rows is not None
        ways, shots, each = size.ways or WAYS, size.shots, size.shots + size.rows
        classes, numbers = self._classes, self._splits[split]
        chosen = distinct(fold(key, 0), ways, len(numbers) * self._turns)
        which = numbers[chosen % len(numbers)]
        keys = fold(fold(key, 1).unsqueeze(-1), torch.arange(ways))
        drawn = distinct(keys, each, classes.counts[which])
        # a turned example has a number beyond those of all upright ones
        x = classes.rows[classes.start[which].unsqueeze(-1) + drawn]
        x = x + (chosen // len(numbers) * len(classes.values)).unsqueeze(-1)
        y = torch.arange(ways).unsqueeze(-1).expand_as(x)
        support, query = (
            Points(x[..., part].flatten(1), y[..., part].flatten(1)) for part in (slice(shots), slice(shots, each))
        )
        return Task(support, query, fold(key, 2), chosen)

    def load(self, tasks: Task, device: torch.device) -> Task:
        """Gather the values of examples, move them as they are, and normalise them there."""
        scaling = self.used_scaling
        support, query = (
            Points(scaling.normalise_x(self.values(points.x).to(device)), points.y.to(device))
            for points in (tasks.support, tasks.query)
        )
        assert tasks.classes is not None
        return Task(support, query, tasks.key.to(device), tasks.classes.to(device))

    def baselines(self, tasks: Task) -> dict[str, Tensor]:
        """Nearest neighbour, nearest class mean and logistic regression (:mod:`metalit.data.classes.baselines`)."""
        return class_baselines(tasks)

    def values(self, x: Tensor) -> Tensor:
        """The ``[tasks, rows, *shape]`` values of ``[tasks, rows]`` numbers of examples, in the user's units."""
        values = self._classes.values
        turn, row = x.numpy() // len(values), x.numpy() % len(values)
        gathered = np.ascontiguousarray(values[row])
        for quarter in range(1, self._turns):
            gathered[turn == quarter] = np.rot90(gathered[turn == quarter], quarter, (-2, -1))
        return tensor_of(gathered)

    @property
    def _turns(self) -> int:
        return _TURNS if self.rotations else 1

    @cached_property
    def _classes(self) -> Classes:
        classes = self.source.read_classes()
        shape = classes.values.shape[1:]
        if self.rotations and (len(shape) != 3 or shape[1] != shape[2]):
            raise InputError(f"data.tasks.rotations=true: examples are {list(shape)}, and only square images can turn")
        return classes

    @cached_property
    def _splits(self) -> dict[Split, Tensor]:
        """The numbers of the classes of each split."""
        splits = self._partition.of(self._classes)
        if not self.skip_small:
            return splits
        least, counts = self.__dict__.get("_least", {}), self._classes.counts
        kept = {split: numbers[counts[numbers] >= least.get(split, 0)] for split, numbers in splits.items()}
        emptied = next((split for split in splits if len(splits[split]) and not len(kept[split])), None)
        if emptied:
            raise InputError(
                f"data.tasks.skip_small=true leaves no class for {emptied}: none of {len(splits[emptied])} has "
                f"{least[emptied]} examples; lower data.{emptied}.shots or data.{emptied}.queries"
            )
        small = [int(number) for split in splits for number in splits[split] if number not in kept[split]]
        if small:
            some = ", ".join(repr(self._classes.names[number]) for number in small[:5]) + ", …" * (len(small) > 5)
            warn(f"data.tasks.skip_small=true: {len(small)} of {len(counts)} classes have too few examples: {some}")
        return kept

    @cached_property
    def _own_scaling(self) -> Scaling | None:
        train = self._splits["train"]
        return class_scaling(self._classes, train) if len(train) else None
