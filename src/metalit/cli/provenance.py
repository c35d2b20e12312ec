"""Where a checkpoint comes from: the configuration it was trained with, beside the one that it is used with now."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from lightning.pytorch.plugins.environments import SLURMEnvironment

from metalit.errors import InputError
from metalit.private_lightning import CLASS_PATH
from metalit.runs import find_checkpoint

Stage = Literal["fit", "validate", "test", "predict"]
Weight: TypeAlias = Literal["refused", "mentioned", "nothing"]

# how the same numbers are found, not which
_HOW = {
    *("compile", "compile_seconds", "fused_steps", "tasks_per_chunk", "rows_per_chunk"),
    *("predict_file", "predict_folder", "predict_one_task"),
}
# the learner itself compares them with what it takes over (metalit.checks.resuming)
_TAKEN_OVER = {"optimizer", "scheduler", "lr_by_name", "clip_norm"}
_TRAINING = {"perturbation", "draws", "train", "batch_size"}


class Difference(NamedTuple):
    """A key of the configuration: what the checkpoint was trained with, and what is configured now."""

    key: str
    trained: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}={self.now!r}, and the checkpoint was trained with {self.trained!r}"


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare two configurations, key by key; where a class is another, not its arguments too.

    Args:
        kept: plain values by section, as checkpoints keep them; a section that was not kept is not compared, nor an
            argument that a class did not have then.
        now: likewise, as the command line has built them.
    """
    for section, values in kept.items():
        yield from _differences(section, values, now.get(section))


def _differences(key: str, before: Any, after: Any) -> Iterator[Difference]:
    (had, given), (has, present) = _object(before), _object(after)
    if had != has:
        yield Difference(key, had or before, has or after)
    elif had:
        for name in (name for name in given if name in present):
            yield from _differences(f"{key}.{name}", given[name], present[name])
    elif isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in {**before, **after}:
            yield from _differences(f"{key}.{name}", before.get(name), after.get(name))
    elif _plain(before) != _plain(after):
        yield Difference(key, before, after)


def _object(value: Any) -> tuple["_Class | None", Mapping[str, Any]]:
    """The class and the arguments that a value stands for, if it stands for an object."""
    if not isinstance(value, Mapping) or not value.keys() & {"class_path", CLASS_PATH}:
        return None, {}
    if "class_path" in value:
        parts = (value.get("init_args"), value.get("dict_kwargs"))  # as a checkpoint holds them: of any kind
        given = {name: part for some in parts if isinstance(some, Mapping) for name, part in some.items()}
        return _Class(value["class_path"]), given
    return _Class(value[CLASS_PATH]), {name: part for name, part in value.items() if str(name)[:1] != "_"}


class _Class(str):
    """The name of a class, shown as its last part."""

    __slots__ = ()

    def __repr__(self) -> str:
        return self.rsplit(".", 1)[-1]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def weight(difference: Difference, stage: Stage) -> Weight:
    """Whether a difference changes the answer of a subcommand: it is refused, mentioned, or nothing."""
    section, *rest = difference.key.split(".")
    first = rest[0] if rest else ""
    if first in _HOW or (section == "model" and first in _TAKEN_OVER):
        return "nothing"
    if difference == ("model.eval_steps", 10, "auto"):
        return "nothing"  # the default, before it had a name
    if first in _TRAINING:
        return "refused" if stage == "fit" else "nothing" if stage == "predict" else "mentioned"
    if (section, first, stage) == ("model", "eval_steps", "predict"):
        return "mentioned"  # it takes the number that validation found best
    return "refused" if section == "model" else _weight_of_data(rest, difference, stage)


def _weight_of_data(rest: Sequence[str], difference: Difference, stage: Stage) -> Weight:
    first, last = (rest[0], rest[-1]) if rest else ("", "")
    moved = Path(str(difference.trained)).name == Path(str(difference.now)).name
    if last == "file" and (moved or stage == "predict"):
        return "mentioned"  # what it holds is compared elsewhere, by its scaling
    if stage == "predict":
        return "refused" if first in ("tasks", "") else "nothing"
    if first in ("val", "test") and len(rest) > 1:
        if first != {"validate": "val", "test": "test"}.get(stage):
            return "mentioned" if stage == "fit" else "nothing"
        return "mentioned" if last == "tasks" else "refused"
    return "refused"


