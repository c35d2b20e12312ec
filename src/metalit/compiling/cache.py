"""Where compiled programs are kept: a folder that nobody else can write to."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_torchs: list[str] = []
_fresh: list[tempfile.TemporaryDirectory[str]] = []  # they are removed when Python ends


def keep_private(tell: Callable[[str], None]) -> Path:
    """Let torch keep what it compiles in a folder of this user's own; called before anything is compiled.

    It is ``$TORCHINDUCTOR_CACHE_DIR`` if that is set, else ``metalit/inductor`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    torch's own default lies among the temporary files, under a name that anybody can take first, and what is found in
    it is loaded and run.

    Args:
        tell: what takes a line where that folder is not private or cannot be written; then it is a new one, for this
            process alone.

    Raises:
        OSError: not even a new folder can be made.
    """
    # late: they are slow to import
    from torch._inductor import codecache
    from torch._inductor.runtime import cache_dir_utils, runtime_utils

    _torchs.append(cache_dir_utils.default_cache_dir())  # the first is torch's own; after that it is ours
    folder = _folder(_torchs[0], tell)
    os.environ[_VARIABLE] = str(folder)
    # precompiled headers lie in the default, whatever the variable says
    modules: tuple[Any, ...] = (cache_dir_utils, runtime_utils, codecache)
    for module in modules:
        module.default_cache_dir = lambda: str(folder)
    codecache._HEADER_DIR = str(folder / "precompiled_headers")
    codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers/locks")
    return folder


def _folder(torchs: str, tell: Callable[[str], None]) -> Path:
    given = os.environ.get(_VARIABLE)
    try:
        if given and Path(given) != Path(torchs):  # torch sets it to its own default by itself
            return _private(Path(given).absolute(), 0o002)
        root = os.environ.get("XDG_CACHE_HOME")
        base = Path(root) if root and Path(root).is_absolute() else Path.home() / ".cache"
        return _private(_private(base / "metalit", 0o022) / "inductor", 0o022)
    except (OSError, RuntimeError) as cause:  # RuntimeError: there is no home
        _fresh.append(tempfile.TemporaryDirectory(prefix="metalit_", ignore_cleanup_errors=True))
        tell(f"compiled programs are kept for this process alone: {cause}; set {_VARIABLE} to a folder of your own")
        return Path(_fresh[-1].name)


def _private(folder: Path, others: int) -> Path:
    """The folder, made if need be; an error if it is another user's, or has one of the permissions ``others``."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & others):
        raise PermissionError(
            f"{folder} is writable by other users ({stat.filemode(status.st_mode)}, of user {status.st_uid})"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder
