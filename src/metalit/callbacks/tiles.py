"""Images in rows, one for each class: examples of it on the left, what was asked on the right."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalit.callbacks.drawing import HEIGHT, WIDTH, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP, _LABEL, _GAP, _CAPTION = 0.42, 1.1, 0.12, 0.16  # inches; a caption stands below its image
_LETTERS = 13  # of a label
_HEADING = 0.62  # inches that the first heading takes
_LARGEST = 0.85  # of an image and its caption
_WRONG = "#d55e00"
_FRAMES: dict[bool | None, dict[str, Any]] = {
    None: {"edgecolor": "0.8", "linewidth": 0.6},
    False: {"edgecolor": "#0072b2", "linewidth": 1.0},
    True: {"edgecolor": _WRONG, "linewidth": 2.4, "linestyle": (0, (2, 1))},
}


class Tile(NamedTuple):
    """An image with a line below it.

    Attributes:
        image: ``[channels, height, width]``, in any units.
        caption: the line.
        wrong: whether it is marked as wrong or as right; None for neither.
    """

    image: np.ndarray
    caption: str = ""
    wrong: bool | None = None


class Row(NamedTuple):
    """Of a class: its name, examples of it, and others."""

    name: str
    examples: Sequence[Tile]
    others: Sequence[Tile]


def draw_rows(rows: Sequence[Row], title: str, headings: tuple[str, str]) -> "Figure":
    """Draw rows of images; all share one scale of brightness.

    Args:
        rows: from above.
        title: a line above all.
        headings: above the examples, and above the others.
    """
    from matplotlib.figure import Figure

    examples, others = (max((len(row[part]) for row in rows), default=0) for part in (1, 2))
    across = max(examples + others, 1)
    room = WIDTH - _LABEL - 2 * _GAP
    size = min(room / across, (room - _HEADING) / max(others, 1), (HEIGHT - _TOP) / min(len(rows), 5), _LARGEST)
    figure = Figure(figsize=(WIDTH, _TOP + size * len(rows)))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(width / 2, 0.04, literal(title, 70), fontsize=10, ha="center", va="top")
    starts = _LABEL, _LABEL + max(examples * size, _HEADING) + _GAP
    for start, heading in zip(starts, headings, strict=True):
        axes.text(start, _TOP - 0.03, heading, fontsize=9, color="0.35", va="bottom")
    values = [tile.image for row in rows for tile in (*row.examples, *row.others)]
    low, high = min(map(np.min, values)), max(map(np.max, values))
    for number, row in enumerate(rows):
        top = _TOP + number * size
        axes.text(_LABEL - 0.08, top + (size - _CAPTION) / 2, _label(row.name), fontsize=9, ha="right", va="center")
        for start, tiles in zip(starts, row[1:], strict=True):
            for place, tile in enumerate(tiles):
                _draw(axes, tile, start + place * size, top, size, (float(low), float(high)))
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _label(name: str) -> str:
    """A name on two lines: its group and itself, or its beginning and its end, by which names differ.

    >>> _label("Greek/alpha"), _label("a rather long name, the 3rd")
    ('Greek\\nalpha', 'a rather long\\n…ame, the 3rd')
    """
    group, _, own = name.rpartition("/")
    if not group and len(own) > _LETTERS:
        group, own = own[:_LETTERS], own[_LETTERS:]
    if len(own) > _LETTERS:
        own = f"…{own[1 - _LETTERS :]}"
    return literal(group, _LETTERS) + "\n" * bool(group) + literal(own, _LETTERS)


def _draw(axes: "Axes", tile: Tile, left: float, top: float, size: float, limits: tuple[float, float]) -> None:
    from matplotlib.patches import Rectangle

    down, across = tile.image.shape[1:]
    tall, wide = ((size - _CAPTION) * side / max(down, across) for side in (down, across))
    bottom, left = top + size - _CAPTION, left + (size - wide) / 2
    top, (low, high) = bottom - tall, limits
    plain = (tile.image.astype(np.float64) - low) / ((high - low) or 1.0)
    grey = plain.shape[0] != 3
    axes.imshow(
        plain.mean(0) if grey else plain.transpose(1, 2, 0),
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(left, left + wide, bottom, top),
        interpolation="nearest",
    )
    style = _FRAMES[tile.wrong]
    axes.add_patch(Rectangle((left, top), wide, tall, fill=False, clip_on=False, **style))
    mark = "✗" if tile.wrong else ""
    if tile.caption or mark:
        # as many letters as there is room for
        text = literal(f"{mark}{tile.caption}", max(int(size / 0.065), 4))
        weight = "bold" if tile.wrong else "normal"
        colour = _WRONG if tile.wrong else "0.2"
        axes.text(
            left + wide / 2, bottom + 0.02, text, fontsize=7.5, weight=weight, color=colour, ha="center", va="top"
        )
