"""The most memory that tensors take at once in a calculation."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metalit.private_torch import TorchDispatchMode, memory, tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made within and not yet freed.

    Attributes:
        now, most: the bytes at present, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and count what it made."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._count(leaf)
        return found

    def _count(self, tensor: Tensor) -> None:
        place, storage = memory(tensor), tensor.untyped_storage()
        if place in self._known:
            return
        size = storage.nbytes()
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def peak_of(fn: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that ``fn()`` takes at once beside what there is before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        fn()
    return live.most


def available(device: torch.device) -> int | None:
    """The bytes that are free on a card, or in this machine as far as it tells and its limits allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_line("/proc/meminfo", "MemAvailable:")]
    limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    found.append(limit - used if limit is not None and used is not None else None)
    return min((value for value in found if value is not None), default=None)


def _line(path: str, name: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(name)), None)
    except OSError:
        return None


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
