"""How long it takes until metalit is there, and which packages that time goes to."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.harness import Contender, DifferentWorkError, Race, markdown, rounds, section

BARE, LIGHTNING = "`python -c pass`", "`import lightning.pytorch`"
COMMANDS = {
    BARE: ["-c", "pass"],
    "`import metalit`": ["-c", "import metalit"],
    "`metalit --help`": ["-m", "metalit", "--help"],
    "`import torch`": ["-c", "import torch"],
    LIGHTNING: ["-c", "import lightning.pytorch"],
    "`import metalit.modules`": ["-c", "import metalit.modules"],
    "`metalit fit --help`": ["-m", "metalit", "fit", "--help"],
}
LIGHT = ("`import metalit`", "`metalit --help`")  # these load no torch
HEAVY = ("`import metalit.modules`", "`metalit fit --help`")
SHOWN = 12
LIBRARY = "the standard library"


class Import(NamedTuple):
    """A line of ``python -X importtime``: what a module took itself and with all that it imported, who imported it."""

    module: str
    own: int  # microseconds
    whole: int
    owner: str

    @property
    def package(self) -> str:
        """The package at the top."""
        top = self.module.partition(".")[0]
        return LIBRARY if top in sys.stdlib_module_names else top


def imports(options: Sequence[str]) -> list[Import]:
    """Everything that a command of python imports, in order."""
    done = subprocess.run([sys.executable, "-X", "importtime", *options], capture_output=True, text=True, check=True)
    rows = []
    for line in done.stderr.splitlines():
        cells = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and cells[0].strip().isdigit():
            name = cells[2].removeprefix(" ")
            rows.append((len(name) - len(name.lstrip()), name.strip(), int(cells[0]), int(cells[1])))
    found, above = [], []
    # an importer stands after what it imported, two spaces to the left
    for depth, name, own, whole in reversed(rows):
        while above and above[-1][0] >= depth:
            above.pop()
        found.append(Import(name, own, whole, above[-1][1] if above else "the command"))
        above.append((depth, name))
    return found[::-1]


def shares(found: Sequence[Import]) -> str:
    """A table of packages: what their own modules took, and who imported each first."""
    own: dict[str, int] = defaultdict(int)
    owner: dict[str, str] = {}
    count: dict[str, int] = defaultdict(int)
    for each in found:
        own[each.package] += each.own
        count[each.package] += 1
        outside = each.owner.partition(".")[0] != each.module.partition(".")[0]
        if outside and each.package != LIBRARY:
            owner.setdefault(each.package, each.owner)
    whole = sum(own.values())
    heaviest = sorted(own, key=lambda package: -own[package])[:SHOWN]
    rows = [
        [name, f"{100 * own[name] / whole:.1f} %", f"{own[name] / 1e3:.0f}", str(count[name]), owner.get(name, "")]
        for name in heaviest
    ]
    return markdown(["package", "share", "ms", "modules", "first imported by"], rows)


def run(quick: bool) -> str:
    """Measure, and check that what needs no torch loads none."""
    for name in LIGHT:
        loaded = {each.package for each in imports(COMMANDS[name])}
        if loaded & {"torch", "lightning", "numpy"}:
            raise DifferentWorkError(f"{name} loads {sorted(loaded)}, and needs none of torch, lightning and numpy")
    race = Race([Contender(name, _starts(options)) for name, options in COMMANDS.items()], seconds=0).run(rounds(quick))
    heads = {"÷ bare python": BARE, "÷ lightning": LIGHTNING}
    parts = [race.table(list(COMMANDS), heads, unit="start")]
    for name in HEAVY:
        parts += [f"### {name}: where the time goes", shares(imports(COMMANDS[name]))]
    about = (
        "Commands in fresh processes, with the files in the system's cache. The shares are those of "
        "`python -X importtime`, of the modules of each package themselves; that `import metalit` and `metalit --help` "
        "load neither torch nor lightning nor numpy is checked."
    )
    return section("startup: until it is there", about, *parts)


def _starts(options: Sequence[str]) -> Callable[[int], None]:
    return partial(_start, options)


def _start(options: Sequence[str], count: int) -> None:
    for _ in range(count):
        subprocess.run([sys.executable, *options], stdout=subprocess.DEVNULL, check=True)
