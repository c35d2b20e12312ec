"""What all pictures share: names of the user's in them, their pixels, and that none of them ever ends a run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160  # with 10 points on 5 inches: 11 pixels where a card of TensorBoard is 400 pixels wide
_LONGEST = 40  # letters of a name


class Sketching:
    """Runs what draws: whatever fails there is one line of warning, told once, and the run goes on without.

    Args:
        what: what is drawn, for the message.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._told = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw inside."""
        try:
            yield
        except Exception as error:  # a picture is worth less than the run
            if not self._told:
                self._told = True
                reason = " ".join(str(error).split()) or type(error).__name__
                rank_zero_warn(f"{self.what}: not drawn ({type(error).__name__}: {reason}); the run goes on without")


def literal(name: object, longest: int = _LONGEST) -> str:
    """A name of the user's as Matplotlib is to show it: as it is written, never as a formula, on one line.

    >>> literal("cost in $ at 5 $")
    'cost in \\\\$ at 5 \\\\$'
    """
    text = "".join(letter if letter.isprintable() else " " for letter in str(name))
    text = " ".join(text.split())
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def pixels(figure: "Figure") -> np.ndarray:
    """Render a figure, ``[height, width, 3]``, once for all files: to arrange and to render it takes the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # a letter that the font has not is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def panels(count: int) -> "tuple[Figure, list[Axes]]":
    """A figure of ``count`` panels, two by two, so that the writing is legible where there is little room."""
    from matplotlib.figure import Figure

    across = min(2, count)
    down = -(-count // across)
    figure = Figure(figsize=(5.0, 2.5 * down + 0.5 if across > 1 else 4.0), layout="constrained")
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]
