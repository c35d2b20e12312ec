"""Train and test configs with several seeds each, and print their test scores: mean ± deviation, and differences.

    python scripts/compare_seeds.py configs/sgd_digits.yaml configs/sam_digits.yaml --seeds 5
    python scripts/compare_seeds.py configs/bilevel_ridge.yaml

Each config is trained by ``metalit fit --seeds``: seed s sets the initial weights, all draws and the splits, alike for
all configs. Seed by seed, each row of a config is compared with the same row of the first one, and each baseline of a
config with its learner, after its last number of inner steps. Whatever else is given goes on to ``metalit fit``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metalit.cli.command_line import run
from metalit.cli.seeds import fit_seeds, scores_of
from metalit.errors import InputError

LEARNERS = ("learner", "learned")


def by_row(tables: Sequence[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The scores of each row of a test's table: a frame of a column for each score and a line for each seed."""
    scores = scores_of(tables).astype({"inner_steps": "Int64"} if "inner_steps" in tables[0] else {})
    labels = scores.drop(columns=["seed", "score", "value"]).to_dict("records")
    names = [", ".join(_words(name, value) for name, value in row.items() if pd.notna(value)) for row in labels]
    found = scores.assign(name=names).pivot(index=["name", "seed"], columns="score", values="value")
    found = found[list(dict.fromkeys(scores["score"]))]
    return {name: found.loc[name].dropna(axis="columns") for name in dict.fromkeys(names)}


def _words(name: str, value: object) -> str:
    return f"{value} inner step{'' if value == 1 else 's'}" if name == "inner_steps" else str(value)


def differences(found: dict[str, dict[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """Of each row that there is something to compare with, by what is compared: the differences for each seed."""
    first, rows_of_first = next(iter(found.items()))
    compared = {}
    for config, rows in found.items():
        learner = [name for name in rows if name.startswith(LEARNERS)][-1]
        for name, scores in rows.items():
            if config != first and name in rows_of_first:
                compared[f"{config}, {name} − {first}, {name}"] = scores - rows_of_first[name]
            elif not name.startswith(LEARNERS):
                compared[f"{config}, {name} − {learner}"] = scores - rows[learner]
    return compared


def summary(values: pd.Series) -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():.4f} ± {values.std():.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0; at least 2")
    given, options = parser.parse_known_args()
    if given.seeds < 2:
        parser.error("--seeds must be at least 2")
    found = {}
    for config in given.configs:
        try:
            found[config.stem] = by_row(fit_seeds(["fit", f"--config={config}", *options], given.seeds, run))
        except InputError as error:
            sys.exit(f"{config}: {error}")
    parts = [{f"{config}, {name}": scores for config, rows in found.items() for name, scores in rows.items()}]
    parts.append(differences(found))
    columns = list(dict.fromkeys(name for part in parts for scores in part.values() for name in scores.columns))
    table = Table(title=f"test scores over {given.seeds} seeds, mean ± standard deviation", title_justify="left")
    for heading in ("", *columns):
        table.add_column(Text(heading))
    for part in parts:
        table.add_section()
        for label, scores in part.items():
            cells = [summary(scores[name]) if name in scores and scores[name].notna().all() else "" for name in columns]
            table.add_row(Text(label), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
