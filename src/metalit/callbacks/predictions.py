"""What the learner predicts for the user's own points, as a CSV file and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from metalit.data.module import TaskDataModule
from metalit.data.table import Asked, Columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 12  # tasks in the picture at most
_Answer = tuple[str, Tensor, Tensor]  # name, predictions at the rows of the task, at the grid


class PredictionWriter(Callback):
    """Writes ``NAME_predicted.csv`` and ``NAME_predicted.png`` beside the user's ``NAME.csv``.

    The CSV is the user's table with a column ``<output>_predicted`` for each output: the adapted network's answer in
    every row, asked or given.
    """

    def __init__(self) -> None:
        self._answers: list[_Answer] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self._answers = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: _Answer, *_: Any) -> None:
        """Collect."""
        name, *values = outputs
        self._answers.append((name, *(value.double().cpu() for value in values)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files and say where they are."""
        data = trainer.datamodule
        if not (trainer.is_global_zero and isinstance(data, TaskDataModule)):
            return
        source = Path(str(data.predict_file))
        target = source.with_name(f"{source.stem}_predicted.csv")
        asked, columns = data.asked, data.tasks.columns
        answers = np.full(asked.y.shape, np.nan)
        for name, values, _ in self._answers:
            answers[asked.rows[name]] = values.numpy()
        frame = asked.frame.copy()
        for output, values in zip(columns.y, answers.T, strict=True):
            frame[f"{output}_predicted"] = values
        frame.to_csv(target, index=False)
        draw_predictions(asked, columns, self._answers).savefig(target.with_suffix(".png"), dpi=110)
        print(f"predictions: {target}\npicture:     {target.with_suffix('.png')}")


def draw_predictions(asked: Asked, columns: Columns, answers: Sequence[_Answer]) -> "Figure":
    """Draw the fits, one panel for each task: over the input if there is one, else over the line of the file."""
    from matplotlib.figure import Figure

    shown = answers[:_PANELS]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down), layout="constrained")
    for panel, (name, values, curve) in enumerate(shown):
        axes = figure.add_subplot(down, across, panel + 1)
        rows, shots = asked.rows[name], asked.shots[name]
        single = len(columns.x) == 1
        place = asked.x[rows, 0] if single else np.array(rows) + 2
        if single:
            span = np.linspace(place.min(), place.max(), len(curve))
            axes.plot(span, curve[:, 0], color="tab:blue", linewidth=1.5, label="adapted")
        axes.plot(place[shots:], values[shots:, 0], "o", color="tab:blue", label="predicted")
        axes.plot(place[:shots], asked.y[rows[:shots], 0], "^", color="crimson", markersize=8, label="support")
        axes.set_title(name)
        axes.set_xlabel(columns.x[0] if single else "line of the file")
        axes.set_ylabel(columns.y[0])
    figure.axes[0].legend(fontsize="small")
    return figure
