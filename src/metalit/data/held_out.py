"""Which tasks of a table are for training, validation and test."""

from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from metalit.data.base import Split
from metalit.data.files import check_file, read_text
from metalit.data.table import nearest
from metalit.errors import InputError
from metalit.keys import fold as folded
from metalit.keys import permutation

HeldOut = float | str | Sequence[str | int]


def check_fractions(val: HeldOut, test: HeldOut, kind: str) -> None:
    """Check what is held out for validation and test, as far as it is a fraction.

    Args:
        val, test: as they are given.
        kind: what they are fractions of.

    Raises:
        InputError: one beyond its range, or beside one that holds out everything.
    """
    for split, held, other in (("val", val, test), ("test", test, val)):
        if isinstance(held, int | float) and not 0 <= held <= 1:
            raise InputError(
                f"data.tasks.{split}={held} must be a fraction between 0 and 1 of the {kind} (0 for none, 1 for all), "
                "a list of their names, or a file of names"
            )
        if holds_all(held) and other != 0:
            left = "test" if split == "val" else "val"
            raise InputError(
                f"data.tasks.{split}={held} is of all {kind}, so none are left for data.tasks.{left}={other}; set that "
                "to 0"
            )


def holds_all(held: HeldOut) -> bool:
    """Whether this is the fraction 1: nothing is trained on, and a learner that was trained elsewhere is evaluated."""
    return isinstance(held, int | float) and held == 1


def given_names(held: str | Sequence[str | int], owner: str, names: Container[str], kind: str) -> tuple[list[str], str]:
    """The names that a list or a file of names holds, and what to call it in messages.

    Args:
        held: the list, or the file.
        owner: the argument.
        names: all that there are.
        kind: what they are names of.

    Raises:
        InputError: there is no such file.
    """
    if not isinstance(held, str):
        return [str(name).strip() for name in held], owner
    if held in names and not Path(held).exists():
        raise InputError(f"{owner}={held!r} is no file of names; for a single {kind}, give a list: [{held}]")
    check_file(held, owner)
    lines = [line.strip() for line in read_text(held, owner).splitlines()]
    return [line for line in lines if line], f"{owner}={held!r}"


class Partition(NamedTuple):
    """Tasks are split by name, whole.

    ``val`` and ``test`` are a fraction of all tasks (1 for all), a list of names, or a text file of names, one a line.
    With ``folds``, test is number ``fold`` of so many parts of equal size instead, and every task is in one of them.
    """

    val: HeldOut
    test: HeldOut
    split_seed: int
    folds: int | None
    fold: int

    def check(self) -> None:
        """Check what can be checked without the table.

        Raises:
            InputError: a fraction beyond its range, no such file, a fold that is none.
        """
        check_fractions(self.val, self.test, "tasks")
        folds, alone = self.folds, next((split for split in ("val", "test") if holds_all(getattr(self, split))), None)
        if folds is not None and alone:
            raise InputError(
                f"data.tasks.folds={folds} tests on a part of the tasks, and data.tasks.{alone}={getattr(self, alone)} "
                "is of all; add --data.tasks.folds null"
            )
        if folds is not None and not (folds >= 2 and 0 <= self.fold < folds):
            raise InputError(
                f"data.tasks.folds={folds} must be at least 2, and data.tasks.fold={self.fold} from 0 to "
                f"{max(folds - 1, 1)}"
            )

    def of(self, names: Sequence[str], owner: str) -> dict[Split, list[str]]:
        """Split tasks.

        Raises:
            InputError: names of no task, or in two splits; a split that is wanted and has no task.
        """
        shuffled = permutation(folded(torch.tensor(self.split_seed), len(get_args(Split))), len(names)).tolist()
        order = [names[position] for position in shuffled]
        named: dict[Split, list[str] | None] = {"val": self._named("val", names), "test": self._named("test", names)}
        if self.folds is not None:
            named["test"] = order[self.fold :: self.folds]
        twice = sorted({*(named["val"] or ())} & {*(named["test"] or ())})
        if twice:
            raise InputError(f"data.tasks: {twice[:5]} would be in val and in test; each task is in one split")
        rest = [name for name in order if name not in {*(named["val"] or ()), *(named["test"] or ())}]
        chosen: dict[Split, list[str]] = {}
        held: tuple[Split, Split] = ("test", "val")
        for split in held:
            given = named[split]
            count = round(len(names) * getattr(self, split)) if given is None else 0
            chosen[split] = rest[:count] if given is None else given
            rest = rest[count:]
        chosen["train"] = rest
        wanted = [split for split in held if getattr(self, split) or (self.folds and split == "test")]
        trains = not (holds_all(self.val) or holds_all(self.test))
        if (trains and not chosen["train"]) or not all(chosen[split] for split in wanted):
            raise InputError(
                f"{owner}: {len(names)} task(s) cannot be split into train, val and test with {self._said()}: each "
                "split needs one at least; change the fractions or add tasks"
            )
        return {split: sorted(chosen[split]) for split in get_args(Split)}

    def _said(self) -> str:
        if self.folds is not None:
            return f"val={self.val} and folds={self.folds}"
        return f"val={self.val} and test={self.test}"

    def _named(self, split: Split, names: Sequence[str]) -> list[str] | None:
        """The tasks that the user names for a split, or None if it is a fraction."""
        held = getattr(self, split)
        if isinstance(held, int | float):
            return None
        given, owner = given_names(held, f"data.tasks.{split}", names, "task")
        unknown = [name for name in given if name not in set(names)]
        if unknown:
            near = nearest(unknown[0], names)
            hint = f"did you mean {near!r}?" if near else "each must be the text of a cell in the column of tasks"
            raise InputError(f"{owner}: there is no task {unknown[0]!r} ({len(unknown)} such name(s)); {hint}")
        twice = [name for name, count in Counter(given).items() if count > 1]
        if twice:
            raise InputError(f"{owner}: {twice[:5]} stand twice; name each task once")
        return given
