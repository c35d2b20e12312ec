"""Pictures of the fits: the truth, the support points, and the fit after some inner steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from metalit.data.base import Split, TaskDistribution
from metalit.data.module import TaskDataModule
from metalit.errors import InputError
from metalit.modules.meta import MetaLearner
from metalit.problem import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 20  # pictures of a run: each takes about a third of a second


class FitFigures(Callback):
    """Draws a few fixed tasks at validations, for TensorBoard and as PNG files in ``figures/`` of the run.

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

    def on_validation_end(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Draw validation tasks, at most ``_MOST`` times in a run."""
        if trainer.sanity_checking or (trainer.global_step < self._next_step and trainer.state.fn == "fit"):
            return
        self._next_step = trainer.global_step + max(trainer.max_steps, 0) // _MOST
        self._publish(trainer, learner, "val")

    def on_test_end(self, trainer: Trainer, learner: MetaLearner) -> None:
        """Draw test tasks."""
        self._publish(trainer, learner, "test")

    def _publish(self, trainer: Trainer, learner: MetaLearner, split: Split) -> None:
        data = trainer.datamodule
        logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        few_shot = isinstance(learner, MetaLearner) and isinstance(data, TaskDataModule)
        if not (self.tasks and trainer.is_global_zero and logger and few_shot):
            return
        from matplotlib.image import imsave

        picture = _rendered(draw_fits(learner, data.pictured(split, self.tasks), data.tasks, self.steps))
        folder = Path(logger.log_dir) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        imsave(folder / f"{split}.png", picture)
        logger.experiment.add_image(f"fits/{split}", picture, learner.outer_step, dataformats="HWC")


def _rendered(figure: "Figure") -> np.ndarray:
    """Its pixels, once for both: what takes the time of a picture is to arrange and to render it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_fits(learner: MetaLearner, tasks: Task, source: TaskDistribution, steps: Sequence[int]) -> "Figure":
    """Draw the fits to a batch of tasks, one panel for each, in the user's units.

    With one input column, y is drawn over x; with several, the predicted y over the true one. Of several outputs, the
    first is drawn.

    Args:
        learner: what is drawn.
        tasks: a batch of tasks.
        source: where they come from; it names the columns.
        steps: after how many inner steps the fits are drawn.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    steps = [step for step in steps if step <= learner.eval_steps]
    predictions = learner.query_predictions(tasks)[:, steps].double().cpu()
    scaling, columns = learner.scaling, source.columns
    count = len(tasks.support.x)
    figure = Figure(figsize=(3.6 * count, 3.6), layout="constrained")
    colours = colormaps["viridis"](np.linspace(0.85, 0.1, len(steps)))
    for index, axes in enumerate(np.atleast_1d(figure.subplots(1, count))):
        real = slice(None) if tasks.query.mask is None else tasks.query.mask[index]
        support_x, support_y = scaling.restore_x(tasks.support.x[index]), scaling.restore_y(tasks.support.y[index])
        x, y = scaling.restore_x(tasks.query.x[index][real]), scaling.restore_y(tasks.query.y[index][real])
        fits = scaling.restore_y(predictions[index][:, real])
        if len(columns.x) == 1:
            _draw_curves(axes, (support_x, support_y), (x, y), fits, steps, colours, "." if source.noisy else "-")
            axes.set_xlabel(columns.x[0])
            axes.set_ylabel(columns.y[0])
        else:
            axes.axline((float(y[0, 0]), float(y[0, 0])), slope=1, color="0.7")
            for step, fit, colour in zip(steps, fits, colours, strict=True):
                axes.plot(y[:, 0], fit[:, 0], ".", color=colour, label=_label(step))
            axes.set_xlabel(f"true {columns.y[0]}")
            axes.set_ylabel(f"predicted {columns.y[0]}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * count), frameon=False)
    return figure


def _draw_curves(
    axes: "Axes",
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    fits: Tensor,
    steps: Sequence[int],
    colours: np.ndarray,
    truth: str,
) -> None:
    order = query[0][:, 0].argsort()
    x = query[0][order, 0]
    axes.plot(x, query[1][order, 0], truth, color="0.6", linewidth=3, label="truth")
    for step, fit, colour in zip(steps, fits, colours, strict=True):
        axes.plot(x, fit[order, 0], color=colour, linewidth=1.5, label=_label(step))
    axes.plot(support[0][:, 0], support[1][:, 0], "^", color="crimson", markersize=8, label="support", zorder=3)
    # a fit that diverges must not squeeze the others into a line
    low, high = float(query[1][:, 0].min()), float(query[1][:, 0].max())
    margin = 0.6 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)


def _label(step: int) -> str:
    return "before adapting" if step == 0 else f"{step} step{'s' if step > 1 else ''}"
