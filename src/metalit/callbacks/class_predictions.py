"""What the learner takes the user's images or rows for, as a CSV file and a picture."""

import csv
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from torch import Tensor

from metalit.callbacks.tiles import Row, Tile, draw_rows
from metalit.data.classes.asked import AskedClasses
from metalit.errors import InputError
from metalit.modules.adapted_classes import NamedClasses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES, _EXAMPLES, _IMAGES = 12, 3, 9  # in the picture at most: classes, examples of each, images of each
_TOLD = 10  # answers on the screen


def target_of(asked: AskedClasses) -> Path:
    """The CSV file that answers are written to, beside the folder or the file."""
    name = asked.source.name if asked.source.is_dir() else asked.source.stem
    return asked.source.with_name(f"{name}_predicted.csv")


def replaces(asked: AskedClasses) -> bool:
    """Whether an earlier prediction is replaced; it is known by the names of its columns.

    Raises:
        InputError: a file of another content has the name.
    """
    target = target_of(asked)
    picture = target.with_suffix(".png")
    if not target.exists() and not picture.exists():
        return False
    with suppress(OSError, UnicodeDecodeError, StopIteration), target.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file, delimiter=asked.frame.attrs.get("separator", ",")))
        if {str(asked.frame.columns[0]), asked.answer} <= {*header} and header[-1].startswith(
            ("probability_", "score_")
        ):
            return True
    there = target if target.exists() else picture
    raise InputError(f"{asked.owner}: {there} is no earlier prediction, and is not overwritten; move it")


def write_classes(asked: AskedClasses, found: NamedClasses) -> list[str]:
    """Write the answers, and return some of them as lines.

    Raises:
        InputError: a number is not finite; nothing is written then.
    """
    scores, best = found.scores, found.scores.best()
    if not bool(scores.table.isfinite().all()):
        raise InputError(
            f"{asked.owner}: what is predicted is not finite: adapting diverges, and nothing is written. Take fewer "
            "inner steps (model.eval_steps), and see that the images are in the units of the training data"
        )
    kind = "probability" if scores.are_probabilities else "score"
    columns = [f"{kind}_{name}" for name in scores.names]
    numbers = pd.DataFrame(scores.table.double().cpu().numpy().round(6), asked.frame.index, columns)
    frame = pd.concat([asked.frame.assign(**{asked.answer: best}), numbers], axis=1)
    style = (
        {"sep": asked.frame.attrs["separator"], "decimal": asked.frame.attrs["decimal"]} if asked.frame.attrs else {}
    )
    frame.to_csv(target_of(asked), index=False, **style)
    rows = asked.rows()
    lines = [
        f"  {asked.named(row)}: {best[row]} ({_told(scores[best[row]][row], scores.are_probabilities)})"
        for row in rows[:_TOLD]
    ]
    return [*lines, *([f"  … {len(rows) - _TOLD} more in the file"] if len(rows) > _TOLD else [])]


def draw_classes(asked: AskedClasses, found: NamedClasses) -> "Figure | None":
    """Draw the examples of each class and the images that are taken for it, the surest first; None of no images."""
    if found.asked.dim() != 4:
        return None
    scores, best = found.scores, found.scores.best()
    examples, images = found.examples.cpu().numpy(), found.asked.cpu().numpy()
    rows, is_part = [], len(scores.names) > _CLASSES
    for name in scores.names[:_CLASSES]:
        own = [place for place, label in enumerate(asked.labels) if label == name][:_EXAMPLES]
        taken = sorted((place for place, label in enumerate(best) if label == name), key=lambda k: -scores[name][k])
        shown = taken[: _IMAGES - len(own)]
        is_part = is_part or len(shown) < len(taken)
        captions = [_told(scores[name][k], scores.are_probabilities) for k in shown]
        tiles = [Tile(images[place], caption) for place, caption in zip(shown, captions, strict=True)]
        rows.append(Row(str(name), [Tile(examples[place]) for place in own], tiles))
    title = (
        f"{len(best)} image{'s' if len(best) > 1 else ''} of {asked.source.name}{' (not all shown)' if is_part else ''}"
    )
    return draw_rows(rows, title, ("examples", "taken for it"))


def _told(score: Tensor, is_probability: bool) -> str:
    return f"{float(score):.0%}".replace("%", " %") if is_probability else f"{float(score):.3g}"
