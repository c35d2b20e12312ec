"""What a run depends on, as plain values that name no person, no machine and no place on its disk."""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalit.notices import say
from metalit.private_torch import tree_leaves

_PACKAGES = ("metalit", "torch", "lightning", "numpy", "torchmetrics")
# what looks like a place that begins at the root of a disk or at somebody's home
_ABSOLUTE = re.compile(r"(?<![\w.\-/\\])(?:~?/|[A-Za-z]:[\\/])[^\s,;'\"\[\]{}]*")
_BLOCK = 2**20
_LARGE = 2**31  # bytes of data that take some seconds to read


def versions() -> dict[str, str]:
    """The versions of Python and of what the numbers come from."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # it runs from its source
            found[package] = "unknown"
    return found


def git_state() -> dict[str, Any] | None:
    """The commit of the working folder, and whether nothing was changed since; None where git knows none."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "clean": not changes}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(device: torch.device) -> dict[str, Any]:
    """What computes: the processor, the threads of torch, and the accelerator where there is one."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def without_places(value: Any) -> Any:
    """Plain values in which every absolute path is shortened to its last name.

    >>> without_places({"file": "/home/ada/points.csv", "lr": 0.1, "args": ["--out=/tmp/x/y", "a/b"]})
    {'file': '…/points.csv', 'lr': 0.1, 'args': ['--out=…/y', 'a/b']}
    """
    if isinstance(value, Mapping):
        return {str(name): without_places(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(part) for part in value]
    if isinstance(value, str | Path):
        return _ABSOLUTE.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/"))[-1], str(value))
    return value if value is None or isinstance(value, bool | int | float) else repr(type(value).__name__)


def data_hashes(data: Any) -> dict[str, str]:
    """The SHA-256 of each file and folder that a configuration of data names, by its name there."""
    paths = {name: Path(name) for name in dict.fromkeys(_named(data))}
    size = sum(file.stat().st_size for path in paths.values() for file in _files(path))
    if size > _LARGE:
        say(f"reading {size / 2**30:.0f} GiB of data once, for the hash in run.json")
    return {without_places(name): _hash_of(path) for name, path in paths.items()}


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not str(name).startswith("predict_"):
                yield from _named(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _named(part)
    elif isinstance(value, str) and value.strip(". ") and _exists(Path(value)):
        yield value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())


def _hash_of(path: Path) -> str:
    """Of a file its content; of a folder the names and contents of all files below it."""
    total = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                total.update(block)
    else:
        for below in _files(path):
            total.update(f"{below.relative_to(path).as_posix()}\0{_hash_of(below)}\n".encode())
    return total.hexdigest()


def weights_hash(state: Mapping[str, Any]) -> str:
    """The SHA-256 of the tensors of a module by name: their types, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(state):
        for leaf in tree_leaves(state[name]):
            if isinstance(leaf, Tensor):
                value = leaf.detach().cpu().contiguous()
                total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
                total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
