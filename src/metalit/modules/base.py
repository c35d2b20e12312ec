"""What every learner shares: an outer variable that is stepped, watched and logged, and checkpoints of it."""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.swa_utils import SWALR

from metalit.adapt import Outer
from metalit.checkpoints import CheckedCheckpointIO, LoadedSafely
from metalit.checks.data import check_source
from metalit.checks.epochs import check_epochs_of_loader
from metalit.checks.ranks import check_ranks
from metalit.checks.resuming import OuterSettings, check_network, check_state
from metalit.checks.trainer import check_trainer, warn_of_rare_calls
from metalit.errors import InputError
from metalit.modules.evaluated import EvaluatedLearner
from metalit.modules.hyperparameters import log_given
from metalit.notices import warn
from metalit.private_lightning import trainer_of
from metalit.private_torch import pytree_map, unscales_by_itself
from metalit.training.agreement import Agreement
from metalit.training.finite import RATES
from metalit.training.gradients import check_types
from metalit.training.hooks import has_step_hooks
from metalit.training.optimizers import (
    check_knows,
    check_not_frozen,
    made_optimizer,
    made_scheduler,
    optimizer_of,
)
from metalit.training.ranks import mean_of_ranks
from metalit.training.settings import settings
from metalit.training.stepper import OuterStepper
from metalit.tree import leaves


class OuterLearner(LoadedSafely, EvaluatedLearner):  # type: ignore[misc]  # loading is a method of Lightning's own kind
    """A LightningModule with manual optimisation whose ``training_step`` ends in ``self.stepper.take(…)``.

    Attributes:
        stepper: takes the outer steps (:class:`~metalit.training.stepper.OuterStepper`).

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
        self.stepper = OuterStepper(self, self.outer, self.write_scalars, self.if_not_finite)
        self._settings = OuterSettings()
        self._known_step = 0

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
        """Check that all ranks can be one; see :func:`~metalit.checks.ranks.check_ranks`.

        Raises:
            InputError: they cannot; what :meth:`check_request` raises.
        """
        self.check_request()  # again: there may be callbacks of a learner that is derived from this one
        check_ranks(self.trainer)
        self._settings.kept = None
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckedCheckpointIO()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the outer optimiser, with one group for each pattern of ``lr_by_name``, and its scheduler."""
        if next(leaves(self.outer()), None) is None:
            raise InputError(
                "model: it has no trainable parameter to learn; unfreeze one with requires_grad_(), or give the "
                "problem an nn.Parameter"
            )
        check_types(self.outer())
        check_not_frozen(dict(leaves(self.outer())))
        # a fused Adam would unscale by itself, after clipping
        fused = self.stepper.loss_scale.scaler(trainer_of(self)) is None
        optimizer = made_optimizer(self.make_optimizer, dict(leaves(self.outer())), self.lr_by_name, fused)
        rates = settings(optimizer, None)  # before a scheduler changes them
        if self.make_scheduler is None:
            self._settings.configured = rates
            return {"optimizer": optimizer}
        trainer = trainer_of(self)  # none yet, where a loaded learner is asked
        validates = trainer is None or trainer.limit_val_batches != 0
        scheduler = made_scheduler(self.make_scheduler, optimizer, validates)
        self._settings.configured = settings(optimizer, scheduler) | rates
        # for LearningRateMonitor: it is stepped by hand
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def follow(self, outer: Outer) -> bool:
        """Take the parameters that are trainable now for those that are learned; called before each outer step.

        Returns:
            Whether they are others than in the step before: a callback froze or unfroze some.

        Raises:
            InputError: one that the optimiser does not know.
        """
        first = self.stepper.gradients.is_new
        changed = self.stepper.gradients.follow(outer)
        if first or changed:
            check_knows(optimizer_of(self), dict(leaves(outer)))
        return changed

    @property
    def agreement(self) -> Agreement:
        """What the ranks agree on with each outer step."""
        return self.stepper.agreement

    def on_train_epoch_end(self) -> None:
        """Step the scheduler of StochasticWeightAveraging, which takes the place of any other."""
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, SWALR):
            scheduler.step()

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """See :func:`~metalit.training.ranks.mean_of_ranks`."""
        return mean_of_ranks(self.trainer, values)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here, where gradients are true ones in every precision."""
        if self.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def cast(self, tree: Any) -> Any:
        """Bring the tensors of any tree to this module's device, and its real numbers to this module's precision."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, cast(torch.dtype, self.dtype) if leaf.is_floating_point() else None)

        return pytree_map(moved, tree)

    @property
    def outer_step(self) -> int:
        """How many outer steps these parameters have been trained for."""
        return self.global_step if self.trainer.state.fn == "fit" else self._known_step

    def if_not_finite(self) -> str:
        """What to try where the loss or its gradient is not finite."""
        return RATES

    def on_fit_start(self) -> None:
        """Forget earlier flags.

        Raises:
            InputError: ``clip_norm`` with a fused optimiser in 16-mixed precision.
        """
        optimizer = optimizer_of(self)
        scaled = self.stepper.loss_scale.scaler(self.trainer) is not None
        if scaled and self.clip_norm and unscales_by_itself(optimizer):
            raise InputError(
                f"model.optimizer: in trainer.precision={self.trainer.precision!r} a fused {type(optimizer).__name__} "
                f"unscales gradients by itself, after model.clip_norm={self.clip_norm} has clipped them; set fused: "
                "false"
            )
        self._settings.check(optimizer, self.lr_schedulers())
        warn_of_rare_calls(self)
        self.stepper.begin()
        log_given(self)

    def check_batch(self, batch: Any) -> None:
        """Check what is trained on first, before it is, where that was not done already."""

    def on_train_start(self) -> None:
        """Say what a checkpoint has changed of the user's settings.

        Raises:
            InputError: what counts epochs, where the training data has no end.
        """
        check_epochs_of_loader(self.trainer)
        self.stepper.has_hooks = self.clip_norm is not None or has_step_hooks(self, OuterLearner)
        present = settings(optimizer_of(self), self.lr_schedulers())
        for line in self._settings.taken_over(present, self.clip_norm):
            warn(line)

    def on_validation_start(self) -> None:
        """Judge only what is finite, of one loader."""
        super().on_validation_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.stepper.check_finite()

    def on_train_end(self) -> None:
        """Never end well on what is not finite."""
        self.stepper.check_finite()
        self._known_step = self.global_step
        self.stepper.loss_scale.keep(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what is not finite, and keep what the optimiser was made with."""
        self.stepper.check_finite()
        checkpoint["precision"] = str(self.trainer.precision)
        if self.trainer.state.fn == "fit":
            used = optimizer_of(self), self.lr_schedulers()
            checkpoint["outer_settings"] = self._settings.state(*used, self.clip_norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this network.

        Raises:
            InputError: parameters that are missing, unknown or of another shape.
        """
        check_network(self, checkpoint)
        self._known_step = int(checkpoint["global_step"])
        self.stepper.loss_scale.load(checkpoint)
        if trainer_of(self) is not None:
            check_state(self.trainer, checkpoint)
            self._settings.load(checkpoint)
            trained = checkpoint.get("precision", self.trainer.precision)
            if trained != self.trainer.precision:
                warn(f"trainer.precision={self.trainer.precision!r}, and the checkpoint was trained in {trained!r}")
            # Lightning does so only after loading: double precision would be rounded to single and back
            self.trainer.precision_plugin.convert_module(self)
