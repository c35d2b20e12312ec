"""Counts what was done to break things, and prints it at the end."""

from collections.abc import Callable
from typing import Any

import pytest

_DONE: dict[str, Any] = {}


@pytest.fixture
def trust() -> Callable[[str, Any], None]:
    """Add to the counts of a kind, which can be added and printed."""

    def add(kind: str, counts: Any) -> None:
        _DONE[kind] = _DONE[kind] + counts if kind in _DONE else counts

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts."""
    if _DONE:
        terminalreporter.section("trust")
    for kind, counts in _DONE.items():
        terminalreporter.line(f"{kind}: {counts}")
