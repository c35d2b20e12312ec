"""Train and test a config of curves on several tables, and print its squared errors beside those of every bar.

    python scripts/compare_curves.py data/gapminder.csv:country:year:lifeExp Oxboys.csv:Subject:age:height

A table is a file, the column that tells its curves apart, and those of x and y. R's public data sets, which Rdatasets
has as CSV files, are such tables: of the package nlme Oxboys.csv:Subject:age:height, Spruce.csv:Tree:days:logSize and
Soybean.csv:Plot:Time:weight, of lme4 sleepstudy.csv:Subject:Days:Reaction, of datasets
ChickWeight.csv:Chick:Time:weight. Whatever else is given goes on to ``metalit fit`` and ``metalit test``.
"""

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text


def tested(config: Path, given: str, options: Sequence[str]) -> tuple[list[dict[str, str]], float]:
    """Train and test on one table; returns the rows of ``test.csv``, and how many seconds training took."""
    file, task, x, y = given.rsplit(":", 3)
    columns = [f"--data.tasks.{key}={value}" for key, value in (("file", file), ("task", task))]
    columns += [f"--data.tasks.{key}={[value]}" for key, value in (("x", x), ("y", y))]
    named = ["--config", str(config), "--experiment", f"{config.stem}_{Path(file).stem}", *columns, *options]
    began = time.monotonic()
    _run(["fit", *named])
    took = time.monotonic() - began
    folder = next(line for line in _run(["test", *named]) if line.startswith("testing "))
    with (Path(folder.removeprefix("testing ")).parent.parent / "test.csv").open() as handle:
        return list(csv.DictReader(handle)), took


def _run(arguments: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "metalit", *arguments]
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        sys.exit(f"{ran.stdout}{' '.join(command)} ended with status {ran.returncode}")
    return ran.stdout.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="FILE:TASK:X:Y")
    parser.add_argument("--with", dest="config", type=Path, default=Path("configs/curves.yaml"), help="which config")
    given, options = parser.parse_known_args()
    table = Table(title="squared errors of normalised y, mean ± 95 % interval over test tasks", title_justify="left")
    for name in given.tables:
        rows, took = tested(given.config, name, options)
        errors = {
            row["predictor"]: f"{float(row['squared_error']):.4f} ± {float(row['squared_error_ci95']):.4f}"
            for row in rows
        }
        if not table.columns:
            for heading in ("", "test tasks", *errors, "in 95 % interval", "seconds of training"):
                table.add_column(Text(heading))
        cells = [Path(name.rsplit(":", 3)[0]).stem, rows[0]["tasks"], *errors.values()]
        table.add_row(*map(Text, [*cells, f"{float(rows[0]['inside_95']):.3f}", f"{took:.0f}"]))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
