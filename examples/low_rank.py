"""The best rank-1 approximation of a 2×5 matrix by Adam, beside the optimum of Eckart and Young.

Question: how good is the fit that 400 steps of Adam find, when the objective is not convex?
Answer: as good as any: every other stationary point is a saddle, and the error reaches σ₂². With one factor solved for
exactly, as the inner variable, a fraction of the steps is enough.
"""

import logging
import warnings
from statistics import median
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from metalit.data import MatrixDataModule
from metalit.hypergradients import Direct, Unrolled
from metalit.inner import SGD, Newton
from metalit.modules import BilevelLearner
from metalit.problem import Matrix
from metalit.problems import LowRank

SEEDS = range(10)
CLOSE = 1e-3  # relative to the optimum


class Fit(NamedTuple):
    """Errors ‖M − uvᵀ‖², the optimum σ₂² among them, and the first step at which the error is close to it."""

    first: float
    last: float
    optimum: float
    steps: int | None


class Errors(Callback):
    """Collects the error before every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, learner: BilevelLearner, batch: Matrix, *_: int) -> None:
        task = Matrix(*(leaf[0] for leaf in batch))
        error = learner.problem.outer_loss(learner.solve(task), learner.constants()["problem"], task)
        self.values.append(float(error))


def fit(seed: int, exact: bool, steps: int) -> Fit:
    """Approximate the matrix of this seed, from factors of this seed."""
    torch.manual_seed(seed)
    problem, errors, data = LowRank(2, 5, exact=exact), Errors(), MatrixDataModule(rows=2, columns=5, seed=seed)
    inside, outside = (Newton(), Unrolled()) if exact else (SGD(), Direct())
    learner = BilevelLearner(problem, inside, outside, optimizer=lambda groups: torch.optim.Adam(groups, lr=0.1))
    trainer = Trainer(
        max_steps=steps + 1,  # the error is taken before a step
        max_epochs=-1,
        precision="64-true",
        accelerator="cpu",
        callbacks=[errors],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, data)
    optimum = float(torch.linalg.svdvals(data.matrix.values)[1:].square().sum())
    close = [step for step, error in enumerate(errors.values) if error <= (1 + CLOSE) * optimum]
    return Fit(errors.values[0], errors.values[-1], optimum, close[0] if close else None)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    print("min ‖M − uvᵀ‖² for a 2×5 matrix of normal numbers, Adam 0.1\n")
    fits = {seed: fit(seed, exact=False, steps=400) for seed in SEEDS}
    print("seed     at first    after 400 steps    optimum σ₂²")
    for seed, found in fits.items():
        print(f"{seed:4d} {found.first:12.6f} {found.last:18.6f} {found.optimum:14.6f}")
    worst = max(found.last / found.optimum - 1 for found in fits.values())
    print(f"\nlargest excess over the optimum: {100 * worst:.4f} %")
    print("\nsteps until the error is within 0.1 % of the optimum, median and most")
    exact = {seed: fit(seed, exact=True, steps=60) for seed in SEEDS}
    for name, chosen in (("both factors by Adam", fits), ("v solved for exactly", exact)):
        steps = [found.steps for found in chosen.values() if found.steps is not None]
        print(f"{name}: {median(steps):.0f} {max(steps)}, in {len(steps)} of {len(SEEDS)} runs")
    print("\nmetalit fit --config configs/low_rank.yaml shows the loss as it falls, and writes the factors.")


if __name__ == "__main__":
    main()
