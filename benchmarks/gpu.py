"""What a GPU makes of metalit, measured stage by stage, and written after each one.

    python -m benchmarks gpu                  to benchmarks/gpu.json and benchmarks/gpu.md
    python -m benchmarks gpu --device cpu     tiny sizes on the CPU: does it run?

Each stage is a process of its own that is ended at its limit, so that one that hangs or breaks leaves the others'
figures. What is compiled is compiled before, by all stages at the same time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.gpu_stages import STAGES
from benchmarks.harness import say

OUTPUT = Path(__file__).with_name("gpu.json")
WARM_UP = 0.4  # the share of the time that compiling may take
PATIENCE = 4.0  # on a CPU, whose compiler is slow


class Stage:
    """One measurement in a process of its own, that writes what it found to a file."""

    def __init__(self, name: str, device: str, quick: bool, folder: Path, warm: bool) -> None:
        self.name = name
        self.file = folder / f"{name}.json"
        self.log = folder / f"{name}{'.warm' * warm}.log"
        command = [sys.executable, "-m", "benchmarks.gpu_stages", name, str(self.file), "--device", device]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *["--quick"] * quick, *["--warm"] * warm], stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float) -> dict[str, Any]:
        """What it found, at the latest after so many seconds."""
        try:
            status = self.process.wait(max(1.0, seconds))
            why = f"it ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            why = "its time was over"
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        if why:
            found |= {"failed": why, "log": self.log.read_text(errors="replace").splitlines()[-15:]}
        return found


def measure(device: str, quick: bool, seconds: float, names: Sequence[str], output: Path, tests: Path | None) -> bool:
    """Run the stages one after the other; returns whether all have ended well."""
    end = monotonic() + seconds
    whole: dict[str, Any] = {"device": device, "quick": quick, "tests": read(tests), "stages": {}}
    write(whole, output)
    with tempfile.TemporaryDirectory() as folder:
        begun = monotonic()
        warming = [Stage(name, device, quick, Path(folder), warm=True) for name in names if STAGES[name].compiles]
        until = begun + WARM_UP * seconds
        whole["compiled before"] = {stage.name: stage.wait(until - monotonic()).get("failed", "") for stage in warming}
        whole["compiled before, seconds"] = round(monotonic() - begun, 1)
        patience = PATIENCE if quick else 1.0
        for name in names:
            (Path(folder) / f"{name}.json").unlink(missing_ok=True)
            left = end - monotonic()
            say(f"== {name} ({left:.0f} s left)")
            if left < 5:
                whole["stages"][name] = {"failed": "no time was left"}
            else:
                begun = monotonic()
                whole["stages"][name] = Stage(name, device, quick, Path(folder), warm=False).wait(
                    min(left, patience * STAGES[name].seconds)
                )
                whole["stages"][name]["seconds"] = round(monotonic() - begun, 1)
            write(whole, output)
    failed = {name: found["failed"] for name, found in whole["stages"].items() if "failed" in found}
    for name, why in failed.items():
        say(f"{name}: {why}")
        say("\n".join(whole["stages"][name].get("log", [])))
    return not failed


def read(tests: Path | None) -> list[dict[str, Any]]:
    """What tests/gpu found, a line each."""
    return [json.loads(line) for line in tests.read_text().splitlines()] if tests and tests.exists() else []


def write(whole: dict[str, Any], output: Path) -> None:
    """Write the figures, and the page of them beside."""
    output.write_text(json.dumps(whole, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(whole))


def main(arguments: Sequence[str]) -> int:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"some of: {' '.join(STAGES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=260.0, help="when all of it ends")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the figures go; the page goes beside them")
    parser.add_argument("--tests", type=Path, help="what tests/gpu wrote to $METALIT_GPU_RESULTS, to be shown too")
    given = parser.parse_args(arguments)
    unknown = sorted({*given.stages} - {*STAGES})
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here; --device cpu tries it out on the CPU")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX would take most of the memory
    names = given.stages or list(STAGES)
    fine = measure(given.device, given.device == "cpu", given.seconds, names, given.output, given.tests)
    return 0 if fine else 1
