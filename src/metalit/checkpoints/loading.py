"""``load_from_checkpoint`` for learners and DataModules that never runs what a checkpoint names."""

from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, signature
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins import HyperparametersMixin
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from torch import Tensor

from metalit.checkpoints.classes import arguments, find_class
from metalit.checkpoints.files import read_checkpoint
from metalit.errors import InputError
from metalit.private_lightning import (
    CLASS_PATH,
    INSTANTIATOR,
    default_map_location,
    given_hyperparameters,
    has_given_hyperparameters,
    load_state,
    restricted_classmethod,
)

_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


class LoadedSafely(HyperparametersMixin):
    """Mixed into a LightningModule or a LightningDataModule, before it."""

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str]
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str]
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str]

    def save_given(self) -> None:
        """Keep the configuration that the command line gave, so that a checkpoint rebuilds this object.

        What Python code passes instead are live objects, which a checkpoint must not hold: those are left out.
        """
        if has_given_hyperparameters():
            self.save_hyperparameters(logger=False)

    @restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **given: Any,
    ) -> Self:
        """Build an object anew from a checkpoint: what the command line configured, with the weights that were trained.

        A checkpoint is data: of what it names, classes alone are built, of metalit, torch.nn, torch.optim and modules
        that have been imported; so import the module of your own network before.

        Args:
            checkpoint_path: a path, an URL or an open file.
            map_location: where tensors go; where they were, if there is such a device, if not given.
            hparams_file, weights_only: Lightning's; a checkpoint holds its configuration itself, and weights only.
            strict: whether the weights must match exactly.
            given: arguments to take instead of those that the checkpoint keeps. A learner that was built in Python
                needs all of them: live objects are not kept.

        Raises:
            InputError: a file that cannot be used (:func:`~metalit.checkpoints.files.read_checkpoint`); a class that a
                checkpoint may not name; arguments that are missing or unknown; a checkpoint of another class.
        """
        owner = f"{cls.__name__}.load_from_checkpoint"
        if hparams_file is not None:
            raise InputError(
                f"{owner}: hparams_file={str(hparams_file)!r}: the checkpoint holds its configuration; "
                "give what is to differ by name"
            )
        if weights_only is False:
            raise InputError(f"{owner}: weights_only=False would run what is in the file; leave it out")
        checkpoint = read_checkpoint(checkpoint_path, map_location or default_map_location)
        key = cls.CHECKPOINT_HYPER_PARAMS_KEY
        kept = dict(checkpoint.get(key) or {})
        target: Any = cls
        if CLASS_PATH in kept:
            target = find_class(kept[CLASS_PATH], owner)
            if not issubclass(target, cls):
                raise InputError(f"{owner}: the checkpoint is of a {target.__name__}; use {target.__name__} instead")
        values = {name: value for name, value in kept.items() if name not in (CLASS_PATH, INSTANTIATOR)}
        try:
            built = arguments(target, {name: value for name, value in values.items() if name not in given}, owner)
        except InputError:
            raise
        except (AttributeError, RecursionError, TypeError, ValueError) as cause:
            raise InputError(f"{owner}: the configuration in the checkpoint cannot be used: {cause}") from None
        built |= given
        _check_arguments(target, built, owner)
        # Lightning would build its own from these, older names of theirs included
        for name in (key, cls.CHECKPOINT_HYPER_PARAMS_NAME, cls.CHECKPOINT_HYPER_PARAMS_TYPE):
            checkpoint.pop(name, None)
        for name in CHECKPOINT_PAST_HPARAMS_KEYS:
            checkpoint.pop(name, None)
        options: dict[str, Any] = {"strict": strict} if issubclass(cls, LightningModule) else {}
        with _configured(kept, given):
            found: Any = load_state(target, checkpoint, **options, **built)
        if isinstance(found, LightningModule):
            weights = (value for value in checkpoint["state_dict"].values() if isinstance(value, Tensor))
            found.to(next((value.device for value in weights), torch.device("cpu")))
        return found


def _check_arguments(target: Any, built: dict[str, Any], owner: str) -> None:
    taken = dict(list(signature(target.__init__).parameters.items())[1:])
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    unknown = sorted(built.keys() - taken.keys())
    if unknown:
        raise InputError(f"{owner}: {target.__name__} has no argument {unknown[0]!r}; it takes {', '.join(taken)}")
    needed = (name for name, parameter in taken.items() if parameter.default is Parameter.empty)
    lacking = [name for name in needed if name not in built]
    if lacking:
        raise InputError(
            f"{owner}: the checkpoint keeps no {lacking[0]!r}, as it does where the command line has built the "
            f"{target.__name__}; give {', '.join(f'{name}=...' for name in lacking)}, and all else that it was given "
            "in Python"
        )


def _configured(kept: dict[str, Any], given: dict[str, Any]) -> AbstractContextManager[None]:
    """Let what is built know its configuration, as under the command line, so that it can be saved again."""
    if not kept or not all(isinstance(value, _PLAIN) for value in given.values()):
        return nullcontext()
    return given_hyperparameters({**kept, **given})
