"""The user's files of cells, read in one way for all: decoded, split at their separator, and counted by line."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from metalit.errors import InputError
from metalit.notices import warn

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
_OTHER_KINDS = {
    b"PK\x03\x04": "an Excel workbook or a ZIP archive; save the sheet as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of old; save the sheet as CSV (UTF-8)",
    b"PAR1": "a Parquet file; save it as CSV",
    b"%PDF": "a PDF; save the table as CSV",
    b"\x1f\x8b": "compressed by gzip; give its name the suffix .gz",
    b"BZh": "compressed by bzip2; give its name the suffix .bz2",
    b"\xfd7zXZ": "compressed by xz; give its name the suffix .xz",
}
# the mark of UTF-16 is how that of UTF-32 begins
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f]")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_DECLARED = re.compile(r"sep=([,;\t|])[\r\n]")  # a first line of Excel's
_LOOKED_AT = 20  # records that tell which separator it is


class Records(NamedTuple):
    """The cells of a file, record by record, blank lines left out.

    ``lines`` are the lines of the file that the records end in; ``separator`` is what stands between the cells.
    """

    cells: list[list[str]]
    lines: list[int]
    separator: str


def check_file(file: str | Path, owner: str) -> Path:
    """Return the path of a file that exists.

    Raises:
        InputError: there is none.
    """
    path = Path(file)
    try:
        found = path.is_file()
    except OSError:  # a name that is too long
        found = False
    if not found:
        raise InputError(f"{owner}={shown(str(file))}: there is no such file (looked in {Path.cwd()})")
    return path


def read_records(file: str | Path, owner: str) -> Records:
    """Read a text file of cells between commas, semicolons, tabs or bars.

    Texts are UTF-8, or UTF-16 or UTF-32 with a byte order mark; what is none of those is read as Windows-1252, and
    told. Files may be compressed (``.gz``, ``.bz2``, ``.xz``).

    Args:
        file: its name.
        owner: the argument that names it, for messages.

    Raises:
        InputError: no such file, no text, or quotes that do not end.
    """
    text = read_text(file, owner)
    declared = _DECLARED.match(text)
    separator = declared[1] if declared else _separator(text)
    with _cells_of_any_length():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        cells, lines = [], []
        try:
            for record in reader:
                if record:
                    cells.append(record)
                    lines.append(reader.line_num)
        except csv.Error as cause:
            raise InputError(
                f"{owner}={shown(str(file))} is no CSV table: line {reader.line_num}: {cause}; mend the quotes"
            ) from None
    first = 1 if declared else 0
    return Records(cells[first:], lines[first:], separator)


def read_text(file: str | Path, owner: str) -> str:
    """Read a text file in the encodings of :func:`read_records`, without its byte order mark.

    Raises:
        InputError: no such file, or no text.
    """
    path, owner = check_file(file, owner), f"{owner}={shown(str(file))}"
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as handle:
            content = handle.read()
    except _BROKEN as cause:
        raise InputError(f"{owner} cannot be read: {getattr(cause, 'strerror', None) or cause}") from None
    kind = next((kind for start, kind in _OTHER_KINDS.items() if content.startswith(start)), None)
    if kind:
        raise InputError(f"{owner} is no CSV table: it is {kind}")
    text = _decoded(content, owner)
    if _NO_TEXT.search(text):
        raise InputError(f"{owner} is no CSV table: it holds bytes that no text has; save it as CSV (UTF-8)")
    return text


def shown(text: str, most: int = 200) -> str:
    """A text in quotes, shortened where it is long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def _decoded(content: bytes, owner: str) -> str:
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as cause:
        if encoding != "utf-8":
            raise InputError(f"{owner} is no CSV table: {cause}; save it as CSV (UTF-8)") from None
    text = content.decode("cp1252", errors="replace")
    if not _NO_TEXT.search(text):
        warn(f"{owner} is no UTF-8, and is read as Windows-1252 (Latin-1); save it as UTF-8 if letters come out wrong")
    return text


def _separator(text: str) -> str:
    """The one that cuts the first records into equally many cells, the most of them; the comma among equals."""

    def judged(separator: str) -> tuple[bool, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        with _cells_of_any_length():
            widths = [len(record) for record in islice((record for record in reader if record), _LOOKED_AT)]
        return len(set(widths)) == 1 and widths[0] > 1, widths[0] if widths else 0

    return max(_SEPARATORS, key=judged)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
