"""The last net: an error that nothing has foreseen is told in one line, and written down whole."""

import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from metalit.callbacks.facts import versions, without_places
from metalit.runs import where_it_failed

_LONGEST = 240  # letters of a message
_FILE = "error.txt"


def explain(error: Exception, args: Sequence[str]) -> str:
    """Write an error down, with its traceback and the versions; returns the line that says what and where.

    The file lies in the folder of the run; where that has none, or none any more, among the system's temporary files.
    """
    doing, folder = where_it_failed(error)
    lines = [
        "metalit ended with an error that it has not foreseen. Please report it with this file.",
        f"command: metalit {' '.join(without_places(list(args)))}",
        *(f"{name}: {number}" for name, number in versions().items()),
        "",
        *(line.rstrip("\n") for line in traceback.format_exception(error)),
    ]
    file = _written("\n".join(lines) + "\n", folder)
    what = " ".join(str(error).split()) or "no message"
    what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]} …"
    kept = f"the traceback is in {file}" if file else "the traceback cannot be written"
    return f"{type(error).__name__} {doing or f'in {args[0]}'}: {what}; {kept} (--traceback prints it)"


def _written(text: str, folder: Path | None) -> Path | None:
    try:
        if folder is not None and folder.is_dir():
            file = folder / _FILE
        else:
            file = Path(tempfile.mkdtemp(prefix="metalit_")) / _FILE
        file.write_text(text, encoding="utf-8")
    except OSError:
        return None
    return file
