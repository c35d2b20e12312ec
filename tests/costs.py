"""What a run of tests costs whatever the machine: each of these takes about a second or more, and is counted.

A quick run that has more of one than its budget fails, and names the tests that have most. A budget is there so that
the quick run stays quick: what goes beyond it shares a process or a program with another test, or is marked ``long``.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BUDGET = {"Python processes": 30, "command lines": 320, "compiled programs": 95}


class Costs:
    """A plugin of pytest, that adds up what its workers have counted."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.test = ""
        sys.addaudithook(self._heard)

    def add(self, kind: str) -> None:
        """Count one for the test that runs."""
        if self.test:
            self.counts[kind, self.test] += 1

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and Path(str(arguments[0])).name.startswith("python"):
            self.add("Python processes")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        for kind, test, number in getattr(node, "workeroutput", {}).get("costs", []):
            self.counts[kind, test] += number

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["costs"] = [(*key, number) for key, number in self.counts.items()]
        elif self._beyond(session.config):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if not self._is_quick(config):
            return
        terminalreporter.section("costs")
        beyond = self._beyond(config)
        for kind, budget in BUDGET.items():
            terminalreporter.line(f"{kind}: {self._total(kind)}, of at most {budget}")
            if kind in beyond:
                most = Counter({test: number for (other, test), number in self.counts.items() if other == kind})
                for test, number in most.most_common(10):
                    terminalreporter.line(f"  {number} in {test}", red=True)

    def _total(self, kind: str) -> int:
        return sum(number for (other, _), number in self.counts.items() if other == kind)

    def _beyond(self, config: pytest.Config) -> list[str]:
        return [kind for kind, budget in BUDGET.items() if self._is_quick(config) and self._total(kind) > budget]

    @staticmethod
    def _is_quick(config: pytest.Config) -> bool:
        return "not long" in config.getoption("markexpr")
