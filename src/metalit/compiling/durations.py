"""How long programs took to compile, kept beside them: what the next one will take is in sight."""

import json
import os
from pathlib import Path

_FILE = "metalit_seconds.json"
_KEPT = 100  # the latest programs


def expected(folder: Path, size: int) -> float | None:
    """The seconds that a program of ``size`` operations will take: by the latest one of the most similar size."""
    known = _read(folder)
    if not known or size < 1:
        return None
    near, seconds = min(reversed(known), key=lambda pair: max(pair[0], size) / min(pair[0], size))
    return seconds * size / near


def remember(folder: Path, size: int, seconds: float) -> None:
    """Keep what a program took; where nothing can be written, nothing is kept."""
    kept = [*_read(folder), (size, seconds)][-_KEPT:]
    part = folder / f"{_FILE}.{os.getpid()}"
    try:
        part.write_text(json.dumps(kept), "utf-8")
        part.replace(folder / _FILE)
    except OSError:
        return


def _read(folder: Path) -> list[tuple[int, float]]:
    try:
        return [(int(size), float(seconds)) for size, seconds in json.loads((folder / _FILE).read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
