"""Outer steps: average over the ranks, write the gradient, step the optimiser and its scheduler, log what is due."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.optim.swa_utils import SWALR

from metalit.adapt import Outer
from metalit.private_lightning import trainer_of
from metalit.training.agreement import Agreement
from metalit.training.context import StepContext
from metalit.training.counters import count_steps
from metalit.training.finite import FiniteWatch
from metalit.training.fused_loop import FusedResult
from metalit.training.gradients import Gradients
from metalit.training.loss_scale import LossScale
from metalit.training.optimizer_step import take_step
from metalit.training.optimizers import optimizer_of
from metalit.training.outer_gradient import OuterGradient
from metalit.training.ranks import mean_of_ranks
from metalit.tree import leaves

Scalars = dict[str, float]


class HasGradient(Protocol):
    """What an evaluation found."""

    @property
    def gradient(self) -> OuterGradient:
        """Of this rank's items, and after the step the mean over the ranks."""


Result = TypeVar("Result", bound=HasGradient)


class OuterStepper:
    """Takes the outer steps of a LightningModule with manual optimisation.

    Attributes:
        agreement: what the ranks agree on with each step.
        loss_scale: that of 16-mixed precision.

    Args:
        module: whose trainer, optimiser and scheduler are used.
        outer: returns the outer variable, parameters of the module.
        write: sends scalars by name to the loggers.
        way_out: says what to try where the loss or its gradient is not finite.
    """

    def __init__(
        self,
        module: LightningModule,
        outer: Callable[[], Outer],
        write: Callable[[Scalars], None],
        way_out: Callable[[], str],
    ) -> None:
        self.module = module
        self.outer = outer
        self.write = write
        self.way_out = way_out
        self.loss_scale = LossScale()
        self.has_hooks = True
        self._progress = torch.zeros((), dtype=torch.long)
        self.begin()

    def begin(self) -> None:
        """Forget what earlier fits found."""
        self.agreement = Agreement()
        self.gradients = Gradients(self.outer)
        self._finite = FiniteWatch(self.module.device)

    # ---- what a step is taken at

    @property
    def scale(self) -> Tensor | None:
        """What gradients are multiplied by in 16-mixed precision; always the same tensor, brought up to date."""
        return self.loss_scale.value(trainer_of(self.module), self.module.device)

    def progress(self, step: int) -> Tensor:
        """The number of outer steps that were taken; always the same tensor, brought up to date."""
        if self._progress.device != self.module.device:
            self._progress = self._progress.to(self.module.device)
        return self._progress.fill_(step)

    def context(self, outer: Outer, step: int) -> StepContext:
        """All of it; :meth:`take` brings scale and progress up to date."""
        return StepContext(outer, self.scale, self.progress(step))

    # ---- steps

    def take(
        self, evaluate: Callable[[], Result], diagnose: Callable[[Result], dict[str, Tensor]] | None = None
    ) -> tuple[Result, Scalars]:
        """Take a step.

        Args:
            evaluate: finds the outer loss of this rank's items and its gradient, which is :attr:`scale` times as large;
                the only gradient that is ever written. It is called again, at a smaller scale, where half precision
                could not hold it.
            diagnose: makes more scalars by name, to be logged, of what was evaluated; called before the step, where a
                log is due. If not given, none ever is.

        Returns:
            What was evaluated, and what was logged, by name without its ``train/``: nothing where no log was due.
        """
        self.progress(self.module.global_step)
        found, mean = self._averaged(evaluate)
        self._finite.add(mean.not_finite)
        self.gradients.write(mean.gradient)
        # before the step: clipping changes the gradient, and the scheduler the rates
        scalars = self._due(mean, partial(diagnose, found)) if diagnose else {}
        take_step(self.module.optimizers(), self.has_hooks)
        self.schedule()
        if diagnose is not None or self._finite.is_full:
            self._report(scalars)
        return found, scalars

    def took(self, found: FusedResult, steps: int) -> Scalars:
        """Count, schedule and log steps that a :class:`~metalit.training.fused_loop.FusedLoop` took."""
        self._finite.add(found.not_finite)
        scalars = self._due(found.last.gradient, lambda: found.diagnosis, steps)
        count_steps(self.module.optimizers(), steps)
        self.schedule()
        self._report(scalars)
        return scalars

    def schedule(self) -> None:
        """Step a scheduler that steps with the optimiser; others wait for a metric, or an epoch."""
        scheduler: Any = self.module.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau | SWALR):
            scheduler.step()

    def _averaged(self, evaluate: Callable[[], Result]) -> tuple[Result, OuterGradient]:
        while True:
            scale, found = self.scale, evaluate()
            mean = self._mean(found.gradient)
            if scale is None or not bool(mean.not_finite) or float(scale) < 1:
                return found, mean
            # infinite also where the loss alone is; nothing is stepped, nor counted as a step
            self.gradients.write(torch.full_like(mean.gradient, torch.inf))
            self.loss_scale.lower(self.module.trainer, optimizer_of(self.module))

    def _mean(self, own: OuterGradient) -> OuterGradient:
        """The mean over the ranks, in the place of this rank's; the ranks' requests travel with it."""
        if self.module.trainer.world_size == 1:
            return own
        requests = own.vector.new_tensor(self.agreement.requests())
        joined = mean_of_ranks(self.module.trainer, torch.cat([own.vector, requests]))
        mean, requests = joined.split([len(own.vector), len(requests)])
        self.agreement.resolve(requests.tolist())
        return OuterGradient(own.vector.copy_(mean))

    # ---- logs

    def _due(self, mean: OuterGradient, diagnose: Callable[[], dict[str, Tensor]], steps: int = 1) -> Scalars:
        """What is to be logged once ``steps`` more are taken, if it is due."""
        every = self.module.trainer.log_every_n_steps
        if every == 0 or (self.module.global_step + steps) % every:
            return {}
        scale, more = self.scale, diagnose()
        size = (mean.gradient if scale is None else mean.gradient / scale).norm()
        scalars = {"loss": float(mean.loss), "grad_norm": float(size)}
        if more:
            values = torch.stack([value.to(mean.vector) for value in more.values()])
            scalars |= dict(zip(more, mean_of_ranks(self.module.trainer, values).tolist(), strict=True))
        groups = optimizer_of(self.module).param_groups
        names = (group.get("name", number or "") for number, group in enumerate(groups))
        return scalars | {f"lr {name}".strip(): group["lr"] for name, group in zip(names, groups, strict=True)}

    def _report(self, scalars: Scalars) -> None:
        self._finite.look(self.module.global_step)
        if scalars:
            self.raise_if_not_finite()
            self.module.log("train/loss", scalars["loss"], logger=False, prog_bar=True)
            self.write({f"train/{name}": value for name, value in scalars.items()})

    def raise_if_not_finite(self) -> None:
        """Stop where the loss or its gradient was not finite; see :class:`~metalit.training.finite.FiniteWatch`."""
        self._finite.raise_if_noticed(self.module.trainer, self.way_out())

    def check_finite(self) -> None:
        """Stop likewise where an outer parameter is not."""
        # parameters alone: a buffer may hold infinities by right, such as the mask of an attention
        self._finite.check((value for _, value in leaves(self.outer())), self.module.trainer, self.way_out())
