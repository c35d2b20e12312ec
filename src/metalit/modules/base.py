"""What every learner shares: an outer variable that gradients are written to in one place, stepped, watched, logged."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim.swa_utils import SWALR

from metalit.adapt import Outer
from metalit.checkpoints import CheckedCheckpointIO, LoadedSafely
from metalit.checks.data import check_source
from metalit.checks.epochs import check_epochs_of_loader
from metalit.checks.ranks import check_ranks
from metalit.checks.resuming import OuterSettings, check_state
from metalit.checks.trainer import check_trainer, overrides, warn_of_rare_calls
from metalit.errors import InputError
from metalit.modules.evaluated import EvaluatedLearner
from metalit.modules.hyperparameters import log_given
from metalit.notices import warn
from metalit.private_lightning import after_step, before_step, trainer_of
from metalit.private_torch import pytree_map, unscales_by_itself
from metalit.training.agreement import Agreement
from metalit.training.finite import RATES, FiniteWatch, stopped
from metalit.training.gradients import Gradients, check_types
from metalit.training.loss_scale import LossScale
from metalit.training.optimizers import (
    check_knows,
    check_not_frozen,
    check_takes_single_steps,
    groups,
    made,
    rehearse,
    settings,
)
from metalit.training.ranks import mean_of_ranks
from metalit.tree import leaves

_SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, ReduceLROnPlateau)
Packed = TypeVar("Packed", bound="HasPacked")


class HasPacked(Protocol):
    """What an outer step found: ``packed`` is that of :func:`~metalit.training.batches.packed`."""

    @property
    def packed(self) -> Tensor:
        """Loss, gradient and whether they are not finite, as one vector."""


def _nothing() -> None:
    """The closure that Lightning gives to optimisers too."""


class OuterLearner(LoadedSafely, EvaluatedLearner):
    """A LightningModule with manual optimisation whose ``training_step`` ends in :meth:`step_outer`.

    Args:
        optimizer: makes the outer optimiser; fused Adam with step size 0.001 if not given.
        scheduler: makes its learning-rate scheduler, stepped once for each outer step (``ReduceLROnPlateau`` once for
            each validation).
        lr_by_name: outer learning rates by shell-style patterns of parameter names, the first match counts.
        clip_norm: the norm to which the whole outer gradient is clipped.
    """

    takes: ClassVar[str]  # what data, for messages

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        lr_by_name: dict[str, float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.lr_by_name = lr_by_name or {}
        self.clip_norm = clip_norm
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"model.clip_norm={clip_norm} must be positive; leave it out to clip nothing")
        self.agreement = Agreement()
        self._finite = FiniteWatch(torch.device("cpu"))
        self._gradients = Gradients(self.outer)
        self._loss_scale = LossScale()
        self._settings = OuterSettings()
        self._known_step = 0
        self._step_is_heard = True

    @abstractmethod
    def outer(self) -> Outer:
        """The outer variable: a tree of this module's parameters."""

    def check_request(self) -> None:
        """Check what the Trainer was told, and that there is data for it.

        Raises:
            InputError: what :func:`~metalit.checks.data.check_source` and
                :func:`~metalit.checks.trainer.check_trainer` raise.
        """
        check_source(self, self.takes)
        check_trainer(self)

    def configure_callbacks(self) -> list[Callback]:
        """Bring no callback; this is the first that the Trainer calls, before anything is written.

        Raises:
            InputError: what :meth:`check_request` raises.
        """
        self.check_request()
        return []

    def setup(self, stage: str) -> None:
        """Check that all ranks can be one; see :func:`~metalit.training.ranks.check_ranks`.

        Raises:
            InputError: they cannot; what :meth:`check_request` raises.
        """
        self.check_request()  # again: there may be callbacks of a learner that is derived from this one
        check_ranks(self.trainer)
        self._settings.kept = None
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the outer optimiser, with one group for each pattern of ``lr_by_name``, and its scheduler."""
        if next(leaves(self.outer()), None) is None:
            raise InputError(
                "model: it has no trainable parameter to learn; unfreeze one with requires_grad_(), or give the "
                "problem an nn.Parameter"
            )
        check_types(self.outer())
        check_not_frozen(dict(leaves(self.outer())))
        parameters = groups(dict(leaves(self.outer())), self.lr_by_name)
        # a fused Adam would unscale by itself, after clipping
        default = partial(torch.optim.Adam, fused=self._scaler is None)
        make = default if self.make_optimizer is None else self.make_optimizer
        optimizer = made("model.optimizer", make, parameters, (torch.optim.Optimizer,))
        check_takes_single_steps(optimizer)
        rates = settings(optimizer, None)  # before a scheduler changes them
        configured: dict[str, Any] = {"optimizer": optimizer}
        scheduler = None
        if self.make_scheduler is not None:
            rehearse("model.scheduler", self.make_scheduler, optimizer, _SCHEDULERS)
            scheduler = made("model.scheduler", self.make_scheduler, optimizer, _SCHEDULERS)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and not hasattr(scheduler, "monitor"):
                raise InputError(
                    "model.scheduler: torch's ReduceLROnPlateau does not know its metric; use "
                    "lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/loss"
                )
            if isinstance(scheduler, ReduceLROnPlateau) and self.trainer.limit_val_batches == 0:
                raise InputError(
                    f"model.scheduler: ReduceLROnPlateau waits for {scheduler.monitor!r}, and nothing is validated; "
                    "hold tasks out for validation, or use another scheduler"
                )
            # for LearningRateMonitor: it is stepped by hand
            configured["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}
        self._settings.configured = settings(optimizer, scheduler) | rates
        return configured

    def follow(self, outer: Outer) -> bool:
        """Take the parameters that are trainable now for those that are learned; called before each outer step.

        Returns:
            Whether they are others than in the step before: a callback froze or unfroze some.

        Raises:
            InputError: one that the optimiser does not know.
        """
        first = self._gradients.is_new
        changed = self._gradients.follow(outer)
        if first or changed:
            check_knows(self.optimizers(use_pl_optimizer=False), dict(leaves(outer)))
        return changed

    def step_outer(
        self, evaluate: Callable[[], Packed], diagnose: Callable[[Packed], dict[str, Tensor]] | None = None
    ) -> tuple[Packed, dict[str, float]]:
        """Average loss and gradient over the ranks, write the gradient to the outer parameters, and step them.

        Args:
            evaluate: finds the outer loss of this rank's tasks and its gradient, shaped like :meth:`outer` and
                :attr:`scale` times as large; the only gradient that is ever written. It is called again, at a smaller
                scale, where half precision could not hold it.
            diagnose: makes more scalars by name, to be logged, of what was evaluated; called before the step, where a
                log is due. If not given, none ever is.

        Returns:
            What was evaluated, whose ``packed`` is then the mean over the ranks; and what was logged, by name without
            its ``train/``, nothing where no log was due.
        """
        found, flat = self._averaged(evaluate)
        self._finite.add(flat[-1:])
        self._gradients.write(flat[1:-1])
        # before the step: clipping changes the gradient, and the scheduler the rates
        scalars = self._scalars(flat, partial(diagnose, found)) if diagnose else {}
        optimizer = self.optimizers()
        if self._step_is_heard:
            optimizer.step()
        else:
            before_step(optimizer)
            optimizer.optimizer.step(_nothing)
            after_step(optimizer)
        self._schedule()
        if diagnose is not None or self._finite.is_full:
            self._report(scalars)
        return found, scalars

    # ---- half precision: gradients are scaled where they are found, and unscaled by Lightning's plugin

    @property
    def scale(self) -> Tensor | None:
        """What gradients are to be multiplied by, in 16-mixed precision; always the same tensor, brought up to date."""
        return self._loss_scale.value(trainer_of(self), self.device)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return self._loss_scale.scaler(trainer_of(self))

    def _averaged(self, evaluate: Callable[[], Packed]) -> tuple[Packed, Tensor]:
        while True:
            scale, found = self.scale, evaluate()
            flat = self._agreed(found.packed)
            if scale is None or not bool(flat[-1]) or float(scale) < 1:
                return found, flat
            # infinite also where the loss alone is; nothing is stepped, nor counted as a step
            self._gradients.write(torch.full_like(flat[1:-1], torch.inf))
            self._loss_scale.lower(self.trainer, self.optimizers(use_pl_optimizer=False))

    def _agreed(self, packed: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return packed
        wants = packed.new_tensor(self.agreement.wants())
        mean, wants = self.mean_over_ranks(torch.cat([packed, wants])).split([len(packed), len(wants)])
        self.agreement.grant(wants.tolist())
        return packed.copy_(mean)

    def _schedule(self) -> None:
        scheduler = self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau | SWALR):
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Step the scheduler of StochasticWeightAveraging, which takes the place of any other."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, SWALR):
            scheduler.step()

    def _report(self, scalars: dict[str, float]) -> None:
        self._finite.look(self.global_step)
        if scalars:
            self.raise_if_not_finite()
            self.log("train/loss", scalars["loss"], logger=False, prog_bar=True)
            self.write_scalars({f"train/{name}": value for name, value in scalars.items()})

    def _scalars(self, flat: Tensor, diagnose: Callable[[], dict[str, Tensor]], steps: int = 1) -> dict[str, float]:
        """What is to be logged once ``steps`` more are taken, if it is due."""
        every = self.trainer.log_every_n_steps
        if every == 0 or (self.global_step + steps) % every:
            return {}
        slope, scale = flat[1:-1], self.scale
        size = (slope if scale is None else slope / scale).norm()
        scalars, more = {"loss": float(flat[0]), "grad_norm": float(size)}, diagnose()
        if more:
            values = self.mean_over_ranks(torch.stack([value.to(flat) for value in more.values()]))
            scalars |= dict(zip(more, values.tolist(), strict=True))
        rates = self.optimizers().param_groups
        names = (group.get("name", number or "") for number, group in enumerate(rates))
        return scalars | {f"lr {name}".strip(): group["lr"] for name, group in zip(names, rates, strict=True)}

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """See :func:`~metalit.training.ranks.mean_of_ranks`."""
        return mean_of_ranks(self.trainer, values)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here, where gradients are true ones in every precision."""
        if self.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def _hears_steps(self) -> bool:
        """Whether anything hooks into the optimiser's step: asking around costs Lightning more than a small step."""
        trainer = self.trainer
        hooked = [(callback, Callback, "on_before_optimizer_step") for callback in trainer.callbacks]
        hooked += [(self, OuterLearner, "on_before_optimizer_step"), (self, OuterLearner, "optimizer_step")]
        hooked += [(trainer.strategy, Strategy, "optimizer_step")]
        hooked += [(trainer.precision_plugin, Precision, "optimizer_step")]
        return self.clip_norm is not None or any(overrides(*hook) for hook in hooked)

    def cast(self, tree: Any) -> Any:
        """Bring the tensors of any tree to this module's device, and its real numbers to this module's precision."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

        return pytree_map(moved, tree)

    @property
    def outer_step(self) -> int:
        """How many outer steps these parameters have been trained for."""
        return self.global_step if self.trainer.state.fn == "fit" else self._known_step

    # ---- what is not finite must neither go on nor be saved

    @property
    def if_not_finite(self) -> str:
        """What to try where the loss or its gradient is not finite."""
        return RATES

    def raise_if_not_finite(self) -> None:
        """Stop if the loss or its gradient was NaN or infinite; reads a flag that stays on the device until then.

        Raises:
            NonFiniteError: with the step, and the last good checkpoint's name.
        """
        if (step := self._finite.step) >= 0:
            raise stopped(step, self.trainer, self.if_not_finite)

    def check_finite(self) -> None:
        """Stop likewise if an outer parameter is not finite; this reads them all."""
        self.raise_if_not_finite()
        # parameters alone: a buffer may hold infinities by right, such as the mask of an attention
        if not all(bool(torch.isfinite(parameter).all()) for _, parameter in leaves(self.outer())):
            self._finite.mark(self.global_step)
            self.raise_if_not_finite()

    def on_fit_start(self) -> None:
        """Forget earlier flags.

        Raises:
            InputError: ``clip_norm`` with a fused optimiser in 16-mixed precision.
        """
        optimizer = self.optimizers(use_pl_optimizer=False)
        if self._scaler is not None and self.clip_norm and unscales_by_itself(optimizer):
            raise InputError(
                f"model.optimizer: in trainer.precision={self.trainer.precision!r} a fused {type(optimizer).__name__} "
                f"unscales gradients by itself, after model.clip_norm={self.clip_norm} has clipped them; set fused: "
                "false"
            )
        self._settings.check(optimizer, self.lr_schedulers())
        warn_of_rare_calls(self)
        self.agreement = Agreement()
        self._finite = FiniteWatch(self.device)
        self._gradients = Gradients(self.outer)
        log_given(self)

    def check_batch(self, batch: Any) -> None:
        """Check what is trained on first, before it is, where that was not done already."""

    def on_train_start(self) -> None:
        """Say what a checkpoint has changed of the user's settings.

        Raises:
            InputError: what counts epochs, where the training data has no end.
        """
        check_epochs_of_loader(self.trainer)
        self._step_is_heard = self._hears_steps()
        present = settings(self.optimizers(use_pl_optimizer=False), self.lr_schedulers())
        for line in self._settings.taken_over(present, self.clip_norm):
            warn(line)

    def on_validation_start(self) -> None:
        """Judge only what is finite, of one loader."""
        super().on_validation_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.check_finite()

    def on_train_end(self) -> None:
        """Never end well on what is not finite."""
        self.check_finite()
        self._known_step = self.global_step
        self._loss_scale.keep(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what is not finite, and keep what the optimiser was made with."""
        self.check_finite()
        checkpoint["precision"] = str(self.trainer.precision)
        if self.trainer.state.fn == "fit":
            used = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
            checkpoint["outer_settings"] = self._settings.state(*used, self.clip_norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network.

        Raises:
            InputError: parameters that are missing, unknown or of another shape.
        """
        own, found = (
            {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
            for state in (self.state_dict(), checkpoint["state_dict"])
        )
        if own != found:
            differ = [name for name in {**own, **found} if own.get(name) != found.get(name)]
            name = differ[0]
            raise InputError(
                f"ckpt_path: the checkpoint is of another network: {name!r} has shape {found.get(name, 'none')} in the "
                f"checkpoint and {own.get(name, 'none')} in the config ({len(differ)} such parameter(s)); "
                "use the config that the checkpoint was trained with: config.yaml in its version folder"
            )
        self._known_step = int(checkpoint["global_step"])
        self._loss_scale.load(checkpoint)
        if trainer_of(self) is not None:
            check_state(self.trainer, checkpoint)
            self._settings.load(checkpoint)
            trained = checkpoint.get("precision", self.trainer.precision)
            if trained != self.trainer.precision:
                warn(f"trainer.precision={self.trainer.precision!r}, and the checkpoint was trained in {trained!r}")
            # Lightning does so only after loading: double precision would be rounded to single and back
            self.trainer.precision_plugin.convert_module(self)
