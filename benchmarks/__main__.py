"""Run the benchmarks, each in a process of its own, and write what they measured.

    python -m benchmarks                  all of them, to benchmarks/results.md
    python -m benchmarks meta_step        this one; the others' sections stay, if they are of the same machine
    python -m benchmarks gpu              those of a GPU, to benchmarks/gpu.md; see --help of it

Peers that are not installed are left out; ``pip install jax higher torchopt opacus backpack-for-pytorch`` brings all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks.harness import ONE_THREAD, machine, say

NAMES = (
    "meta_step",
    "family",
    "conv4",
    "profile",
    "per_sample",
    "bilevel",
    "growth",
    "ranks",
    "startup",
    "class_memory",
)
RESULTS = Path(__file__).parent / "results.md"
_HEAD = """# Benchmarks

Written by `python -m benchmarks`. In each round every contender runs for a short burst, one after the other; a ratio is
the median over rounds of the quotient of two times, and says how many times as long the row takes as the column's head.
Every contender is first checked to compute the same values as the others.

"""


def alone(name: str, quick: bool, output: Path) -> None:
    """Run one benchmark in this process and write its section."""
    import torch

    torch.set_num_threads(1)
    output.write_text(import_module(f"benchmarks.{name}").run(quick))


def in_process(name: str, quick: bool) -> str | None:
    """Run one benchmark in a process of its own; returns its section, or none where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "section.md"
        command = [sys.executable, "-m", "benchmarks", name, "--alone", str(file), *(["--quick"] if quick else [])]
        done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=sys.stderr, check=False)
        return None if done.returncode else file.read_text()


def kept(file: Path, head: str) -> dict[str, str]:
    """The sections of earlier results, by name, if those are of the same machine and versions."""
    text = file.read_text() if file.exists() else ""
    if not text.startswith(head):
        return {}
    parts = text.removeprefix(head).split("<!-- ")[1:]
    return {name: body.strip("\n") + "\n" for name, _, body in (part.partition(" -->\n") for part in parts)}


def main() -> int:
    """Choose, run, compose."""
    if sys.argv[1:2] == ["gpu"]:
        return import_module("benchmarks.gpu").main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of: {' '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run? Its figures say little")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = sorted({*given.names} - {*NAMES})
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if given.alone:
        alone(given.names[0], given.quick, given.alone)
        return 0
    head = _HEAD + machine() + "\n\n"
    sections, failed = kept(given.output, head), []
    for name in given.names or NAMES:
        say(f"== {name}")
        found = in_process(name, given.quick)
        if found is None:
            failed.append(name)
            continue
        sections[name] = found
        ordered = [f"<!-- {each} -->\n{sections[each]}" for each in NAMES if each in sections]
        given.output.write_text(head + "\n".join(ordered))
    if failed:
        say(f"failed: {', '.join(failed)}; their errors stand above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