def check(
    owner: str, kept: Mapping[str, Any], now: Mapping[str, Any], stage: Stage, args: Sequence[str]
) -> Iterator[str]:
    """Compare what a checkpoint was trained with and what is configured now.

    Args:
        owner: the checkpoint, for messages.
        kept, now: see :func:`differences`.
        stage: the subcommand.
        args: the command line; what is named there is on purpose.

    Yields:
        A line for each difference that is mentioned.

    Raises:
        InputError: some change the answer, and were not asked for.
    """
    refused = []
    try:
        found = list(differences(kept, now))
    except RecursionError:
        raise InputError(f"{owner}: its configuration is nested too deeply to be one; use another checkpoint") from None
    for each in found:
        matters = weight(each, stage)
        if matters == "refused" and not on_purpose(each.key, args):
            refused.append(each)
        elif matters != "nothing":
            yield str(each)
    if refused:
        yield from map(str, refused[1:])
        first = refused[0]
        more = f" ({len(refused) - 1} more above)" if len(refused) > 1 else ""
        way = "give the run's own config.yaml" if stage == "fit" else "leave --config out, which takes the run's own"
        was, is_now = (f"--{first.key}={'null' if value is None else value}" for value in first[1:])
        raise InputError(
            f"{owner}: {first}{more}; {way}, or say which on the command line: {was} as trained, {is_now} on purpose"
        )


def check_left_over(root: str | None) -> None:
    """Check that Lightning, on SLURM, will not go on from a checkpoint that nobody has named.

    Raises:
        InputError: there is one in the folder where it looks.
    """
    left = sorted(Path(root or ".").glob("hpc_ckpt_*.ckpt")) if SLURMEnvironment.detect() else []
    if left:
        raise InputError(
            f"trainer.default_root_dir: Lightning would go on from {str(left[-1])!r} by itself, as this is a job of "
            "SLURM; move it away, or name it with --ckpt_path"
        )


def on_purpose(key: str, args: Sequence[str]) -> bool:
    """Whether a command line names a key, or a group that holds it."""
    return any(key == name or (key.startswith(f"{name}.") and "." in name) for name in given_keys(args))


def given_keys(args: Sequence[str]) -> set[str]:
    """The keys that are given on a command line, as users write them.

    >>> sorted(given_keys(["test", "--model.init_args.eval_steps=3", "--data.tasks.class_path", "Sine", "--seed", "1"]))
    ['data.tasks', 'model.eval_steps', 'seed']
    """
    names = (arg[2:].split("=", 1)[0].rstrip("+") for arg in args if arg.startswith("--"))
    return {re.sub(r"\.(init_args|dict_kwargs)(?=\.)|\.class_path$", "", name) for name in names}


def run_of(config: str | None) -> Path | None:
    """The folder of the run that a configuration file is of: it lies beside ``checkpoints/``."""
    if not config:
        return None
    folder = Path(config).resolve().parent
    ours = re.fullmatch(r"config(_\w+)?\.yaml", Path(config).name) and (folder / "checkpoints").is_dir()
    return folder if ours else None


def named_configs(args: Sequence[str]) -> list[str]:
    """The configuration files that a command line names."""
    return _options(args).config


def with_own_config(args: Sequence[str]) -> list[str]:
    """The command line; if it evaluates or predicts and names no configuration, with that of the checkpoint's run.

    Raises:
        InputError: no checkpoint is named either, or its run has no configuration.
    """
    options = _options(args)
    if not args or args[0] not in ("validate", "test", "predict") or options.config:
        return list(args)
    if any(arg in ("-h", "--help") or arg.startswith(("--help=", "--print_")) for arg in args):
        return list(args)
    name = {"auto": "last", None: "best"}.get(options.ckpt_path, options.ckpt_path)
    if name in ("best", "last") and options.experiment is None:
        raise InputError(
            f"{args[0]}: of which run? Give --ckpt_path FILE, or --experiment NAME, which is a folder in "
            f"{str(_logs(options))!r}, or --config FILE"
        )
    checkpoint = find_checkpoint(name, _logs(options) / str(options.experiment))
    config = checkpoint.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise InputError(f"{args[0]}: there is no config.yaml in the run of {str(checkpoint)!r}; give --config FILE")
    return [args[0], "--config", str(config), *args[1:], "--ckpt_path", str(checkpoint)]


def _logs(options: argparse.Namespace) -> Path:
    return Path(options.root or ".") / "lightning_logs"


def _options(args: Sequence[str]) -> argparse.Namespace:
    # the parsed configuration no longer knows which files it came from
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--ckpt_path")
    parser.add_argument("--experiment")
    parser.add_argument("--trainer.default_root_dir", dest="root")
    return parser.parse_known_args(list(args))[0]
