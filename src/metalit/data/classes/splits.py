"""Which classes are for training, validation and test."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from metalit.data.base import Split
from metalit.data.classes.base import Classes
from metalit.data.files import shown
from metalit.data.held_out import HeldOut, check_fractions, given_names, holds_all
from metalit.data.table import nearest, read_table
from metalit.errors import InputError
from metalit.keys import fold, permutation

_COLUMNS = ("label", "class")  # of the lists of miniImageNet
_VALIDATION = ("val", "valid", "validation", "dev")  # what the folder of it is called, beside train and test
_TURN = re.compile(r"/rot\d+$")  # the lists of Omniglot name each quarter turn


class ClassPartition(NamedTuple):
    """Classes are split by name, whole; where there are groups, a fraction of the classes is made of whole groups.

    ``val`` and ``test`` are a fraction (1 for all), a list of names, or a file of names, one a line or in a column
    ``label`` or ``class`` of a CSV file. ``train`` is such a list or file, or None for all that is left. A name is that
    of a class or of a folder that classes are in, which stands for them all; where no name is quite it, its outer
    folders may be left out.
    """

    train: str | Sequence[str | int] | None
    val: HeldOut
    test: HeldOut
    split_seed: int

    def check(self) -> None:
        """Check what can be checked without the classes.

        Raises:
            InputError: a fraction beyond its range.
        """
        check_fractions(self.val, self.test, "classes")
        if self.train is not None and not self._trains:
            raise InputError(
                f"data.tasks: val={self.val} and test={self.test} hold out all classes, and "
                f"data.tasks.train={self.train} names some; add --data.tasks.train null"
            )
        if isinstance(self.train, int | float):
            raise InputError(
                f"data.tasks.train={self.train} must be a list of names or a file; leave it out for the rest"
            )

    def of(self, classes: Classes) -> dict[Split, Tensor]:
        """The numbers of the classes of each split, ascending.

        Raises:
            InputError: names of no class, or in two splits; a split that is wanted and has no class; fractions of what
                is split already.
        """
        places = _places(classes.names)
        named: dict[Split, list[int]] = {}
        for split in get_args(Split):
            held = getattr(self, split)
            if not (held is None or isinstance(held, int | float)):
                named[split] = _numbers(held, f"data.tasks.{split}", places)
        _check_once(named, classes.names)
        if not named and self._trains:
            _check_no_split_of_its_own(classes)
        taken = {number for numbers in named.values() for number in numbers}
        units = _units(classes)
        free = [unit for unit in units if not taken.intersection(unit)]
        order = permutation(fold(torch.tensor(self.split_seed), len(get_args(Split))), len(free)).tolist()
        rest = [free[position] for position in order]
        held_out: tuple[Split, Split] = ("test", "val")
        for split in held_out:
            if split not in named:
                chosen = _nearest(rest, getattr(self, split) * len(classes.names))
                named[split] = [number for unit in chosen for number in unit]
                rest = [unit for unit in rest if unit not in chosen]
        left = {number for unit in units for number in unit} - {*named["val"], *named["test"]}
        named.setdefault("train", [*left])
        wanted = [split for split in held_out if getattr(self, split)]
        if (self._trains and not named["train"]) or not all(named[split] for split in wanted):
            kind = "class(es)" if classes.groups is None else "group(s) of classes"
            raise InputError(
                f"data.tasks.source: {len(units)} {kind} cannot be split into train, val and test with val={self.val} "
                f"and test={self.test}: each split needs one at least; change the fractions or give lists of names"
            )
        return {split: torch.tensor(sorted(named[split]), dtype=torch.int64) for split in get_args(Split)}

    @property
    def _trains(self) -> bool:
        return not (holds_all(self.val) or holds_all(self.test))


def _check_no_split_of_its_own(classes: Classes) -> None:
    """Refuse to split anew what comes in folders ``train``, ``val`` and ``test``, as published data does."""
    if classes.groups is None:
        return
    outer = {name.split("/")[0].lower(): name.split("/")[0] for name in classes.names}
    if {"train", "test"} <= outer.keys():
        val = next((outer[name] for name in _VALIDATION if name in outer), None)
        raise InputError(
            f"data.tasks.source: its classes are in {' and '.join(map(repr, outer.values()))}, so they are split "
            f"already, and fractions would mix them; add --data.tasks.train [{outer['train']}] --data.tasks.val "
            f"{f'[{val}]' if val else '0'} --data.tasks.test [{outer['test']}], or rename the folders"
        )


def _units(classes: Classes) -> list[list[int]]:
    """What fractions are made of: the classes, or the groups with their classes, by name."""
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(classes.names if classes.groups is None else classes.groups):
        groups.setdefault(group, []).append(number)
    return [groups[name] for name in sorted(groups)]


def _nearest(units: Sequence[list[int]], goal: float) -> list[list[int]]:
    """The first units, but those too large, that have about so many classes together."""
    chosen: list[list[int]] = []
    total = 0
    for unit in units:
        if abs(total + len(unit) - goal) < abs(total - goal):
            chosen.append(unit)
            total += len(unit)
    return chosen


def _places(names: Sequence[str]) -> list[dict[str, list[int]]]:
    """The classes that a name may mean: by whole paths first, then by paths without their outer folders.

    >>> _places(["a/b", "a/c"])
    [{'a': [0, 1], 'a/b': [0], 'a/c': [1]}, {'b': [0], 'c': [1]}]
    """
    whole: dict[str, list[int]] = {}
    inner: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        parts = name.split("/")
        for first in range(len(parts)):
            for last in range(first + 1, len(parts) + 1):
                (inner if first else whole).setdefault("/".join(parts[first:last]), []).append(number)
    return [whole, inner]


def _numbers(held: str | Sequence[str | int], owner: str, places: Sequence[Mapping[str, list[int]]]) -> list[int]:
    """The classes that a list or a file names."""
    if isinstance(held, str) and held.lower().endswith(".csv"):
        given, owner = _column(held, owner), f"{owner}={shown(held)}"
    else:
        given, owner = given_names(held, owner, places[0], "class")
    found: list[int] = []
    for name in dict.fromkeys(_TURN.sub("", name).strip("/") for name in given):
        numbers = next((place[name] for place in places if name in place), None)
        if numbers is None:
            near = nearest(name, list(places[0]))
            hint = f"did you mean {near!r}?" if near else "each must be the name of a class, or of a group of them"
            raise InputError(f"{owner}: there is no class {name!r}; {hint}")
        found += numbers
    return list(dict.fromkeys(found))


def _column(file: str, owner: str) -> list[str]:
    frame = read_table(file, owner)
    column = next((name for name in _COLUMNS if name in frame), None)
    if column is None:
        raise InputError(f"{owner}={shown(file)}: there is no column {' or '.join(map(repr, _COLUMNS))} of classes")
    return frame[column].tolist()


def _check_once(named: Mapping[Split, Sequence[int]], names: Sequence[str]) -> None:
    where: dict[int, Split] = {}
    for split, numbers in named.items():
        for number in numbers:
            if number in where:
                raise InputError(
                    f"data.tasks: the class {names[number]!r} would be in {where[number]} and in {split}; each class "
                    "is in one split"
                )
            where[number] = split
