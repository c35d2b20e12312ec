"""What every learner shares: an outer variable that gradients are written to in one place, stepped, watched, logged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from metalit.adapt import Outer
from metalit.errors import InputError, NonFiniteError
from metalit.tree import Tree, flatten, leaves, tree_map

# what torch's schedulers keep of their progress, beside their settings
_MOVES_BY_ITSELF = {
    *("last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"),
    *("best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
}


class OuterLearner(LightningModule, ABC):
    """A LightningModule with manual optimisation whose ``training_step`` ends in :meth:`step_outer`.

    Args:
        optimizer: makes the outer optimiser; Adam with step size 0.001 if not given.
        scheduler: makes its learning-rate scheduler, stepped once for each outer step (``ReduceLROnPlateau`` once for
            each validation).
        lr_by_name: outer learning rates by shell-style patterns of parameter names, the first match counts.
        clip_norm: the norm to which the whole outer gradient is clipped.
    """

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
        self._bad_step = torch.tensor(-1)
        self._loaded_step = 0

    @abstractmethod
    def outer(self) -> Outer:
        """The outer variable: a tree of this module's parameters."""

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the outer optimiser, with one group for each pattern of ``lr_by_name``, and its scheduler."""
        groups = _groups(dict(leaves(self.outer())), self.lr_by_name)
        optimizer = _made("model.optimizer", self.make_optimizer or torch.optim.Adam, groups)
        configured: dict[str, Any] = {"optimizer": optimizer}
        if self.make_scheduler is not None:
            scheduler = _made("model.scheduler", self.make_scheduler, optimizer)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and not hasattr(scheduler, "monitor"):
                raise InputError(
                    "model.scheduler: torch's ReduceLROnPlateau does not know its metric; use "
                    "lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/loss"
                )
            configured["lr_scheduler"] = scheduler
        self._configured = _settings(optimizer, configured.get("lr_scheduler"))
        return configured

    def step_outer(self, loss: Tensor, gradient: Outer) -> None:
        """Average loss and gradient over the ranks, write the gradient to the outer parameters, and step them.

        Args:
            loss: the outer loss of this rank's tasks.
            gradient: its gradient, shaped like :meth:`outer`; the only gradient that is ever written.
        """
        flat = torch.cat([loss.detach().reshape(1), flatten(gradient)])
        if self.trainer.world_size > 1:
            # not manual_backward: the reducer of DDP only sees gradients that autograd accumulates
            flat = self.trainer.strategy.reduce(flat, reduce_op="mean")
        self._watch(flat)
        parameters = [parameter for _, parameter in leaves(self.outer())]
        pieces = flat[1:].split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        optimizer = self.optimizers()
        due = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        if due:
            # before the step: clipping changes the gradient, which lies in `flat`, and the scheduler the rates
            rates = {f"train/lr {group.get('name', '')}".strip(): group["lr"] for group in optimizer.param_groups}
            scalars = {"train/loss": float(flat[0]), "train/grad_norm": float(flat[1:].norm()), **rates}
        optimizer.step()
        scheduler = self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        if due:
            self.raise_if_not_finite()
            self.log("train/loss", scalars["train/loss"], logger=False, prog_bar=True)
            self.write_scalars(scalars)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here, where gradients are true ones in every precision."""
        if self.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def write_scalars(self, scalars: dict[str, Any], in_hparams: bool = False) -> None:
        """Send scalars to the loggers, on the one x-axis of all: the outer step.

        Args:
            scalars: values by name.
            in_hparams: show them in TensorBoard's HPARAMS tab too, beside the hyperparameters of the run.
        """
        values = {name: float(value) for name, value in scalars.items()}
        for logger in self.trainer.loggers:
            if in_hparams and isinstance(logger, TensorBoardLogger):
                own = {name: value for name, value in logger.hparams.items() if not name.startswith("_")}
                logger.log_hyperparams(own, values, step=self.outer_step)
            else:
                logger.log_metrics(values, step=self.outer_step)

    @property
    def outer_step(self) -> int:
        """How many outer steps these parameters have been trained for."""
        return self.global_step if self.trainer.state.fn == "fit" else self._loaded_step

    # ---- what is not finite must neither go on nor be saved

    def _watch(self, flat: Tensor) -> None:
        bad = ~torch.isfinite(flat).all()
        self._bad_step = torch.where(bad & (self._bad_step < 0), self.global_step + 1, self._bad_step)

    def raise_if_not_finite(self) -> None:
        """Stop if the loss or its gradient was NaN or infinite; reads a flag that stays on the device until then.

        Raises:
            NonFiniteError: with the step, and the last good checkpoint's name.
        """
        if int(self._bad_step) < 0:
            return
        saved = [Path(path) for callback in self.trainer.checkpoint_callbacks if (path := callback.best_model_path)]
        good = max((path for path in saved if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
        kept = f"The last good checkpoint is {good}" if good else "No checkpoint had been saved yet"
        raise NonFiniteError(
            f"the outer loss or its gradient became NaN or infinite at outer step {int(self._bad_step)}. {kept}. "
            "Lower the inner or the outer learning rate, or set model.clip_norm, such as 10"
        )

    def on_fit_start(self) -> None:
        """Forget earlier flags.

        Raises:
            InputError: a precision with a gradient scaler, which would divide gradients that it never scaled.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                f"trainer.precision={self.trainer.precision!r} scales losses, which outer gradients do not go through; "
                "use bf16-mixed or 32-true"
            )
        self._bad_step = torch.tensor(-1, device=self.device)

    def on_train_start(self) -> None:
        """Say what a checkpoint has changed of the user's settings."""
        for name, (asked, present) in _changes(self._configured, self._present_settings()).items():
            rank_zero_warn(
                f"the checkpoint keeps {name}={present} from the run that it continues; {asked}, as now configured, is "
                "not used. To train on with new settings, load the weights into a new run"
            )

    def on_validation_start(self) -> None:
        """Judge only what is finite."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.raise_if_not_finite()

    def step_plateau(self, metrics: dict[str, float]) -> None:
        """Step a scheduler that waits for a metric; called at the end of a validation, before its checkpoint is saved.

        Raises:
            InputError: its metric is none of those that are validated.
        """
        scheduler = self.lr_schedulers() if self.trainer.state.fn == "fit" else None
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.monitor not in metrics:
                raise InputError(f"model.scheduler.monitor={scheduler.monitor!r} is none of {sorted(metrics)}")
            scheduler.step(metrics[scheduler.monitor])

    def on_train_end(self) -> None:
        """Never end well on a loss that is not finite."""
        self.raise_if_not_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what is not finite."""
        self.raise_if_not_finite()
        # parameters alone: a buffer may hold infinities by right, such as the mask of an attention
        if not all(bool(torch.isfinite(parameter).all()) for _, parameter in leaves(self.outer())):
            self._bad_step = torch.tensor(self.global_step)
            self.raise_if_not_finite()

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
        self._loaded_step = int(checkpoint["global_step"])

    def save_given_hyperparameters(self) -> None:
        """Keep the configuration that the command line gave, so that a checkpoint rebuilds its learner.

        What Python code passes instead are live objects, which a checkpoint must not hold: those are left out.
        """
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()

    def _present_settings(self) -> dict[str, Any]:
        return _settings(self.optimizers(use_pl_optimizer=False), self.lr_schedulers())


class ParameterTree(nn.Module):
    """A tree whose leaves are parameters, saved by their dotted names."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree_map(lambda value: nn.Parameter(value.detach().clone()), tree)
        for name, parameter in leaves(self.tree):
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, parameter)


def _made(owner: str, make: Callable[[Any], Any], argument: Any) -> Any:
    """Build an optimiser or a scheduler; what torch finds wrong is an input error of its owner's."""
    try:
        return make(argument)
    except (TypeError, ValueError) as error:
        raise InputError(f"{owner}: {error}") from error


def _groups(parameters: dict[str, Tensor], lr_by_name: dict[str, float]) -> Sequence[dict[str, Any]]:
    rest = dict(parameters)
    groups = []
    for pattern, lr in lr_by_name.items():
        if not lr >= 0:
            raise InputError(f"model.lr_by_name: the rate {lr} of {pattern!r} must not be negative")
        chosen = [name for name in rest if fnmatchcase(name, pattern)]
        if not chosen:
            taken = " that an earlier pattern left over" if len(rest) < len(parameters) else ""
            raise InputError(
                f"model.lr_by_name: the pattern {pattern!r} matches no outer parameter{taken}; there are {list(rest)}"
            )
        groups.append({"params": [rest.pop(name) for name in chosen], "lr": lr, "name": pattern})
    if rest:
        groups.insert(0, {"params": list(rest.values())})
    return groups


def _settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """What the user configured of an optimiser and its scheduler, less what moves in training."""
    settings = {}
    for number, group in enumerate(optimizer.param_groups):
        where = f"optimizer[{group.get('name', number)}]" if len(optimizer.param_groups) > 1 else "optimizer"
        for name, value in group.items():
            if name not in ("params", "name", "initial_lr") and not (name == "lr" and scheduler is not None):
                settings[f"{where}.{name}"] = value
    if scheduler is not None:
        for name, value in scheduler.state_dict().items():
            if name not in _MOVES_BY_ITSELF and isinstance(value, int | float | str | list | tuple):
                settings[f"scheduler.{name}"] = value
    return settings


def _changes(asked: dict[str, Any], present: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (value, present[name]) for name, value in asked.items() if present.get(name, value) != value}
