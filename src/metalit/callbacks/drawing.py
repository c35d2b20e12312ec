"""What all pictures share: names as the user wrote them, pixels, and that a failing picture never ends a run."""

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from metalit.notices import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# a card of TensorBoard shows some 400 × 210 pixels: letters of 10 points are 10 pixels high there
WIDTH, HEIGHT = 5.5, 3.0  # inches
_ROW, _DPI = 1.35, 160
_LONGEST = 40  # letters of a name
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")  # of Okabe and Ito: apart for the colour-blind too


class Sketching:
    """Runs code that draws: if it fails, one line warns of it, once, and the run goes on without the picture.

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
                warn(f"{self.what}: not drawn ({type(error).__name__}: {reason}); the run goes on without")


@contextmanager
def nothing_left() -> Iterator[None]:
    """Free at the end what was made inside and is needed no more, cycles too, such as a figure and its axes.

    Python would keep them, 2 MB a figure, until its next collection of everything. Without a collection inside, all of
    it is young, and to look through the young is cheap.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


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


def panels(count: int, across: int = 2) -> "tuple[Figure, list[Axes]]":
    """A figure of ``count`` panels, few in a row, so that the writing is legible in a card of TensorBoard."""
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(WIDTH, max(HEIGHT, _ROW * down + 0.3)), layout="constrained")
    places = [figure.add_subplot(down, across, place + 1) for place in range(count)]
    for axes in places:
        axes.tick_params(labelsize=8, pad=2)
    return figure, places


def labelled(figure: "Figure", places: "Sequence[Axes]", x: str, y: str, legend: Literal["right", "top"]) -> None:
    """Say once for all panels what they show."""
    if len(places) == 1:
        places[0].set(xlabel=x, ylabel=y)
    else:
        figure.supxlabel(x, fontsize=10)
        figure.supylabel(y, fontsize=10)
    # some panels may show more than others
    handles, labels = max((axes.get_legend_handles_labels() for axes in places), key=lambda found: len(found[1]))
    place: Literal["outside right upper", "outside upper center"]
    place = "outside right upper" if legend == "right" else "outside upper center"
    figure.legend(handles, labels, loc=place, frameon=False, fontsize=9, handlelength=1.8, labelspacing=0.3)


def save_picture(picture: np.ndarray, file: Path) -> None:
    """Write pixels to a PNG file."""
    from matplotlib.image import imsave

    file.parent.mkdir(parents=True, exist_ok=True)
    imsave(file, picture)
