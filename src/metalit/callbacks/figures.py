"""Pictures of the fits: the truth, the support points, and the fit after some inner steps."""

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from metalit.callbacks.drawing import COLOURS, Sketching, labelled, literal, nothing_left, panels, pixels, save_picture
from metalit.callbacks.episodes import draw_episode
from metalit.callbacks.tensorboard import tensorboards
from metalit.data.base import Split, TaskDistribution
from metalit.data.module import TaskDataModule
from metalit.errors import InputError
from metalit.evaluation.judged import Z95
from metalit.modules.meta import MetaLearner
from metalit.problem import Points, Task
from metalit.runs import run_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 20  # drawings in a run; each takes about a third of a second
_DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_BEFORE = {"color": "0.25", "linestyle": ":"}
_BAND = "95 % interval"
_MARKS = ".x+1*v"  # where there are no lines


class FitFigures(Callback):
    """Draws a few fixed tasks at validations, for TensorBoard and as PNG files in ``figures/`` of the run.

    Of tasks of classes of images the first is drawn: what its query images are taken for.

    Args:
        tasks: how many tasks; 0 for no pictures.
        steps: after how many inner steps the fits are drawn; those beyond ``eval_steps`` are left out.

    Raises:
        InputError: a negative number.
    """

    def __init__(self, tasks: int = 4, steps: Sequence[int] = (0, 1, 5, 10)) -> None:
        if tasks < 0 or min(steps, default=0) < 0:
            raise InputError(f"figures: tasks={tasks} and steps={list(steps)} must not be negative")
        self.tasks = tasks
        self.steps = steps
        self._next_step = 0
        self._sketching = Sketching("pictures of the fits")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw validation tasks, at most ``_MOST`` times in a run."""
        if trainer.sanity_checking or (trainer.global_step < self._next_step and trainer.state.fn == "fit"):
            return
        self._next_step = trainer.global_step + max(trainer.max_steps, 0) // _MOST
        self._publish(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw test tasks."""
        self._publish(trainer, pl_module, "test")

    def _publish(self, trainer: Trainer, learner: LightningModule, split: Split) -> None:
        data = trainer.datamodule
        if not (isinstance(learner, MetaLearner) and isinstance(data, TaskDataModule)):
            return
        folder = run_folder(trainer) if self.tasks and trainer.is_global_zero else None
        if folder is None:
            return
        with self._sketching():
            classes = data.tasks.class_names(split)
            with nothing_left():
                picture, kind = self._drawn(learner, data, split), "fits" if classes is None else "episode"
            if picture is None:
                return
            save_picture(picture, folder / "figures" / f"{split}.png")
            for logger in tensorboards(trainer):
                logger.experiment.add_image(f"pictures/{kind}_{split}", picture, learner.outer_step, dataformats="HWC")

    def _drawn(self, learner: MetaLearner, data: TaskDataModule, split: Split) -> np.ndarray | None:
        classes = data.tasks.class_names(split)
        if classes is not None:
            figure = draw_episode(learner, data.pictured(split, 1), classes)
        else:
            count = min(self.tasks, data.tasks.count(split) or self.tasks)
            names = [data.tasks.name(split, index) for index in range(count)]
            figure = draw_fits(learner, data.pictured(split, count), data.tasks, self.steps, names)
        return None if figure is None else pixels(figure)


