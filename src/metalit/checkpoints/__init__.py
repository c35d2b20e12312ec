"""Checkpoints: files that are read whole or not at all, and the objects that are built again from them."""

from metalit.checkpoints.files import CheckedCheckpointIO, read_checkpoint
from metalit.checkpoints.loading import LoadedSafely

__all__ = ["CheckedCheckpointIO", "LoadedSafely", "read_checkpoint"]
