"""What learners report of an evaluation, printed and written."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from metalit.callbacks.drawing import Sketching, pixels, save_picture
from metalit.callbacks.errors import draw_errors
from metalit.callbacks.learner import learner_of
from metalit.callbacks.screen import show, table
from metalit.callbacks.tensorboard import tensorboards, write_table
from metalit.evaluation.report import Report
from metalit.modules.base import OuterLearner
from metalit.runs import run_folder


class ReportWriter(Callback):
    """Prints what a learner reports after ``validate`` and ``test``, and writes it to ``val.csv`` or ``test.csv``.

    A meta-learner reports the errors after each number of inner steps with 95 % intervals, beside baselines, and the
    errors task by task, ``test_tasks.csv``. Others report their scores; a bilevel learner does so at the end of a fit
    too, with the problem's results in ``results/``, and shows its outer variable in TensorBoard at each validation.

    Attributes:
        ends_fit: let ``validate`` do what the end of a fit does, for one that was killed before it had.
    """

    def __init__(self) -> None:
        self.ends_fit = False
        self._told: list[str | Table] = []
        self._drawing_errors = Sketching("the picture of the errors")
        self._drawing_histograms = Sketching("histograms of the outer variable")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what ``validate`` found; draw histograms in the validations of a fit."""
        learner = learner_of(pl_module, self)
        if trainer.state.fn == "validate":
            self._write(trainer, learner, learner.final_report() if self.ends_fit else learner.report("val"))
        elif not trainer.sanity_checking:
            with self._drawing_histograms():
                for logger in tensorboards(trainer):
                    for name, value in learner.histograms().items():
                        logger.experiment.add_histogram(name, value, learner.outer_step)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what ``test`` found."""
        learner = learner_of(pl_module, self)
        self._write(trainer, learner, learner.report("test"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what training left."""
        learner = learner_of(pl_module, self)
        self._write(trainer, learner, learner.final_report())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print all that, below the progress bar, which is drawn until now."""
        show(self._told)
        self._told = []

    def _write(self, trainer: Trainer, learner: OuterLearner, report: Report | None) -> None:
        if report is None or not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        written = _write_files(report, folder) if folder else []
        self._told = [*report.before, table(report.headings, *report.sections), *report.after, *written]
        with self._drawing_errors():
            picture = None if report.chart is None else pixels(draw_errors(report.chart))
            if folder and picture is not None:
                save_picture(picture, folder / "figures" / f"{report.split}_{report.name}.png")
            for logger in tensorboards(trainer):
                step, tag = learner.outer_step, f"pictures/{report.name}_{report.split}"
                if picture is not None:
                    logger.experiment.add_image(tag, picture, step, dataformats="HWC")
                rows = [row for section in report.sections for row in section]
                lines = [*report.before, *report.after]
                write_table(logger, f"{report.name}/{report.split}", report.headings, rows, step, lines)


def _write_files(report: Report, folder: Path) -> list[str]:
    """Write the tables, and return a line for each result that says where it is."""
    for name, frame in report.files.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    lines = []
    for name, frame in report.results.items():
        file = folder / "results" / f"{name}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(file, index=False)
        lines.append(f"{name + ':':<16} {file}")
    return lines
