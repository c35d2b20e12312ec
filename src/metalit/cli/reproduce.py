"""``metalit reproduce RUN``: a run once more, and whether it ends at the same bits."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metalit.callbacks.record import RECORD, read_record
from metalit.cli.arguments import read_config
from metalit.errors import InputError
from metalit.notices import show

_FACTS = ("versions", "git", "data", "seed", "hardware", "processes", "config")
_PLACES = ("config.ckpt_path", "config.experiment", "config.trainer.default_root_dir")
_RESULT = ("end", "steps", "weights")


def reproduce(args: Sequence[str], fit: Callable[[Sequence[str]], Path | None]) -> bool:
    """Run a run again, in a new folder; returns whether its weights are the same bits.

    Args:
        args: the folder of the run, and options of ``fit`` that change no number, such as
            ``--trainer.default_root_dir``.
        fit: runs the command line, and returns the folder of the run.

    Raises:
        InputError: no such run, or one that has no record of its end.
    """
    folder, options = _asked(args)
    record = _record_of(folder)
    config = folder / "config.yaml"
    parts, steps = _parts_of(record, folder), record["end"]["steps"]
    bounds = []
    trainer = read_config(config).get("trainer")
    if not isinstance(trainer, Mapping) or trainer.get("max_steps") != steps:
        # it was ended by the clock, a callback or a signal
        bounds = [f"--trainer.max_steps={steps}", "--trainer.max_time=null"]
    show(f"running {folder} again, to outer step {steps}")
    again = fit(["fit", f"--config={config}", *_beginning(parts[0]), *bounds, *options])
    found = read_record(again) if again else None
    if again is None or found is None or "end" not in found:
        raise InputError(f"reproduce: the run in {again} has written no {RECORD}; leave out what keeps it from writing")
    same = found["end"]["weights"] == record["end"]["weights"]
    if same:
        show(f"the same: the weights of {again} are those of {folder}, bit for bit, after {steps} outer steps")
        return True
    show(f"NOT the same: the weights of {again} differ from those of {folder}")
    lines = [line for part in parts for name in _FACTS for line in _differences(name, part.get(name), found.get(name))]
    if not lines:
        lines = ["of all that was recorded nothing differs: something else decides, such as the system"]
    for line in dict.fromkeys(lines):
        show(f"  {line}")
    return False


def _asked(args: Sequence[str]) -> tuple[Path, list[str]]:
    if not args or args[0].startswith("-"):
        raise InputError(
            "reproduce: which run? Give its folder, such as metalit reproduce lightning_logs/sine_maml/version_0"
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    given, options = parser.parse_known_args(list(args))
    return given.run, options


def _record_of(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None or not (folder / "config.yaml").is_file():
        raise InputError(
            f"reproduce: {str(folder)!r} holds no {RECORD} and config.yaml of a run; give the folder version_N of one"
        )
    end = record.get("end")
    if not (isinstance(end, Mapping) and all(name in end for name in _RESULT[1:])):
        raise InputError(
            f"reproduce: the run in {str(folder)!r} has not ended, so there is nothing to compare with; go on with it "
            "first: the same command with --ckpt_path last"
        )
    return record


def _parts_of(record: Mapping[str, Any], folder: Path) -> list[Mapping[str, Any]]:
    """The records of a run that was gone on with, the first one first."""
    earlier = record.get("earlier", [])
    parts = [*(earlier if isinstance(earlier, list) else [None]), record]
    steps = record["end"]["steps"]
    if type(steps) is not int or not all(isinstance(part, Mapping) and _begins(part) for part in parts):
        raise InputError(f"reproduce: {str(folder / RECORD)!r} is not what a run writes; give another run")
    return parts


def _begins(part: Mapping[str, Any]) -> bool:
    return type(part.get("from_step")) is int and isinstance(part.get("config"), Mapping)


def _beginning(first: Mapping[str, Any]) -> list[str]:
    """The checkpoint of another run that this one began with, as an option."""
    if not first["from_step"]:
        return []
    begun = str(first["config"].get("ckpt_path"))
    if not Path(begun).is_file():
        raise InputError(
            f"reproduce: the run began with the checkpoint {begun!r}, which is not there; run this where it lies"
        )
    return [f"--ckpt_path={begun}"]


def _differences(name: str, before: Any, after: Any) -> Iterator[str]:
    if name in _PLACES:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(f"{name}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield f"{name}: {before!r} then, {after!r} now"
