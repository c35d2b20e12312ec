"""What every benchmark shares: contenders that take turns, a check that they do the same work, tables, the machine."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
ROUNDS = 9
QUICK_ROUNDS = 2
PACKAGES = ("torch", "lightning", "metalit", "jax", "higher", "torchopt", "opacus", "backpack-for-pytorch")


class Contender(NamedTuple):
    """One way of doing the work: ``advance(n)`` takes n steps; n is a multiple of ``unit``."""

    name: str
    advance: Callable[[int], object]
    unit: int = 1


class Missing(NamedTuple):
    """A contender that cannot run here, and why."""

    name: str
    why: str


class DifferentWorkError(Exception):
    """A contender does not compute what the others do, so its time says nothing."""


def not_installed(package: str) -> bool:
    """Whether a peer is missing."""
    return find_spec(package) is None


def one_core() -> None:
    """Keep this process, with every thread it has, to one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def rounds(quick: bool) -> int:
    """How many rounds a benchmark takes."""
    return QUICK_ROUNDS if quick else ROUNDS


def check_same(name: str, found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    """Raise a :class:`DifferentWorkError` where two tensors differ by more than ``rtol`` of the largest entry."""
    if found.shape != expected.shape:
        raise DifferentWorkError(f"{name}: shape {tuple(found.shape)}, and {tuple(expected.shape)} is expected")
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= rtol:
        raise DifferentWorkError(f"{name}: it differs from the reference by {error:.2g} of the largest entry")


class Race:
    """Contenders take turns: in each round each one runs for a short burst, and the first to run changes.

    What disturbs the machine for longer than a round disturbs all alike, so ratios are taken within rounds.

    Args:
        contenders: those that run in :meth:`round`.
        seconds: how long a burst is; it has one unit of steps at least.
    """

    def __init__(self, contenders: Sequence[Contender], seconds: float = 0.25) -> None:
        self.contenders = list(contenders)
        self.milliseconds: dict[str, list[float]] = {}
        self.steps = {}
        for contender in self.contenders:
            _time(contender, contender.unit)  # warm up
            once = min(_time(contender, contender.unit) for _ in range(2)) * contender.unit
            self.steps[contender.name] = contender.unit * max(1, round(seconds / once))

    def round(self, also: Mapping[str, float] | None = None) -> None:
        """Run every contender once; ``also`` holds milliseconds per step that were measured elsewhere."""
        first = len(next(iter(self.milliseconds.values()), [])) % max(1, len(self.contenders))
        for contender in self.contenders[first:] + self.contenders[:first]:
            taken = _time(contender, self.steps[contender.name])
            self.milliseconds.setdefault(contender.name, []).append(1e3 * taken)
        for name, value in (also or {}).items():
            self.milliseconds.setdefault(name, []).append(value)

    def run(self, count: int) -> "Race":
        """Take so many rounds."""
        for _ in range(count):
            self.round()
        return self

    def ratio(self, name: str, reference: str) -> float:
        """The time of ``name`` divided by that of ``reference``: the median over rounds."""
        pairs = zip(self.milliseconds[name], self.milliseconds[reference], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def times(self, name: str) -> list[str]:
        """The last three cells of a row: median, interquartile range, rounds."""
        values = self.milliseconds[name]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return [f"{middle:.3g}", f"{low:.3g} to {high:.3g}", str(len(values))]

    def table(
        self, names: Sequence[str], references: Mapping[str, str], missing: Sequence[Missing] = (), unit: str = "step"
    ) -> str:
        """A row for each name: its time divided by each reference's (by column), then milliseconds.

        A reference that did not run has no column.
        """
        columns = {title: name for title, name in references.items() if name in self.milliseconds}
        rows = [
            [name, *(f"{self.ratio(name, ref):.3g}" for ref in columns.values()), *self.times(name)] for name in names
        ]
        rows += [[name, *[""] * len(columns), why, "", ""] for name, why in missing]
        return markdown(["", *columns, f"ms per {unit}, median", "quartiles", "rounds"], rows)


def _time(contender: Contender, steps: int) -> float:
    start = time.perf_counter()
    contender.advance(steps)
    return (time.perf_counter() - start) / steps


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section(title: str, about: str, *parts: str) -> str:
    """A section of the results: what is compared, then tables and remarks."""
    return "\n\n".join([f"## {title}", about, *(part for part in parts if part)]) + "\n"


def machine() -> str:
    """Where the figures come from."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows = [
        ["CPU", _cpu()],
        ["cores", str(os.cpu_count())],
        ["threads used", "1, unless a table says otherwise"],
        ["memory", f"{memory:.0f} GiB"],
        ["system", f"{platform.system()} {platform.release()}, {platform.machine()}"],
        ["python", platform.python_version()],
        *([package, _version(package)] for package in PACKAGES),
    ]
    return "\n".join(["| machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or "unknown"
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)
