"""What the file system refuses, in one line: what, where, and the way out."""

import errno

_LONGEST = 200  # letters of a path in a message
_WAYS = {
    errno.ENOSPC: "free some space; a run goes on from its last checkpoint with --ckpt_path last",
    errno.EDQUOT: "free some of your quota; a run goes on from its last checkpoint with --ckpt_path last",
    errno.EROFS: "use a folder that can be written (--trainer.default_root_dir; for predict, a copy of the file there)",
    errno.ENOENT: "see that nobody removes the folder while it is used",
    errno.ENOTDIR: "a file is in place of a folder: move it, or use another --trainer.default_root_dir",
    errno.ENAMETOOLONG: "use a shorter name or path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_WAYS |= dict.fromkeys((errno.EACCES, errno.EPERM), _WAYS[errno.EROFS])
_WAYS |= dict.fromkeys((errno.EEXIST, errno.EISDIR), _WAYS[errno.ENOTDIR])


def explain(error: OSError) -> str:
    """What was refused, where, and the way out, in one line.

    >>> explain(OSError(errno.ENAMETOOLONG, "File name too long", "aaa"))
    'aaa: File name too long; use a shorter name or path'
    """
    where = str(error.filename or "")
    where = where if len(where) <= _LONGEST else f"{where[:_LONGEST]}…"
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    way = _WAYS.get(error.errno or 0)
    return "; ".join(filter(None, [f"{where}: {reason}" if where else reason, way]))
