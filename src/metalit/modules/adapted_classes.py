"""What is learned, adapted to examples of a few classes of the user's: it names the class of others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from metalit.data.classes.arrays import tensor_of
from metalit.data.scaling import Scaling
from metalit.errors import InputError
from metalit.judging import probabilities
from metalit.notices import warn
from metalit.tree import Tree

if TYPE_CHECKING:
    from metalit.modules.adapted import Adapted

Label: TypeAlias = str | int
_SPANS = 0.05, 100.0  # of images, in standard deviations of the training data; others are in other units


@dataclass(frozen=True)
class ClassScores(Mapping[Label, Tensor]):
    """What is said of rows: by the name of each class its probability, ``[rows]``.

    >>> found = ClassScores(["cat", "dog"], torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    >>> found.best(), found["dog"]
    (['cat', 'dog'], tensor([0.1000, 0.8000]))

    Attributes:
        names: of the classes, sorted.
        table: the same numbers as ``[rows, classes]``.
        are_probabilities: whether they are; where the criterion is not known to give any, they are the network's
            outputs.
    """

    names: Sequence[Label]
    table: Tensor
    are_probabilities: bool = True

    def __getitem__(self, name: Label) -> Tensor:
        if name not in self.names:
            raise KeyError(f"{name!r} is none of the classes {list(self.names)}")
        return self.table[:, self.names.index(name)]

    def __iter__(self) -> Iterator[Label]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def best(self) -> list[Label]:
        """The most probable class of each row."""
        return [self.names[place] for place in self.table.argmax(1).tolist()]


@dataclass(frozen=True)
class AdaptedClasses:
    """A network adapted to examples of classes: call it with further ones, in the user's units.

    Attributes:
        adapted: what it says in numbers (:class:`~metalit.modules.adapted.Adapted`).
        names: of the classes, sorted, as the user gave them.
    """

    adapted: "Adapted"
    names: Sequence[Label]

    def __call__(self, x: Tensor | np.ndarray) -> ClassScores:
        """Return the probability of each class at ``[rows, inputs]`` or ``[rows, channels, height, width]``.

        Raises:
            InputError: inputs of another shape, or that are not finite.
        """
        learner = self.adapted.learner
        outputs = self.adapted.outputs(inputs_of("x", x, learner.scaling))
        criterion = getattr(learner.problem, "loss", None)
        # a head may have more outputs than there are classes
        outputs = outputs if outputs.shape[1] == 1 else outputs[:, : len(self.names)]
        found = probabilities(criterion, outputs)
        return ClassScores(self.names, outputs if found is None else found, found is not None)

    def loss(self, x: Tensor | np.ndarray, y: Sequence[Label]) -> float:
        """The mean loss at examples, of which y are the names of the classes.

        Raises:
            InputError: inputs of another shape, or that are not finite; a name of no class.
        """
        other = next((name for name in y if name not in self.names), None)
        if other is not None:
            raise InputError(f"loss: y holds {other!r}, which is none of the classes {list(self.names)}")
        inputs = inputs_of("x", x, self.adapted.learner.scaling, "loss")
        return self.adapted.loss(inputs, torch.tensor([self.names.index(name) for name in y]))

    @property
    def inner(self) -> Tree:
        """The adapted parameters by name."""
        return self.adapted.inner

    @property
    def steps(self) -> int:
        """After how many inner steps."""
        return self.adapted.steps


class NamedClasses(NamedTuple):
    """What a prediction finds, in parts that Lightning can move.

    Attributes:
        names, table, are_probabilities: those of :class:`ClassScores`, of what was asked.
        examples, asked: ``[rows, ...]``, in the user's units.
    """

    names: Sequence[Label]
    table: Tensor
    are_probabilities: bool
    examples: Tensor
    asked: Tensor

    @property
    def scores(self) -> ClassScores:
        """What is said of what was asked."""
        return ClassScores(self.names, self.table, self.are_probabilities)


def are_classes(y: Any) -> bool:
    """Whether targets are classes: a list, an array or a tensor of one dimension, of whole numbers or of strings."""
    if isinstance(y, Tensor):
        return y.dim() == 1 and not (y.is_floating_point() or y.is_complex())
    found = np.asarray(y)
    return found.ndim == 1 and (found.dtype.kind in "biuUO" or not len(found))


def labels_of(y: Any, scaling: Scaling | None, owner: str) -> tuple[list[Label], Tensor]:
    """The different classes, sorted, and the number of each row's among them.

    Raises:
        InputError: what was learned predicts real numbers; a label that is none; a single class.
    """
    if scaling is not None and (any(scaling.y_mean) or any(std != 1 for std in scaling.y_std)):
        raise InputError(
            f"{owner}: y holds classes, and what is learned predicts real numbers, in the units of its training data; "
            "give y as a tensor of real numbers [points, outputs]"
        )
    y = y.cpu() if isinstance(y, Tensor) else y if isinstance(y, np.ndarray) else list(y)
    # a list of both would become one of texts
    named = isinstance(y, list) and any(isinstance(label, str) for label in y)
    given = np.asarray(y, dtype=object if named else None)
    if not are_classes(given):
        raise InputError(
            f"{owner}: y is {list(given.shape)} of {given.dtype}; give the class of each row, [rows] whole numbers or "
            "names"
        )
    if given.dtype.kind == "O":
        odd = next((label for label in given if not isinstance(label, str)), None)
        if odd is not None or not all(isinstance(label, str) for label in given):
            raise InputError(
                f"{owner}: y holds {odd!r} beside names; give all classes as names, or all as whole numbers"
            )
        given = given.astype(str)
    found, number = np.unique(given, return_inverse=True)
    names: list[Label] = [int(name) if given.dtype.kind in "biu" else str(name) for name in found]
    if len(names) < 2:
        raise InputError(f"{owner}: y holds {len(names)} class(es), {names}; give examples of two at least")
    return names, torch.from_numpy(number.astype(np.int64))


def inputs_of(name: str, x: Any, scaling: Scaling | None, owner: str = "adapt") -> Tensor:
    """Inputs as a tensor, checked against what the network was trained on.

    Raises:
        InputError: another shape, no row, or values that are not finite.
    """
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        x = tensor_of(x)
    if not isinstance(x, Tensor):
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else f"of type {type(x).__name__}"
        raise InputError(f"{owner}: {name} is {kind}; give a tensor of numbers, torch.as_tensor(...)")
    shape = [] if scaling is None else [*scaling.x_shape] or [len(scaling.x_mean)]
    if x.dim() < 2 or (shape and list(x.shape[1:]) != shape):
        raise InputError(f"{owner}: {name} has shape {tuple(x.shape)}; {_what_is_taken(list(x.shape[1:]), shape)}")
    if len(x) == 0:
        raise InputError(f"{owner}: {name} has no row; give one at least")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{owner}: {name} holds values that are not finite; leave those rows out")
    return x


def _what_is_taken(given: list[int], shape: list[int]) -> str:
    if len(shape) != 3:
        return f"the network takes [rows, {shape[0] if shape else '...'}]"
    channels, height, width = shape
    hint = ""
    if given == [height, width, channels]:
        hint = "; x.permute(0, 3, 1, 2) puts the channels first"
    elif channels == 1 and given == [height, width]:
        hint = "; x.unsqueeze(1) adds the channel"
    elif len(given) == 3 and given[0] != channels:
        hint = "; convert the colours"
    elif len(given) == 3:
        hint = "; resize the images"
    return f"the network takes images [rows, {channels}, {height}, {width}]{hint}"


def tell_of_units(x: Tensor | np.ndarray, scaling: Scaling | None, owner: str = "adapt") -> None:
    """Warn of images in other units than those of the training data, such as 0 … 1 in place of 0 … 255."""
    if scaling is None or not scaling.x_shape:
        return
    span, spread = float(x.max()) - float(x.min()), max(scaling.x_std)
    if not _SPANS[0] * spread < span < _SPANS[1] * spread:
        warn(
            f"{owner}: x spans {float(x.min()):.4g} to {float(x.max()):.4g}, and the training data's standard "
            f"deviation is {spread:.4g}: give images in the units of the training data"
        )


def check_outputs(outputs: int, ways: int, criterion: nn.Module | None, owner: str) -> None:
    """Raise an :class:`InputError` where there are more classes than the network has outputs for."""
    most = 2 if outputs == 1 and isinstance(criterion, nn.BCEWithLogitsLoss) else outputs
    if ways > most:
        raise InputError(
            f"{owner}: there are {ways} classes, and what is learned has outputs for {most}; give examples of at most "
            f"{most}, train with data.train.ways={ways}, or learn Prototypes, which take any number of classes"
        )
