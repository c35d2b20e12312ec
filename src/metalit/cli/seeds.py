"""``metalit fit --seeds N``: a configuration with several seeds, and the mean of their test scores."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import Namespace
from scipy import stats

from metalit.callbacks.screen import show, table
from metalit.errors import InputError
from metalit.notices import say

_SEEDS = ("seed", "split_seed")
_LABELS = ("row", "predictor", "inner_steps")
_COUNTS = ("tasks", "diverged", "draws", "inner_steps")  # columns of a test's table that are no scores
Run = Callable[[Sequence[str], int | None], Path | None]


def set_seeds(config: Namespace, seed: int) -> None:
    """Put a number in place of every seed: that of the initial weights, of all draws, and of the splits."""
    config.seed_everything = seed
    _set(config.get("data"), seed)


def _set(node: Any, seed: int) -> None:
    for key, value in list(vars(node).items()) if isinstance(node, Namespace) else []:
        if key in _SEEDS:
            node[key] = seed
        else:
            _set(value, seed)


def taken_out(args: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number after ``--seeds``, if it is given, and the other arguments.

    Raises:
        InputError: it is no number from 2 to 9999, or stands beside what belongs to a single run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds")
    parser.add_argument("--ckpt_path")
    given, _ = parser.parse_known_args(list(args))
    if given.seeds is None:
        return None, list(args)
    if not (re.fullmatch("[0-9]{1,4}", given.seeds) and int(given.seeds) >= 2):
        raise InputError(f"seeds={given.seeds!r} must be a whole number from 2 to 9999: the seeds are 0, 1, …")
    if args[0] != "fit" or given.ckpt_path is not None:
        raise InputError("seeds: several seeds are trained from their start by fit; leave --ckpt_path out, or --seeds")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds")
    return int(given.seeds), parser.parse_known_args(list(args))[1]


def fit_seeds(args: Sequence[str], seeds: int, run: Run) -> list[pd.DataFrame]:
    """Train and test with the seeds 0, 1, …, one after the other; prints and writes the mean of each test score.

    Each is the run that ``fit`` would make alone, in a folder of its own; the table is ``seeds.csv`` beside them.

    Returns:
        The table of each seed's test.

    Raises:
        InputError: what a run raises; one that leaves no checkpoint to test.
    """
    tables, folders = [], []
    for seed in range(seeds):
        say(f"seed {seed} of {seeds}")
        folder = run(args, seed)
        checkpoint = next(filter(Path.is_file, _checkpoints(folder)), None) if folder else None
        if folder is None or checkpoint is None:
            raise InputError("seeds: a run has left no checkpoint to test; leave fast_dev_run and the like out")
        run(["test", f"--ckpt_path={checkpoint}"], None)
        tables.append(pd.read_csv(folder / "test.csv"))
        folders.append(folder)
    scores = summary(tables)
    file = folders[0].parent / "seeds.csv"
    scores.to_csv(file, index=False)
    labels = [name for name in scores.columns if name in (*_LABELS, "score")]
    rows = [[*_cells(row, labels), f"{row['mean']:.4g} ± {row['ci95']:.2g}"] for row in scores.to_dict("records")]
    headings = [*(name.replace("_", " ") for name in labels), f"mean of {seeds} seeds ± 95 % interval"]
    show([table(headings, rows), f"seeds: {file}"])
    return tables


def summary(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over seeds of each score in each row of their tables, with half the width of its 95 % interval.

    mean ± t · s / √n, s the standard deviation over n seeds and t the 97.5 % quantile of Student's distribution with
    n − 1 degrees of freedom.
    """
    long = scores_of(tables)
    labels = [name for name in long.columns if name in _LABELS]
    groups = long.groupby([*labels, "score"], sort=False, dropna=False)["value"]
    found = groups.agg(["mean", "std", "count"]).reset_index()
    quantile = stats.t.ppf(0.975, found["count"] - 1)
    found["ci95"] = quantile * found["std"] / found["count"] ** 0.5
    found = found.astype({"inner_steps": "Int64"} if "inner_steps" in labels else {})
    return found.rename(columns={"count": "seeds"})[[*labels, "score", "mean", "ci95", "std", "seeds"]]


def scores_of(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Each score of each row of the tables, one for each seed: the row's labels, ``seed``, ``score`` and ``value``."""
    labels = [name for name in tables[0].columns if name in _LABELS]
    numbers = tables[0].select_dtypes("number").columns
    scores = [name for name in numbers if name not in (*labels, *_COUNTS) and not name.endswith("_ci95")]
    each = pd.concat([frame.assign(seed=seed) for seed, frame in enumerate(tables)])
    return each.melt([*labels, "seed"], scores, "score", "value").dropna(subset="value")


def _checkpoints(folder: Path) -> list[Path]:
    return [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]


def _cells(row: dict[str, Any], labels: Sequence[str]) -> list[str]:
    return [
        "" if pd.isna(row[name]) else f"{row[name]:g}" if isinstance(row[name], float) else str(row[name])
        for name in labels
    ]
