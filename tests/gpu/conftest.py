"""Tests of a GPU, or of the device that ``METALIT_DEVICE`` names: ``cpu`` runs them as far as they go without one."""

import json
import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("METALIT_DEVICE", "cuda")
RESULTS = "METALIT_GPU_RESULTS"  # a file that gets a line of JSON as soon as a test ends
ABSENT = "torch sees no GPU here; METALIT_DEVICE=cpu runs these tests on the CPU, as far as they go"


class _Lines:
    """Writes what every test found."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        found = {
            "test": report.nodeid.rpartition("/")[2],
            "outcome": report.outcome if report.when == "call" or report.skipped else f"{report.when} failed",
            "seconds": round(report.duration, 2),
            "why": report.longreprtext.strip().splitlines()[-12:] if report.failed else [],
            **dict(report.user_properties),
        }
        with self.file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Write results where they are asked for, in the process that hears of all of them."""
    if RESULTS in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Lines(Path(os.environ[RESULTS]).absolute()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why in one line, not one for each test."""
    if any(ABSENT in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(f"skipped: {ABSENT}")


@pytest.fixture(autouse=True)
def _there_is_a_device():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(ABSENT)


@pytest.fixture
def device():
    """``cuda``, or what ``METALIT_DEVICE`` says."""
    return DEVICE
