"""What a check found: plain data that prints itself."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metalit.callbacks.screen import table
from metalit.checking.curvature import Curvature
from metalit.checking.differences import Comparison
from metalit.checking.estimators import EstimatorRow
from metalit.checking.gradients import Parameter
from metalit.checking.memory import Memory, size

_WIDTH = 80
_MOST_NAMES = 8
_ROUNDING = 1e-14  # the share of the largest curvature that the smallest one may be off in double precision


@dataclass(frozen=True)
class CheckReport:
    """What :func:`~metalit.checking.check` found; ``print(report)`` shows it.

    Attributes:
        learner: what was checked, in words.
        tasks: on how many tasks.
        precision: of the check.
        seconds: how long it took.
        problems: what is wrong, one line each; empty if nothing is.
        remarks: what is worth knowing, and right.
        slopes: the exact gradient beside finite differences.
        parameters: each outer parameter.
        metrics: what a log would say of this outer step.
        curvature: that of the inner loss.
        estimators: each hypergradient on this problem.
        advice: which one to take, in one line.
        memory: what the whole batch would take.
        unit: of what is counted as tasks.
    """

    learner: str
    tasks: int
    precision: str
    seconds: float
    problems: Sequence[str] = ()
    remarks: Sequence[str] = ()
    slopes: Sequence[Comparison] = ()
    parameters: Sequence[Parameter] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    curvature: Sequence[Curvature] = ()
    estimators: Sequence[EstimatorRow] = ()
    advice: str = ""
    memory: Memory | None = None
    unit: str = "task"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_json(self) -> str:
        """All of it as one JSON object; numbers that are not finite become null."""
        return json.dumps(_plain({"ok": self.ok, **asdict(self)}))

    def __str__(self) -> str:
        """Lines and tables of at most 80 columns."""
        text = StringIO()
        console = Console(file=text, width=_WIDTH, highlight=False, color_system=None)
        for part in self._parts():
            console.print(Text(part) if isinstance(part, str) else part)
        return text.getvalue().rstrip()

    def _parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"checked {self.learner}: {counted(self.tasks, self.unit)}, {self.precision}"]
        for title, rows in (
            ("the exact gradient beside finite differences", self._slopes()),
            ("the inner level", self._inner()),
            (f"hypergradients on this problem ({counted(self.tasks, self.unit)}, not compiled)", self._estimators()),
            ("memory of an outer step", self._memory()),
        ):
            if rows:
                parts += ["", title, *rows]
        if self.advice:
            parts += ["", f"advice: {self.advice}"]
        if self.remarks:
            parts += ["", "good to know:", *(f"- {line}" for line in self.remarks)]
        parts.append("")
        if self.problems:
            parts += [f"{counted(len(self.problems), 'problem')}:", *(f"- {line}" for line in self.problems)]
        parts.append(f"{'nothing is wrong' if self.ok else 'something is wrong'} ({self.seconds:.1f} s)")
        return parts

    def _slopes(self) -> list[str | Table]:
        if not self.slopes:
            return []
        rows = [
            (each.direction, f"{each.autograd:.6g}", f"{each.differences:.6g}", f"{each.step:.0e}",
             f"{each.error:.1e}", each.verdict)
            for each in self.slopes
        ]  # fmt: skip
        lines: list[str | Table] = [table(("direction", "gradient", "difference", "step", "error", ""), rows)]
        by_status: dict[str, list[str]] = {}
        for each in self.parameters:
            by_status.setdefault(each.status, []).append(each.name)
        for status, names in by_status.items():
            shown = ", ".join(names[:_MOST_NAMES]) + (" …" if len(names) > _MOST_NAMES else "")
            lines.append(f"{status}: {shown}")
        return lines

    def _inner(self) -> list[str | Table]:
        lines: list[str | Table] = []
        if "inner_grad_norm" in self.metrics:
            ratio = 100 * self.metrics["inner_grad_ratio"]
            lines.append(f"inner gradient left: {self.metrics['inner_grad_norm']:.3g} ({ratio:.3g} % of the first)")
        if "solver_residual" in self.metrics:
            lines.append(f"residual of the solver: {self.metrics['solver_residual']:.2g}")
        for each in self.curvature:
            about = "" if each.products >= each.entries else "about "
            least = 0.0 if abs(each.smallest) < _ROUNDING * abs(each.largest) else each.smallest
            lines.append(
                f"curvature at the {each.place}: {about}{least:.3g} to {each.largest:.3g}; "
                f"inner loss {each.inner_loss:.4g}"
            )
        return lines

    def _estimators(self) -> list[str | Table]:
        valid = [row for row in self.estimators if not row.invalid]
        rows = [
            (f"{row.name}{' *' if row.configured else ''}", _number(row.cosine, ".4f"), _number(row.error, ".1e"),
             f"{1e3 * row.seconds:.1f} ms", size(row.peak))
            for row in valid
        ]  # fmt: skip
        lines: list[str | Table] = [table(("", "cosine", "error", "time", "memory"), rows)] if rows else []
        if rows:
            lines.append("* the configured one; cosine and error against the exact gradient")
        for word, of in (
            ("not valid", lambda row: row.invalid),
            ("training would warn", lambda row: "; ".join(row.told)),
        ):
            by_reason: dict[str, list[str]] = {}
            for row in self.estimators:
                if of(row) and not (row.configured and word != "not valid"):
                    by_reason.setdefault(_short(of(row), row.name), []).append(row.name)
            lines += [f"{word}: {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return lines

    def _memory(self) -> list[str | Table]:
        if self.memory is None:
            return []
        found = self.memory
        rows = [(name, size(found.all_at_once[name]), size(found.one_by_one[name])) for name in found.all_at_once]
        there_are = "" if found.there_are is None else f"; {size(found.there_are)} are free"
        low, high = found.measured
        way = f"measured on {counted(high, self.unit)}" if low == high else f"from {low} and {high} tasks"
        return [table(("", f"all {counted(found.tasks, self.unit)}", "in chunks of 1"), rows), f"{way}{there_are}"]


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "task"), counted(4, "task")
    ('1 task', '4 tasks')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(value: float, form: str) -> str:
    return format(value, form) if isfinite(value) else "-"


def _short(reason: str, name: str) -> str:
    """Why an estimator is not valid, without its name and the way out."""
    kind = name.split(",", maxsplit=1)[0]
    text = reason.split("; ", maxsplit=1)[0].split(": its gradient would", maxsplit=1)[0]
    return text.removeprefix("hypergradient ").removeprefix(kind).lstrip(": ").replace(f"hypergradient {kind}", "it")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
