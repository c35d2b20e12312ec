"""What ranks tell each other: means, rows, items, and how long they wait."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from metalit.private_lightning import process_group_timeout


def mean_of_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The mean over all ranks; not by ``manual_backward``, as DDP only sees gradients that autograd accumulates."""
    if trainer.world_size == 1:
        return values
    # in one call: Lightning's own reduction waits at a barrier first, which costs more than the rest
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / trainer.world_size


def rows_of_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The rows of all ranks, as many of each, in their order."""
    if trainer.world_size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def items_of_ranks(trainer: Trainer, items: list[Any]) -> list[Any]:
    """The items of all ranks, in their order."""
    if trainer.world_size == 1:
        return items
    parts: list[list[Any]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def compile_patience(trainer: Trainer, seconds: float) -> float:
    """The seconds that a rank may compile: the others wait, and after the process group's timeout they no longer do."""
    timeout = process_group_timeout(trainer.strategy)
    return seconds if trainer.world_size == 1 or timeout is None else min(seconds, timeout.total_seconds() / 2)
