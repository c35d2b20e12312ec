"""Train and test MAML on sine curves in each precision, and print how far gradients and errors are from double's.

    python scripts/compare_precisions.py
    python scripts/compare_precisions.py --steps 2000 --accelerator gpu

The error of the meta-gradient is ‖g − g₆₄‖ / ‖g₆₄‖ of the outer gradient of a task: the median over 200 tasks, and in
brackets the ninth decile, at the weights that training starts from and at those that it ended with in double
precision; in 16-mixed, at the scale that its training ended with. All train on the same tasks from the same weights,
and are tested on the same: the last column is the mean, over them, of the error less double's. On the CPU the Trainer
takes 16-mixed for bf16-mixed; a plugin around torch's scaler for the CPU is put in its place.
"""

import argparse
import tempfile
import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_map

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.data.base import task_keys
from metalit.evaluation.interval import mean_with_interval
from metalit.hypergradients import Unrolled
from metalit.hypergradients.tasks import for_each_task
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot
from metalit.scaled import Scaled
from metalit.tree import flatten

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true")


def fitted(precision: str, steps: int, accelerator: str) -> tuple[MetaLearner, torch.Tensor, float]:
    """A learner that was trained, its losses in the test, and the scale that its training ended with."""
    half_on_cpu = precision == "16-mixed" and accelerator == "cpu"
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if half_on_cpu else None
    torch.manual_seed(0)
    learner = MetaLearner(
        FewShot(MLP([1, 40, 40, 1])), SGD(0.01), Unrolled(2, (0.5, 0.5)), eval_steps=10, compile=True,
        optimizer=partial(torch.optim.Adam, lr=0.003),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=tempfile.gettempdir(), **({"plugins": [plugin]} if plugin else {"precision": precision}),
    )  # fmt: skip
    data = TaskDataModule(Sine(), Episodes(50, 5, 20), Episodes(2, 5, 5), Episodes(600, 5, 100))
    trainer.fit(learner, data)
    trainer.test(learner, data, verbose=False)
    scale = 1.0 if learner.stepper.scale is None else float(learner.stepper.scale)
    return learner, learner.task_losses.double().cpu(), scale


def gradients(precision: str, device: str, weights: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """The outer gradient of each of 200 tasks at some weights, ``[200, parameters]`` of type float64."""
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.half}.get(precision)

    def cast(leaf: Any) -> Any:
        return leaf.to(device, dtype if leaf.is_floating_point() else None) if isinstance(leaf, torch.Tensor) else leaf

    index = torch.arange(200)
    tasks = tree_map(cast, Sine().sample("train", index, task_keys(1, "train", index), 5, 20))
    problem: Any = FewShot(MLP([1, 40, 40, 1])).to(device, dtype)
    outer = {"problem": tree_map(cast, weights), "optimizer": {}}
    posed = Scaled(problem, torch.tensor(scale, device=device)) if precision == "16-mixed" else problem

    def one(outer: Any, task: Any) -> torch.Tensor:
        return flatten(Unrolled(2, (0.5, 0.5))(posed, SGD(0.01), outer, task).gradient)

    with torch.autocast(device, half, enabled=half is not None, cache_enabled=False):
        return for_each_task(one, outer, tasks).double().cpu() / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000, help="outer steps of 50 tasks")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = Table(title=f"{given.steps} outer steps, on the {given.accelerator}", title_justify="left")
    errors = ("error of the meta-gradient, at first", "trained", "test error, 1 step", "10 steps", "less double's")
    for heading in ("precision", *errors):
        table.add_column(heading)
    device = "cuda" if given.accelerator == "gpu" else "cpu"
    torch.manual_seed(0)
    points, exact, best = [_weights(FewShot(MLP([1, 40, 40, 1])))], [], torch.empty(0)
    for precision in PRECISIONS:
        learner, losses, scale = fitted(precision, given.steps, given.accelerator)
        if precision == "64-true":
            points.append(_weights(learner.problem))
            exact, best = [gradients(precision, device, weights, scale) for weights in points], losses
        row = []
        for weights, right in zip(points, exact, strict=True):
            apart = (gradients(precision, device, weights, scale) - right).norm(dim=1) / right.norm(dim=1)
            row.append(f"{float(apart.median()):.1e} ({float(apart.quantile(0.9)):.1e})")
        after = (losses[:, 1], losses[:, 10], (losses - best)[:, 10])
        table.add_row(precision, *row, *(str(mean_with_interval(values)) for values in after))
    Console(width=140).print(table)


def _weights(problem: FewShot) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().float() for name, value in problem.outer().items()}


if __name__ == "__main__":
    main()
