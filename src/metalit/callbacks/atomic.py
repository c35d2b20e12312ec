"""Checkpoints that are whole or not there: a process that is killed while it saves leaves the one before."""

import os
from pathlib import Path
from typing import Any

import torch

from metalit.checkpoints import CheckedCheckpointIO


class AtomicCheckpointIO(CheckedCheckpointIO):
    """Writes beside the file that is to be replaced, and renames.

    Lightning's own goes by way of the folder for temporary files, which is often on another disk than the runs: what it
    moves over the last checkpoint from there, it copies, and half a copy is none.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save; where the path is no local one, as Lightning does."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # no other process has this name, nor has one on another machine
        begun = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
        try:
            with begun.open("xb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            begun.replace(path)
        except (OSError, RuntimeError) as error:
            # torch ends its archive after a write that failed, too, and may then raise that the archive is not whole
            refused = error if isinstance(error, OSError) else error.__context__
            if not isinstance(refused, OSError):
                raise
            # which may not say where
            raise OSError(refused.errno, refused.strerror or str(refused), str(path)) from error
        finally:
            begun.unlink(missing_ok=True)
