"""The scores of a learner beside baselines, as a table and a file, and what a bilevel learner found."""

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table
from torch import Tensor

from metalit.callbacks.drawing import Sketching
from metalit.callbacks.screen import show, table
from metalit.callbacks.tensorboard import tensorboards, write_table
from metalit.data.base import Split
from metalit.evaluation.scores import Scores, means
from metalit.modules.bilevel import BilevelLearner
from metalit.runs import run_folder
from metalit.training.ranks import items_of_ranks
from metalit.tree import leaves


class ScoreTable(Callback):
    """Prints the scores after ``validate`` and ``test``, and writes ``val.csv`` or ``test.csv``.

    For a bilevel learner it does so at the end of a fit too, and writes the problem's results to ``results/``, the file
    ``features`` with the names of the input columns; each validation sends histograms of the outer variable to
    TensorBoard.

    Attributes:
        ends_fit: let ``validate`` do what the end of a fit does, for one that was killed before it had.
    """

    def __init__(self) -> None:
        self.ends_fit = False
        self._told: list[str | Table] = []
        self._sketching = Sketching("histograms of the outer variable")

    def on_validation_end(self, trainer: Trainer, learner: LightningModule) -> None:
        """Keep what ``validate`` found; draw the outer variable in the validations of a fit."""
        if trainer.state.fn == "validate":
            when = f" after {learner.outer_step} outer steps" if self.ends_fit else ""
            self._told = _report(trainer, learner, "val", when)
            if self.ends_fit:
                self._told += _results(trainer, learner)
        elif isinstance(learner, BilevelLearner) and not trainer.sanity_checking:
            with self._sketching():
                for logger in tensorboards(trainer):
                    for name, value in leaves(learner.constants()):
                        logger.experiment.add_histogram(f"outer/{name}", value, learner.outer_step)

    def on_test_end(self, trainer: Trainer, learner: LightningModule) -> None:
        """Keep what ``test`` found."""
        self._told = _report(trainer, learner, "test")

    def on_train_end(self, trainer: Trainer, learner: LightningModule) -> None:
        """Judge the outer variable as training left it, and write what it is."""
        loader = trainer.val_dataloaders
        if not (isinstance(learner, BilevelLearner) and loader):
            return
        learner.stepper.check_finite()
        most = trainer.num_val_batches[0]
        batches = islice(loader, None if most == math.inf else most)
        with learner.evaluating(), torch.no_grad():
            tables = [table for tasks in batches for table in learner.judge(tasks, "val", True)]
            learner.scores = means(items_of_ranks(trainer, tables))
        self._told = _report(trainer, learner, "val", f" after {learner.outer_step} outer steps")
        self._told += _results(trainer, learner)

    def teardown(self, trainer: Trainer, learner: LightningModule, stage: str) -> None:
        """Print all that, below the progress bar, which is drawn until now."""
        show(self._told)
        self._told = []


def _results(trainer: Trainer, learner: BilevelLearner) -> list[str]:
    """Write the files of what was found, and return where."""
    with learner.evaluating(), torch.no_grad():
        results = learner.results(next(iter(trainer.val_dataloaders)))
    folder = run_folder(trainer) if trainer.is_global_zero else None
    return _write(folder / "results", results, getattr(trainer.datamodule, "columns", None)) if folder else []


def _report(trainer: Trainer, learner: LightningModule, split: Split, when: str = "") -> list[str | Table]:
    """Write the file of the scores, and return what to print of them."""
    scores: Scores = getattr(learner, "scores", {})
    if not (scores and trainer.is_global_zero):
        return []
    headings, rows = _cells(scores)
    if folder := run_folder(trainer):
        pd.DataFrame.from_dict(scores, orient="index").to_csv(folder / f"{split}.csv", index_label="row")
    for logger in tensorboards(trainer):
        write_table(logger, f"scores/{split}", headings, rows, learner.outer_step)
    return [f"scores on {split}{when}", table(headings, rows)]


def _cells(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the table."""
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    shown = {row: [f"{found[name]:.4g}" if name in found else "" for name in columns] for row, found in scores.items()}
    return ["", *columns], [[row, *cells] for row, cells in shown.items()]


def _write(folder: Path, results: Mapping[str, Mapping[str, Tensor]], names: list[str] | None) -> list[str]:
    """Write the files of the results, and return a line that says where, for each."""
    lines = []
    for file, columns in results.items():
        folder.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame()
        for name, value in columns.items():
            numbers = value.cpu().double() if value.is_floating_point() else value.cpu()
            for number, column in enumerate(numbers.reshape(len(numbers), -1).unbind(1), 1):
                frame[name if value.dim() == 1 else f"{name}{number}"] = column.numpy()
        if names is not None and file == "features":
            frame.index = pd.Index(names)
        frame.to_csv(folder / f"{file}.csv", index_label="row")
        lines.append(f"{file + ':':<16} {folder / f'{file}.csv'}")
    return lines
