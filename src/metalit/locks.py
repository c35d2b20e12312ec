"""A lock on a folder, which dies with the process that holds it."""

import fcntl
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from metalit.errors import InputError


class FolderLock:
    """Keeps a second process from writing into a folder; on a file system without locks, it warns and goes on.

    Args:
        folder: what is locked, by ``flock`` on its file ``.lock``, which says who holds it.

    Raises:
        InputError: another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] = (folder / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.readline().strip() or "another process"
            self._file.close()
            raise InputError(
                f"{folder} is being written by {holder}; wait for its end, stop it, or start a run of its own without "
                "--ckpt_path"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder}: its file system has no locks ({error.strerror}); see to it that no other run goes on there",
                stacklevel=2,
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._file.flush()

    def release(self) -> None:
        """Unlock the folder."""
        # what could not be written is of no use any more
        with suppress(OSError):
            self._file.close()
