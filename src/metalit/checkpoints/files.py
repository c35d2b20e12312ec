"""Reads the file of a checkpoint: its checksums hold, it is data and no code, and its parts are of the right types."""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any
from urllib.request import urlopen

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from packaging.version import InvalidVersion, Version
from torch import Tensor

from metalit.errors import InputError

_NEEDED: dict[str, type] = {"state_dict": dict, "global_step": int, "loops": dict, "pytorch-lightning_version": str}
_OTHERS: dict[str, Any] = {
    **{
        "epoch": int,
        "fused_steps": int,
        "best_steps": int,
        "callbacks": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
    },
    **{"hyper_parameters": dict, "datamodule_hyper_parameters": dict, "scaling": dict, "inner": (dict, Tensor)},
    **{"MixedPrecision": dict, "precision": str},
}
_FOLDER = 0x10  # MS-DOS's
_CODE = re.compile(r"(?:GLOBAL|Unsupported class) (?P<name>[\w.]+)")


def read_checkpoint(source: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of a learner: tensors and plain values only.

    Args:
        source: a path, an URL or an open file.
        map_location: see :func:`torch.load`.

    Raises:
        InputError: there is no such file; it is damaged, or no checkpoint at all; it holds anything else than plain
            values; a part of it is missing or of another kind.
    """
    owner = f"ckpt_path={str(source if isinstance(source, str | Path) else getattr(source, 'name', 'a file'))!r}"
    content = _content(source, owner)
    try:
        # torch checks no sums: a flipped bit would be another weight
        with zipfile.ZipFile(content) as archive:
            # torch finds nothing in what is marked as a folder
            folders = [record.filename for record in archive.infolist() if record.external_attr & _FOLDER]
            broken = archive.testzip() or next(iter(folders), None)
        if broken is None:
            content.seek(0)
            return _checked(torch.load(content, map_location=map_location, weights_only=True), owner)
        reason = f"its part {broken} is not what was saved"
    except InputError:
        raise
    except Exception as cause:  # damage comes as any error of zipfile, of torch, of pickle
        code = _CODE.search(str(cause)) if isinstance(cause, pickle.UnpicklingError) else None
        if code:
            raise InputError(
                f"{owner} holds more than tensors and plain values ({code['name']}), and is not loaded: a pickle can "
                "run any code"
            ) from None
        reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no message'])[0][:120]}"
    raise InputError(f"{owner} is damaged, or no checkpoint at all ({reason}); {_way_out(source)}")


def _content(source: str | Path | IO[bytes], owner: str) -> IO[bytes]:
    if not isinstance(source, str | Path):
        return io.BytesIO(source.read())
    if "://" not in str(source) and not Path(source).is_file():
        what = "is a folder" if Path(source).is_dir() else f"there is no such file (looked in {Path.cwd()})"
        raise InputError(f"{owner}: {what}; name a checkpoint, such as best.ckpt of a run")
    try:
        if str(source).startswith(("http://", "https://")):
            with urlopen(str(source)) as remote:
                return io.BytesIO(remote.read())
        with get_filesystem(source).open(str(source), "rb") as file:
            return io.BytesIO(file.read())
    except (OSError, ValueError) as cause:
        raise InputError(f"{owner} cannot be read: {cause}") from None


def _way_out(source: str | Path | IO[bytes]) -> str:
    if not isinstance(source, str | Path):
        return "get it anew"
    folder = Path(source).parent
    others = [file.name for file in sorted(folder.glob("*.ckpt")) if file != Path(source)]
    return f"use another one: {' or '.join(others)} in {str(folder)!r}" if others else "get it anew"


def _checked(checkpoint: Any, owner: str) -> dict[str, Any]:
    """The checkpoint, if its parts are there and of their kinds."""
    lacking = sorted(_NEEDED.keys() - (checkpoint.keys() if isinstance(checkpoint, dict) else set()))
    if lacking:
        raise InputError(f"{owner} is no checkpoint of a learner: it lacks {lacking}")
    wrong = [
        name
        for name, kind in {**_NEEDED, **_OTHERS}.items()
        if not isinstance(value := checkpoint.get(name), kind) and not (value is None and name not in _NEEDED)
    ]
    try:
        Version(str(checkpoint["pytorch-lightning_version"]))
    except InvalidVersion:
        wrong.append("pytorch-lightning_version")
    wrong += ["global_step"] if not wrong and checkpoint["global_step"] < 0 else []
    inside: dict[str, type] = {"state_dict": Tensor, "callbacks": dict, "optimizer_states": dict, "lr_schedulers": dict}
    for name, kind in inside.items():
        held = None if name in wrong else checkpoint.get(name)
        held = list(held.values()) if isinstance(held, dict) else held or []
        wrong += [] if all(isinstance(value, kind) for value in held) else [name]
    if "state_dict" not in wrong and not all(_has_values(weight) for weight in checkpoint["state_dict"].values()):
        wrong.append("state_dict")
    if wrong:
        found = type(checkpoint[wrong[0]]).__name__
        raise InputError(
            f"{owner} is no checkpoint of a learner: its {wrong[0]!r} is not what training saves (a {found}, or values "
            "of another kind in it); use another checkpoint"
        )
    return checkpoint


def _has_values(weight: Tensor) -> bool:
    return weight.layout is torch.strided and not weight.is_meta


class CheckedCheckpointIO(TorchCheckpointIO):
    """Reads what :func:`read_checkpoint` accepts, and nothing else."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, by default to the CPU; as if ``weights_only`` were true in any case."""
        return read_checkpoint(path, "cpu" if map_location is None else map_location)
