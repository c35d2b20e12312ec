"""Train and test MAML on sine curves in each precision, and print how far gradients and errors are from double's.

    python scripts/compare_precisions.py
    python scripts/compare_precisions.py --steps 2000 --accelerator gpu

The error of the meta-gradient is ‖g − g₆₄‖ / ‖g₆₄‖ of the outer gradient of 200 tasks, at the weights that training
starts from and at those that it ended with in double precision; 16-mixed scales it as training does. All train on the
same tasks from the same weights. On the CPU the Trainer takes 16-mixed for bf16-mixed; a plugin around torch's scaler
for the CPU is put in its place.
"""

import argparse
import tempfile
import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from rich.table import Table

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.modules.interval import mean_with_interval
from metalit.networks import MLP
from metalit.problems import FewShot

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true")


class Gradient(Callback):
    """Keeps the first gradient that the optimiser is given."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.value = torch.cat(
            [p.grad.reshape(-1).double() for group in optimizer.param_groups for p in group["params"]]
        )


def fitted(precision: str, steps: int, accelerator: str, tasks: int, weights: Any = None, *callbacks: Callback) -> Any:
    """A learner that was trained, and its trainer."""
    half_on_cpu = precision == "16-mixed" and accelerator == "cpu"
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if half_on_cpu else None
    torch.manual_seed(0)
    learner = MetaLearner(
        FewShot(MLP([1, 40, 40, 1])), SGD(0.01), Unrolled(2, (0.5, 0.5)), eval_steps=10, compile=steps > 1,
        optimizer=partial(torch.optim.Adam, lr=0.003),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    if weights is not None:
        learner.problem.load_state_dict(weights)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=list(callbacks),
        default_root_dir=tempfile.gettempdir(), **({"plugins": [plugin]} if plugin else {"precision": precision}),
    )  # fmt: skip
    data = TaskDataModule(Sine(), Episodes(tasks, 5, 20), Episodes(2, 5, 5), Episodes(600, 5, 100))
    trainer.fit(learner, data)
    return learner, trainer, data


def gradient(precision: str, accelerator: str, weights: Any) -> torch.Tensor:
    """The outer gradient of 200 tasks at some weights."""
    kept = Gradient()
    fitted(precision, 1, accelerator, 200, weights, kept)
    return kept.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000, help="outer steps of 50 tasks")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = Table(title=f"{given.steps} outer steps, on the {given.accelerator}", title_justify="left")
    for heading in ("precision", "error of the meta-gradient, at first", "trained", "test error, 1 step", "10 steps"):
        table.add_column(heading)
    points: list[Any] = [None]
    exact: list[torch.Tensor] = []
    for precision in PRECISIONS:
        learner, trainer, data = fitted(precision, given.steps, given.accelerator, 50)
        trainer.test(learner, data, verbose=False)
        quality = [str(mean_with_interval(learner.task_losses[:, steps])) for steps in (1, 10)]
        if not exact:
            points.append({name: value.float() for name, value in learner.problem.state_dict().items()})
        found = [gradient(precision, given.accelerator, weights) for weights in points]
        exact = exact or found
        errors = [float((g - g64).norm() / g64.norm()) for g, g64 in zip(found, exact, strict=True)]
        table.add_row(precision, *(f"{error:.1e}" if error else "0" for error in errors), *quality)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
