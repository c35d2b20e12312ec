"""What is printed at the end: tables and lines, in which names stand as the user wrote them."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000


def table(headings: Sequence[str], *parts: Iterable[Sequence[str]]) -> Table:
    """A table with a line between its parts; all columns but the first are numbers."""
    made = Table()
    for number, heading in enumerate(headings):
        # a Text, because Rich takes brackets in a plain string for a style
        made.add_column(Text(heading), justify="right" if number else "left")
    for part in parts:
        for row in part:
            made.add_row(*map(Text, row))
        made.add_section()
    return made


def show(parts: Iterable[str | Table]) -> None:
    """Print tables and lines; where there is no terminal, as wide as they are."""
    for part in parts:
        console = Console()
        if isinstance(part, str):
            console.print(Text(part), soft_wrap=True)
            continue
        if not console.is_terminal:
            wide = console.options.update(max_width=_WIDEST)
            console = Console(width=max(console.width, Measurement.get(console, wide, part).maximum))
        console.print(part)
