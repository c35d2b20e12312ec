"""Train and test configs with several seeds each, and print their test scores: mean ± deviation, and differences.

    python scripts/compare_seeds.py configs/sgd_digits.yaml configs/sam_digits.yaml --seeds 5
    python scripts/compare_seeds.py configs/bilevel_ridge.yaml

Seed s sets the initial weights, the order of the rows and the split into train, val and test, alike for all configs, so
that they, and the baselines that a test prints, are compared with the first one pair by pair, by the scores that all
have. It takes the configs of bilevel and supervised learners. Whatever else is given goes on to ``metalit fit`` and
``metalit test``.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

SEEDS = {
    "BatchDataModule": ["seed", "split_seed"],
    "SplitsDataModule": ["seed", "split_seed"],
    "MatrixDataModule": ["seed"],
}
Scores = dict[str, dict[str, float]]  # by row of the table of a test, then by name


def scores(config: Path, seed: int, options: Sequence[str]) -> Scores:
    """Train and test one config with one seed; returns its ``test.csv``."""
    experiment = f"{config.stem}_seed{seed}"
    data = yaml.safe_load(config.read_text()).get("data", {}).get("class_path", "").rsplit(".", 1)[-1]
    seeds = [f"--seed_everything={seed}", *(f"--data.{name}={seed}" for name in SEEDS.get(data, ()))]
    for subcommand in ("fit", "test"):
        command = [sys.executable, "-m", "metalit", subcommand, "--config", str(config), "--experiment", experiment]
        printed = _run([*command, *seeds, *options], f"{config.stem}, seed {seed}")
    tested = next(line for line in printed if line.startswith("testing "))
    version = Path(tested.removeprefix("testing ")).parent.parent
    with (version / "test.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return {row.pop("row"): {name: float(value) for name, value in row.items() if value} for row in rows}


def _run(command: Sequence[str], label: str) -> list[str]:
    """Run a command, and return its lines; how far it is, it tells on stderr as it goes."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        for line in running.stdout:
            lines.append(line.rstrip("\n"))
            print(f"{label}: {lines[-1]}", file=sys.stderr, flush=True)
    if running.returncode:
        sys.exit(f"{label}: {' '.join(command)} ended with status {running.returncode}")
    return lines


def summary(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0; at least 2")
    given, options = parser.parse_known_args()
    if given.seeds < 2:
        parser.error("--seeds must be at least 2")
    found: dict[str, list[dict[str, float]]] = {}
    for config in given.configs:
        runs = [scores(config, seed, options) for seed in range(given.seeds)]
        for row in runs[0]:
            found[f"{config.stem}, {row}"] = [run[row] for run in runs]
    (first, best), *others = found.items()
    names = [name for name in best[0] if all(name in rows[0] for rows in found.values())]
    table = Table(title=f"test scores over {given.seeds} seeds, mean ± standard deviation", title_justify="left")
    for heading in ("", *names):
        table.add_column(Text(heading))
    for label, rows in found.items():
        table.add_row(Text(label), *(summary([row[name] for row in rows]) for name in names))
    table.add_section()
    for label, rows in others:
        pairs = list(zip(rows, best, strict=True))
        table.add_row(Text(f"{label} − {first}"), *(summary([a[name] - b[name] for a, b in pairs]) for name in names))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
