"""What the learner predicts for the user's own points, as a CSV file and a picture."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from metalit.callbacks.class_predictions import draw_classes, replaces, target_of, write_classes
from metalit.callbacks.drawing import Sketching, labelled, literal, panels, pixels, save_picture
from metalit.data.classes.asked import AskedClasses
from metalit.data.module import TaskDataModule
from metalit.data.table import Asked, Columns
from metalit.errors import InputError
from metalit.modules.adapted_classes import NamedClasses
from metalit.notices import show
from metalit.private_torch import pytree_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = 12  # tasks in the picture at most
_BOUNDS = ("lower", "upper")
_Band = tuple[Tensor, Tensor]  # lower and upper bound


class _Answer(NamedTuple):
    """What a learner predicts for a task: at its rows, and at the grid of the picture."""

    name: str
    values: Tensor
    curve: Tensor
    band: _Band | None = None
    curve_band: _Band | None = None


class PredictionWriter(Callback):
    """Writes ``NAME_predicted.csv`` and ``NAME_predicted.png`` beside the user's ``NAME.csv``.

    The CSV is the user's table with a column ``<output>_predicted`` for each output: the adapted network's answer in
    every row, asked or given. Where it has a standard deviation, ``<output>_lower`` and ``<output>_upper`` follow, the
    bounds of the 95 % interval of a new point. The picture shows the first ``_PANELS`` tasks.

    Of classes, see :mod:`~metalit.callbacks.class_predictions`: for a folder, ``FOLDER_predicted.csv`` beside it has a
    row for each image that was asked, with its class and the probability of each.

    Files that an earlier prediction wrote are replaced, which is said.

    Raises:
        InputError: a file of another content has the name; a prediction that is not finite; nothing is written then.
    """

    def __init__(self) -> None:
        self._answers: list[_Answer] = []
        self._named: NamedClasses | None = None
        self._replaces = False
        self._sketching = Sketching("the picture of the predictions")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh, and check that no file of the user's would be overwritten."""
        self._answers, self._named = [], None
        data = trainer.datamodule
        if not (trainer.is_global_zero and isinstance(data, TaskDataModule)):
            return
        if isinstance(data.asked, AskedClasses):
            self._replaces = replaces(data.asked)
        elif data.predict_file:
            self._replaces = _replaces(_target(data), data)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: NamedClasses | tuple[Any, ...], *_: Any
    ) -> None:
        """Collect."""
        if isinstance(outputs, NamedClasses):
            self._named = outputs
            return
        name, *found = outputs
        self._answers.append(_Answer(name, *pytree_map(lambda part: part.double().cpu(), found)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files and say where they are."""
        data = trainer.datamodule
        if not (trainer.is_global_zero and isinstance(data, TaskDataModule)):
            return
        asked = data.asked
        if isinstance(asked, AskedClasses):
            self._write_classes(asked, pl_module)
            return
        self._check_finite()
        target, columns = _target(data), data.tasks.columns
        frame = asked.frame.copy()
        written = {"predicted": _in_rows(asked, {answer.name: answer.values for answer in self._answers})}
        if self._answers and self._answers[0].band is not None:
            for end, kind in enumerate(_BOUNDS):
                written[kind] = _in_rows(
                    asked, {answer.name: answer.band[end] for answer in self._answers if answer.band}
                )
        for number, output in enumerate(columns.y):
            for kind, values in written.items():
                frame[f"{output}_{kind}"] = values[:, number]
        # as the user's own: numbers are read in the locale that wrote them
        frame.to_csv(target, index=False, sep=frame.attrs["separator"], decimal=frame.attrs["decimal"])
        self._say_where(pl_module, target)
        with self._sketching():
            save_picture(pixels(draw_predictions(asked, columns, self._answers)), target.with_suffix(".png"))
            show(f"picture:     {target.with_suffix('.png')}{_part(self._answers)}")

    def _write_classes(self, asked: AskedClasses, learner: LightningModule) -> None:
        if self._named is None:  # predict was cut short
            return
        target = target_of(asked)
        lines = write_classes(asked, self._named)
        self._say_where(learner, target)
        with self._sketching():
            figure = draw_classes(asked, self._named)
            if figure is not None:
                save_picture(pixels(figure), target.with_suffix(".png"))
                show(f"picture:     {target.with_suffix('.png')}")
        for line in lines:
            show(line)

    def _say_where(self, learner: LightningModule, target: Path) -> None:
        show(f"inner steps: {learner.prediction_steps}, {learner.why_so_many_steps}")
        show(f"predictions: {target}{' (replaced)' if self._replaces else ''}")

    def _check_finite(self) -> None:
        diverged = [
            answer.name
            for answer in self._answers
            if not all(bool(part.isfinite().all()) for part in (answer.values, *(answer.band or ())))
        ]
        if diverged:
            raise InputError(
                f"predict: the predictions for {len(diverged)} of {len(self._answers)} task(s), first {diverged[0]!r}, "
                "are not finite: adapting diverges, and nothing is written. Take fewer inner steps (model.eval_steps), "
                "and see that x and y are in the units of the training data"
            )


def _in_rows(asked: Asked, values: Mapping[str, Tensor]) -> np.ndarray:
    """Values by task as ``[rows of the file, outputs]``."""
    found = np.full(asked.y.shape, np.nan)
    for name, each in values.items():
        found[asked.rows[name]] = each.numpy()
    return found


def _part(answers: Sequence[tuple[Any, ...]]) -> str:
    return f" (the first {_PANELS} of {len(answers)} tasks)" if len(answers) > _PANELS else ""


def _target(data: TaskDataModule) -> Path:
    source = Path(str(data.predict_file))
    return source.with_name(f"{source.stem}_predicted.csv")


def _replaces(target: Path, data: TaskDataModule) -> bool:
    """Whether an earlier prediction is replaced; it is known by its first line, which ends with predicted columns."""
    picture = target.with_suffix(".png")
    if not target.exists() and not picture.exists():
        return False
    (last,) = data.tasks.columns.y[-1:]
    ends = tuple(f"{last}_{kind}{quote}" for kind in ("predicted", _BOUNDS[-1]) for quote in ("", '"'))
    with suppress(OSError, UnicodeDecodeError), target.open(encoding="utf-8") as file:
        if file.readline().rstrip().endswith(ends):
            return True
    there = target if target.exists() else picture
    raise InputError(
        f"data.predict_file: {there} is no earlier prediction of {', '.join(data.tasks.columns.y)}, and is not "
        "overwritten; move it, or give the file of points another name"
    )


def draw_predictions(asked: Asked, columns: Columns, answers: Sequence[tuple[Any, ...]]) -> "Figure":
    """Draw the fits, one panel for each task: over the input if there is one, else over the line of the file."""
    figure, places = panels(min(len(answers), _PANELS))
    single = asked.x.shape[1] == 1
    for axes, answer in zip(places, answers, strict=False):
        name, values, curve, band, curve_band = _Answer(*answer)
        rows, shots = asked.rows[name], asked.shots[name]
        place = asked.x[rows, 0] if single else asked.frame.index[rows].to_numpy()
        if single:
            span = np.linspace(place.min(), place.max(), len(curve))
            axes.plot(span, curve[:, 0], color="tab:blue", linewidth=1.5, label="adapted")
            if curve_band is not None:
                low, high = (bound[:, 0] for bound in curve_band)
                axes.fill_between(span, low, high, color="tab:blue", alpha=0.2, linewidth=0, label="95 % interval")
        elif band is not None:
            low, high = (bound[shots:, 0] for bound in band)
            axes.vlines(place[shots:], low, high, color="tab:blue", alpha=0.4, linewidth=3, label="95 % interval")
        axes.plot(place[shots:], values[shots:, 0], "o", color="tab:blue", markersize=5, label="predicted")
        axes.plot(place[:shots], asked.y[rows[:shots], 0], "^", color="crimson", markersize=6, label="support")
        axes.set_title(literal(name, 24), fontsize=10, pad=3)
        if not single:
            axes.locator_params(axis="x", integer=True)
    figure.suptitle(_part(answers).strip(" ()"), fontsize=10)
    x = literal(columns.x[0]) if single else "line of the file"
    labelled(figure, places, x, literal(columns.y[0]), "right")
    return figure
