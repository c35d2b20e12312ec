"""What a run that is continued takes from its checkpoint, compared with what is configured now."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from metalit.errors import InputError
from metalit.training.settings import changes, plain

_NEW_RUN = "go on as the run began, or load the weights into a new run (load_from_checkpoint)"


def check_network(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is of this network.

    Raises:
        InputError: parameters or buffers that are missing, unknown or of another shape.
    """
    own, found = (
        {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
        for state in (module.state_dict(), checkpoint["state_dict"])
    )
    if own != found:
        differ = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        name = differ[0]
        raise InputError(
            f"ckpt_path: the checkpoint is of another network: {name!r} has shape {found.get(name, 'none')} in the "
            f"checkpoint and {own.get(name, 'none')} in the config ({len(differ)} such parameter(s)); "
            "use the config that the checkpoint was trained with: config.yaml in its version folder"
        )


def check_state(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint holds the progress of loops and checkpoints that Lightning will look for.

    Raises:
        InputError: something is missing, or of another kind.
    """
    stage = cast(TrainerFn, trainer.state.fn).value
    loop = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}[stage]
    broken = _differs(checkpoint["loops"], {loop: getattr(trainer, loop).state_dict()})
    if broken is not None:
        raise _broken(f"loops{broken}")
    for saver in trainer.checkpoint_callbacks if stage == "fit" else []:
        kept = (checkpoint.get("callbacks") or {}).get(saver.state_key)
        if isinstance(saver, ModelCheckpoint) and kept and _differs(kept, saver.state_dict()) is not None:
            raise _broken(f"callbacks of {type(saver).__name__}")
        if isinstance(saver, ModelCheckpoint) and kept:
            _check_paths(kept, str(saver.dirpath))


@contextmanager
def restoring_is_told() -> Iterator[None]:
    """Tell what Lightning and torch cannot restore within, as an :class:`InputError` of the checkpoint's."""
    try:
        yield
    except (InputError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever comes of a state of another form
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        if not any(_restores(frame) for frame in frames):
            raise
        raise InputError(
            "ckpt_path: the state of the run in the checkpoint cannot be restored "
            f"({type(error).__name__}: {error}); use another checkpoint"
        ) from error


def _restores(frame: FrameType) -> bool:
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name.lstrip("_")
    return module.endswith(".checkpoint_connector") and name.startswith(("restore", "resume"))


def _check_paths(state: dict[str, Any], folder: str) -> None:
    """Check the files that ModelCheckpoint will delete once it has better ones: Lightning looks at their beginning."""
    models = state.get("best_k_models")
    named = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
    for path in filter(None, [*named, *(models if isinstance(models, dict) else [models])]):
        remote = not isinstance(path, str) or "://" in path or "::" in path
        if (remote and not str(path).startswith(folder)) or ".." in Path(str(path)).parts:
            raise InputError(
                f"ckpt_path: the checkpoint names {path!r} as a checkpoint of its run, which would be deleted when the "
                "next one is saved; use another checkpoint"
            )


def _broken(part: str) -> InputError:
    return InputError(f"ckpt_path: the checkpoint's {part} is not what training saves; use another checkpoint")


def _differs(found: Any, own: Any) -> str | None:
    """Where ``found`` lacks what ``own`` has, or holds another kind of thing."""
    if isinstance(own, dict):
        if not isinstance(found, dict):
            return ""
        for name, value in own.items():
            inside = _differs(found[name], value) if name in found else ""
            if inside is not None:
                return f".{name}{inside}"
    return "" if isinstance(own, int) and not isinstance(found, int) else None


def class_name(thing: Any) -> str | None:
    """The full name of the class of an optimiser or a scheduler."""
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


class OuterSettings:
    """What the outer optimiser and its scheduler were made with, here and in the run that is continued.

    Attributes:
        configured: by name, what is configured now; set before the Trainer begins.
        kept: what the checkpoint holds, until training starts; of a run that starts anew, nothing.
    """

    def __init__(self) -> None:
        self.configured: dict[str, Any] = {}
        self.kept: dict[str, Any] | None = None
        self._in_effect: dict[str, Any] = {}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint holds; what Lightning restores of it comes later."""
        parts = ("optimizer_states", "lr_schedulers", "outer_settings")
        self.kept = {name: checkpoint[name] for name in parts if name in checkpoint}
        own = self.kept.get("outer_settings", {"classes": {}, "values": {}, "clip_norm": None})
        if _differs(own, {"classes": {}, "values": {}}) is not None or "clip_norm" not in own:
            raise _broken("outer_settings")

    def state(self, optimizer: torch.optim.Optimizer, scheduler: Any, clip_norm: float | None) -> dict[str, Any]:
        """For a checkpoint, what is in effect."""
        classes = {"optimizer": class_name(optimizer), "scheduler": class_name(scheduler)}
        return {"classes": classes, "values": plain(self._in_effect), "clip_norm": clip_norm}

    def check(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Check that the checkpoint's states are those of this optimiser and this scheduler, as they begin.

        Raises:
            InputError: they are of another class, of other groups of parameters, of a scheduler more or less.
        """
        if self.kept is None:
            return
        states, schedules = self.kept.get("optimizer_states"), self.kept.get("lr_schedulers")
        if not states or schedules is None:
            raise InputError(
                f"ckpt_path: the checkpoint holds no optimizer_states, as it was saved with weights alone; {_NEW_RUN}"
            )
        names = self.kept.get("outer_settings", {}).get("classes", {})
        for what, present in (("optimizer", optimizer), ("scheduler", scheduler)):
            if what in names and names[what] != class_name(present):
                had, has = (str(name).rsplit(".", 1)[-1] for name in (names[what], class_name(present)))
                raise InputError(
                    f"model.{what}: it is {has} now, and {had} in the run that the checkpoint continues; {_NEW_RUN}"
                )
        _check_groups(optimizer, states[0])
        if len(schedules) != (scheduler is not None):
            raise InputError(
                f"model.scheduler: there is {'one' if scheduler else 'none'} now, and "
                f"{'one' if schedules else 'none'} in the run that the checkpoint continues; {_NEW_RUN}"
            )
        if scheduler is not None and scheduler.state_dict().keys() != schedules[0].keys():
            raise InputError(
                f"model.scheduler: the checkpoint's lr_schedulers hold no state of a {type(scheduler).__name__}; "
                f"{_NEW_RUN}"
            )

    def taken_over(self, present: dict[str, Any], clip_norm: float | None) -> list[str]:
        """What a checkpoint has changed of the settings, a line each.

        Args:
            present: the settings of optimiser and scheduler as they are restored.
            clip_norm: which is not restored.
        """
        kept = (self.kept or {}).get("outer_settings", {})
        # as they are restored only where nothing else tells: schedulers change more than rates
        restored = {} if self.kept is None else kept.get("values", present)
        self._in_effect = self.configured | restored
        self.kept = None
        lines = [
            f"the checkpoint keeps {name}={now} from the run that it continues; {asked}, as now configured, is not "
            "used. To train on with new settings, load the weights into a new run"
            for name, (asked, now) in changes(self.configured, self._in_effect).items()
            if not (kept and name == "scheduler.base_lrs")  # the optimiser's rates, which are told
        ]
        if kept and kept["clip_norm"] != clip_norm:
            lines.append(
                f"model.clip_norm was {kept['clip_norm']} in the run that is continued, and is {clip_norm} now"
            )
        return lines


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    kept = state.get("param_groups")
    if not (
        isinstance(kept, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in kept)
        and isinstance(state.get("state"), dict)
        and all(isinstance(each, dict) for each in state["state"].values())
    ):
        raise _broken("optimizer_states")
    had, has = (
        [(group.get("name", "the rest"), len(group["params"])) for group in groups]
        for groups in (kept, optimizer.param_groups)
    )
    if had != has:
        told = ["; ".join(f"{count} of {name}" for name, count in groups) for groups in (had, has)]
        alike = [name for name, _ in had] == [name for name, _ in has]
        owner = "model: what may train (requires_grad) is not what it was" if alike else "model.lr_by_name"
        raise InputError(
            f"{owner}: the run that the checkpoint continues had parameters in groups {told[0]}, now they are "
            f"{told[1]}; {_NEW_RUN}"
        )
    if f"{type(optimizer).__module__}.".startswith("torch.optim."):  # some are named by the package alone
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not all(
            number in range(len(parameters)) and (value.dim() == 0 or _fits(value, parameters[number]))
            for number, values in state["state"].items()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ):
            raise _broken("optimizer_states")
    settings = {"params", "name", "initial_lr", *_scheduled(kept[0])}
    differ = sorted((kept[0].keys() ^ optimizer.param_groups[0].keys()) - settings)
    if differ:
        raise InputError(
            f"model.optimizer: the checkpoint's optimizer_states are of another one than {type(optimizer).__name__}: "
            f"{differ[0]} is of one of them alone; {_NEW_RUN}"
        )


def _fits(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether it has the parameter's shape, or holds the mean over some of its dimensions, as Adafactor does."""
    pairs = zip(value.shape, parameter.shape, strict=False)
    return value.dim() == parameter.dim() and all(size in (1, whole) for size, whole in pairs)


def _scheduled(group: dict[str, Any]) -> Sequence[str]:
    """What schedulers write into a group beside the rate."""
    return [name for name in group if name in ("swa_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")]