class _Fits(NamedTuple):
    """What is known of one task, in the user's units; y has one column, the first output."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    predicted: dict[int, Tensor]  # by inner steps, at the inputs of the query
    at_support: dict[int, Tensor]  # the same at those of the support, for curves
    margin: Tensor | None  # half the 95 % interval of the last prediction, at the query
    margin_at_support: Tensor | None
    in_init: bool  # whether without an inner step it is adapted already


def draw_fits(
    learner: MetaLearner,
    tasks: Task,
    source: TaskDistribution,
    steps: Sequence[int],
    names: Sequence[str | None] = (),
) -> "Figure | None":
    """Draw the fits to a batch of tasks, one panel for each, in the user's units.

    With one input column, y is drawn over x; with several, the predicted y over the true one. Of several outputs, the
    first is drawn. The limits hold the truth and the fit before adapting; later fits may leave them.

    Args:
        learner: what is drawn.
        tasks: a batch of tasks.
        source: where they come from; it names the columns.
        steps: after how many inner steps the fits are drawn.
        names: of the tasks, as titles.

    Returns:
        The figure; None for tasks without a curve: classes, and inputs that are no columns, such as images.
    """
    if not (tasks.query.y.is_floating_point() and tasks.query.x.dim() == tasks.query.y.dim() == 3):
        return None
    steps = [step for step in steps if step <= learner.eval_steps]
    # a column of words makes several inputs
    columns, single = source.columns, tasks.query.x.shape[-1] == 1
    x, y = literal(columns.x[0]), literal(columns.y[0])
    at_query = _Predicted.of(learner, tasks, steps)
    # in a call of its own, so that BatchNorm sees the query set alone, as it does where it is judged
    at_support = _Predicted.of(learner, tasks._replace(query=tasks.support), steps) if single else None
    figure, places = panels(len(tasks.support.x))
    for index, axes in enumerate(places):
        fits = _fits(learner, tasks, index, at_query, at_support)
        axes.set_title(literal((names[index] if names else None) or f"task {index + 1}", 24), fontsize=10, pad=3)
        if single:
            _draw_curves(axes, fits, "." if source.noisy else "-")
        else:
            _draw_predicted(axes, fits)
    x, y = (x, y) if single else (f"true {y}", f"predicted {y}")
    labelled(figure, places, x, y, "right")
    return figure


class _Predicted(NamedTuple):
    """Normalised predictions for a batch of tasks by inner steps, and the standard deviations of the last of them."""

    means: dict[int, Tensor]
    deviations: Tensor | None

    @classmethod
    def of(cls, learner: MetaLearner, tasks: Task, steps: Sequence[int]) -> "_Predicted":
        means, deviations = learner.query_predictions(tasks).double().cpu(), learner.query_deviations(tasks)
        last = deviations[:, steps[-1]].double().cpu() if deviations is not None and steps else None
        return cls({step: means[:, step] for step in steps}, last)


def _fits(learner: MetaLearner, tasks: Task, index: int, at_query: _Predicted, at_support: _Predicted | None) -> _Fits:
    scaling = learner.scaling
    assert scaling is not None  # tasks of a DataModule have one

    def real(points: Points) -> Tensor | slice:
        return slice(None) if points.mask is None else points.mask[index]

    def restored(points: Points) -> tuple[Tensor, Tensor]:
        rows = real(points)
        return scaling.restore_x(points.x[index][rows]), scaling.restore_y(points.y[index][rows])[:, 0]

    def outputs(points: Points, found: _Predicted | None) -> dict[int, Tensor]:
        means = {} if found is None else found.means
        return {step: scaling.restore_y(values[index][real(points)])[:, 0] for step, values in means.items()}

    def margin(points: Points, found: _Predicted | None) -> Tensor | None:
        if found is None or found.deviations is None:
            return None
        return Z95 * scaling.restore_deviation(found.deviations[index][real(points)])[:, 0]

    support, query, in_init = tasks.support, tasks.query, learner.problem.adapts_in_init
    fits = outputs(query, at_query), outputs(support, at_support)
    return _Fits(
        restored(support), restored(query), *fits, margin(query, at_query), margin(support, at_support), in_init
    )


def _draw_curves(axes: "Axes", fits: _Fits, truth: str) -> None:
    # the support points are points of the truth and of the fits too
    x, y = (torch.cat(parts) for parts in zip(fits.support, fits.query, strict=True))
    order = x[:, 0].argsort()
    axes.plot(x[order, 0], y[order], truth, color="0.75", linewidth=3.5, label="truth")
    curves = {step: torch.cat([fits.at_support[step], fit]) for step, fit in fits.predicted.items()}
    styles, drawn = _styles(fits), [*curves.values()]
    for number, ((step, fit), style) in enumerate(zip(curves.items(), styles, strict=True)):
        # earlier fits above later ones, whose plain line shows between their dashes
        label = _label(step, fits.in_init)
        axes.plot(x[order, 0], fit[order], linewidth=1.4, label=label, zorder=2.9 - 0.1 * number, **style)
    if fits.margin is not None and fits.margin_at_support is not None:
        last, margin = [*curves.values()][-1][order], torch.cat([fits.margin_at_support, fits.margin])[order]
        band = {"color": styles[-1]["color"], "alpha": 0.2, "linewidth": 0, "zorder": 1.5}
        axes.fill_between(x[order, 0], last - margin, last + margin, label=_BAND, **band)
        drawn += [last - margin, last + margin]
    axes.plot(fits.support[0][:, 0], fits.support[1], "^", color="crimson", markersize=6, label="support", zorder=3)
    axes.set_ylim(_limits(y, curves.get(0), drawn))


def _draw_predicted(axes: "Axes", fits: _Fits) -> None:
    truth, drawn = fits.query[1], [*fits.predicted.values()]
    for number, ((step, fit), style) in enumerate(zip(fits.predicted.items(), _styles(fits), strict=True)):
        mark = _MARKS[number % len(_MARKS)]
        axes.plot(truth, fit, mark, color=style["color"], markersize=5, label=_label(step, fits.in_init))
    if fits.margin is not None:
        last, colour = [*fits.predicted.values()][-1], _styles(fits)[-1]["color"]
        axes.vlines(truth, last - fits.margin, last + fits.margin, color=colour, alpha=0.3, label=_BAND)
        drawn += [last - fits.margin, last + fits.margin]
    axes.set_xlim(_limits(truth, None, []))
    axes.set_ylim(_limits(truth, fits.predicted.get(0), drawn))
    middle = float(truth.mean())
    axes.axline((middle, middle), slope=1, color="0.75", label="truth", zorder=0)


def _styles(fits: _Fits) -> list[dict[str, Any]]:
    """Colours and dashes that tell the fits apart; the last fit, which counts, is a solid line."""
    styles = cycle({"color": colour, "linestyle": dashes} for colour, dashes in zip(COLOURS, _DASHES, strict=True))
    before = None if fits.in_init else 0
    last_first = [_BEFORE if step == before else next(styles) for step in reversed(fits.predicted)]
    return last_first[::-1]


def _limits(truth: Tensor, before: Tensor | None, drawn: Sequence[Tensor]) -> tuple[float, float]:
    """Room for the truth and the fit before adapting; for all else half as much again, lest a divergence squeeze."""
    held = truth if before is None else torch.cat([truth, before])
    held = held[held.isfinite()]
    low, high = float(held.min()), float(held.max())
    room = 0.5 * max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    later = torch.cat([truth, *drawn]).nan_to_num(low, high, low).clamp(low - room, high + room)
    low, high = min(low, float(later.min())), max(high, float(later.max()))
    margin = 0.05 * (high - low) or room
    return low - margin, high + margin


def _label(step: int, in_init: bool) -> str:
    if step == 0:
        return "adapted" if in_init else "before adapting"
    return f"{step} step{'s' if step > 1 else ''}"
