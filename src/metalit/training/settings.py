"""What the user configured of an outer optimiser and its scheduler, to be compared when a run goes on."""

from typing import Any

import torch

from metalit.private_torch import SCHEDULER_PROGRESS

# what torch's schedulers keep of their progress, beside their settings
_MOVES_BY_ITSELF = {
    *SCHEDULER_PROGRESS,
    *("last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
}


def settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """What the user configured of an optimiser and its scheduler, less what moves in training."""
    settings = {}
    for number, group in enumerate(optimizer.param_groups):
        where = f"optimizer[{group.get('name', number)}]" if len(optimizer.param_groups) > 1 else "optimizer"
        for name, value in group.items():
            if name not in ("params", "name", "initial_lr") and not (name == "lr" and scheduler is not None):
                settings[f"{where}.{name}"] = value
    if scheduler is not None:
        # of a scheduler that holds others, what they keep moves
        kept = plain(scheduler.state_dict())
        settings |= {f"scheduler.{name}": value for name, value in kept.items() if name not in _MOVES_BY_ITSELF}
    return settings


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint may hold."""
    kinds = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, kinds)
        or (isinstance(value, list | tuple) and all(isinstance(part, kinds) for part in value))
    }


def changes(asked: dict[str, Any], present: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What was asked for and what there is, where they differ."""
    return {name: (value, present[name]) for name, value in asked.items() if present.get(name, value) != value}
