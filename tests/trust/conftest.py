"""Counts what was done to break things, over all workers, and prints it at the end."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest

_DONE: dict[str, Any] = {}


def _add(kind: str, counts: Any) -> None:
    _DONE[kind] = _DONE[kind] + counts if kind in _DONE else counts


@pytest.fixture
def trust() -> Callable[[str, Any], None]:
    """Add to the counts of a kind, which can be added and printed."""
    return _add


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["trust"] = pickle.dumps(_DONE).hex()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take those of a worker that has ended."""
    handed = getattr(node, "workeroutput", {}).get("trust")  # a worker that was killed hands over nothing
    for kind, counts in (pickle.loads(bytes.fromhex(handed)) if handed else {}).items():
        _add(kind, counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts."""
    if _DONE:
        terminalreporter.section("trust")
    for kind, counts in _DONE.items():
        terminalreporter.line(f"{kind}: {counts}")
