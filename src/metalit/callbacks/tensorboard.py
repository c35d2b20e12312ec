"""TensorBoard: what a run shows there, and how the results of a test get into it."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

_MARKDOWN = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>()#+-!|$~"} | {"\n": " ", "\r": " "})


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers that write for TensorBoard, on rank 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero]


def write_table(
    logger: Any, tag: str, headings: Sequence[str], rows: Iterable[Sequence[str]], step: int, lines: Sequence[str] = ()
) -> None:
    """Send a table; of the lines of text, the first stands above it and the others below."""

    def joined(cells: Iterable[str]) -> str:
        # names stand as the user wrote them, not as Markdown
        return f"| {' | '.join(cell.translate(_MARKDOWN) for cell in cells)} |"

    table = [joined(headings), f"|{' --- |' * len(headings)}", *map(joined, rows)]
    before, *after = [line.translate(_MARKDOWN) for line in lines] or [""]
    text = "\n\n".join([before, "\n".join(table), *after])
    logger.experiment.add_text(tag, text, step)
