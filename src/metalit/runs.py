"""Where runs lie on disk, ``<root>/<experiment>/version_N/``, and the checkpoints in them."""

from pathlib import Path

from metalit.errors import InputError


def version_folder(checkpoint: Path, experiment: Path) -> str | None:
    """The name ``version_N`` of the run that a checkpoint belongs to, if it is one of this experiment's."""
    folder = checkpoint.resolve().parent.parent
    return folder.name if folder.parent == experiment.resolve() and folder.name.startswith("version_") else None


def find_checkpoint(name: str, experiment: Path) -> Path:
    """Return the checkpoint that a user means.

    Args:
        name: ``last`` or ``best`` for the newest version of the experiment that has one; else a path.
        experiment: the folder of the experiment.

    Raises:
        InputError: there is none.
    """
    if name not in ("last", "best"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"ckpt_path={name!r}: there is no such file (looked in {Path.cwd()}); or say best or last")
        return path
    versions = _versions(name, experiment)
    if not versions:
        raise InputError(
            f"ckpt_path={name}: no version in {str(experiment)!r} has a {name}.ckpt; train one first: metalit fit"
        )
    return versions[max(versions)]


def has_checkpoint(name: str, experiment: Path) -> bool:
    """Whether any version of an experiment has a checkpoint of this name."""
    return bool(_versions(name, experiment))


def _versions(name: str, experiment: Path) -> dict[int, Path]:
    # by number: a folder that the user renamed, such as version_3_old, is no version any more
    return {
        int(folder.name.removeprefix("version_")): folder / "checkpoints" / f"{name}.ckpt"
        for folder in experiment.glob("version_*")
        if folder.name.removeprefix("version_").isdigit() and (folder / "checkpoints" / f"{name}.ckpt").is_file()
    }
