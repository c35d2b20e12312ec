"""What the user typed, before the parser reads it: files that can be read, and null where the parser loses it."""

import os
from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib import import_module
from inspect import isclass, signature
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from jsonargparse import Namespace
from omegaconf import OmegaConf

from metalit.cli.provenance import named_configs
from metalit.errors import InputError
from metalit.notices import warn

# jsonargparse turns null two classes deep into the text 'None'; this becomes null once all is put together
_NULL = "${oc.decode:null}"
_THREADS = 256  # more may end the process where a machine has few CPUs
_PROCESSES = 16  # each takes half a gigabyte
_NODES = 10_000  # more than any cluster has
_MOST = 2**31  # of anything that is counted but for steps of training: no memory or lifetime holds more
_SEEDS = ("seed", "split_seed")
# beyond these a run may be meant, and is likely to take for ever
_LARGE = {
    **{"eval_steps": 10_000, "steps": 10_000, "draws": 10_000, "iterations": 10_000, "terms": 10_000},
    **{"tasks": 10**5, "shots": 10**5, "queries": 10**6, "ways": 10**4, "batch_size": 10**7, "faces": 10**4},
    **{"rows": 10**5, "columns": 10**5, "noise_columns": 10**5, "fused_steps": 10**5, "rank": 10_000, "depth": 1000},
    **{"width": 10_000, "sizes": 10**5, "context": 10**6, "size": 10_000, "inputs": 10**6, "outputs": 10**6},
}


def prepared(args: Sequence[str]) -> list[str]:
    """The arguments, changed so that the parser reads them as they are meant.

    Raises:
        InputError: a config file that is no YAML mapping in UTF-8, or has a key twice; a value that is nested too
            deeply.

    >>> prepared(["fit", "--model.problem.loss=null", "--ckpt_path", "null"])
    ['fit', '--model.problem.loss=${oc.decode:null}', '--ckpt_path', 'null']
    """
    for file in map(Path, named_configs(args)):
        if _is_file(file):  # the parser explains a missing one
            read_config(file)
    found, below = [], False
    for argument in args:
        name, is_one, value = argument.partition("=")
        if name.startswith("--"):
            below = name.replace(".init_args", "").count(".") > 1
            found.append(f"{name}={_with_nulls(value)}" if below and is_one else argument)
        else:
            found.append(_with_nulls(argument) if below else argument)
            below = False
    return found


def _with_nulls(text: str) -> str:
    try:
        value = yaml.safe_load(text) if text else text
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise InputError(f"{text[:40]} … is nested too deeply to be a value") from None
    kept = _marked(value)
    if kept == value:
        return text
    return kept if isinstance(kept, str) else yaml.safe_dump(kept, default_flow_style=True, width=10**6).strip()


def _marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return _NULL if value is None else value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def read_config(file: Path) -> dict[str, Any]:
    """The settings of a config file.

    Raises:
        InputError: it is no YAML mapping in UTF-8, is empty, is nested too deeply, or has a key twice.
    """
    owner = f"config={str(file)!r}"
    try:
        text = file.read_text(encoding="utf-8-sig")
        config = yaml.safe_load(text)
        if not config:
            raise InputError(f"{owner} is empty; name a config that has settings, such as configs/sine_maml.yaml")
        if not isinstance(config, dict):
            raise InputError(f"{owner} must be a mapping, with lines such as 'trainer: {{max_steps: 1000}}'")
        OmegaConf.create(text)  # it alone minds a key that stands twice
    except UnicodeDecodeError:
        raise InputError(f"{owner} is no text in UTF-8; save it in that encoding") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{owner}{line}: {' '.join(problem.split())}") from None
    except RecursionError:
        raise InputError(f"{owner} is nested too deeply to be a config") from None
    return config


def file_without_settings(key: str, args: Sequence[str]) -> str | None:
    """The file that was typed for a dotted key, if it is one, and none that holds settings.

    >>> file_without_settings("model.problem", ["fit", "--model.problem=nowhere.csv"])
    """
    words = [word for argument in args for word in argument.split("=", maxsplit=1)]
    for name, value in pairwise(words):
        if name == f"--{key}" and _is_file(Path(value)):
            try:
                read_config(Path(value))
            except InputError:
                return value
    return None


def origin(key: str, args: Sequence[str]) -> str:
    """Where a dotted key was last set, for the end of a message; empty for one that was typed."""
    if any(argument.split("=")[0].rstrip("+").startswith(f"--{key}") for argument in args):
        return ""
    named, path = map(Path, reversed(named_configs(args))), key.split(".")
    files = [file for file in named if _is_file(file) and _has(read_config(file), path)]
    return f" (in {files[0]})" if files else ""


def _has(tree: Any, path: Sequence[str]) -> bool:
    if not path:
        return True
    if isinstance(tree, list):
        return any(_has(item, path) for item in tree)
    if not isinstance(tree, dict):
        return False
    first, *rest = path
    return (first in tree and _has(tree[first], rest)) or ("init_args" in tree and _has(tree["init_args"], path))


def check_values(config: Namespace) -> None:
    """Check what the parser lets pass: numbers that no tensor or machine takes, and null for any type.

    Raises:
        InputError: a seed out of range, far more threads, processes or nodes than there can be, a number of more than
            64 bits or of more than any machine can take, null where there must be a value.
    """
    for section in ("model", "data", "trainer"):
        _check(section, config.get(section))
    seed, threads, cpus = config.seed_everything, config.threads, os.cpu_count() or 1
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise InputError(f"seed_everything={seed} must be a whole number from 0 to {2**32 - 1}")
    if threads is not None and threads > max(_THREADS, 4 * cpus):
        raise InputError(f"threads={threads}: this machine has {cpus} CPU(s); more threads than that are of no use")
    devices = str(config.trainer.devices)
    if devices.isdecimal() and int(devices) > max(_PROCESSES, 4 * cpus):
        raise InputError(f"trainer.devices={devices}: so many processes are too many for the {cpus} CPU(s) here")
    if config.trainer.num_nodes > _NODES:
        raise InputError(f"trainer.num_nodes={config.trainer.num_nodes}: no cluster has so many machines")


def _check(key: str, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check(key, item)
    elif isinstance(value, Namespace):
        if "class_path" in value:
            class_path, value = value.class_path, value.get("init_args") or Namespace()
            _check_arguments(key, class_path, value)
        for name, item in vars(value).items():
            _check(f"{key}.{name}", item)
    elif isinstance(value, int) and not isinstance(value, bool):
        _check_count(key, value)


def _check_count(key: str, value: int) -> None:
    section, _, name = key.split(".", maxsplit=1)[0], *key.rpartition(".")[1:]
    if abs(value) >= 2**63:
        raise InputError(f"{key}={value} must be a whole number below 2⁶³")
    if section == "trainer" or name in _SEEDS:
        return
    if value >= _MOST:
        raise InputError(f"{key}={value} is more than any machine can take; give a smaller number")
    if value > _LARGE.get(name, value):
        warn(f"{key}={value} is a very large number, and may take very long; is it meant?")


def _check_arguments(key: str, class_path: str, arguments: Namespace) -> None:
    module, _, owner = class_path.rpartition(".")
    making: Any = getattr(import_module(module), owner)
    try:
        parameters = signature(making).parameters
        hints = get_type_hints(making.__init__ if isclass(making) else making)
    except (NameError, TypeError, ValueError):  # a user's class whose types cannot be resolved, or a builtin
        return
    for name, given in vars(arguments).items():
        hint: Any = hints.get(name, Any)
        if given is None and name in parameters and parameters[name].default is not None and not _admits_none(hint):
            raise InputError(f"{key}.{name}=null: {owner} needs a value there; leave it out for its default")
        # what an earlier config gave to another class under this name
        if is_dataclass(hint) and not isinstance(given, Namespace | hint):
            first = next(iter(signature(cast(type, hint)).parameters))
            raise InputError(
                f"{key}.{name}={given}: {owner} takes a group of settings there, such as "
                f"{{{first}: …}}; give it anew where {key} was of another class before"
            )


def _admits_none(hint: Any) -> bool:
    return hint is Any or hint is type(None) or any(_admits_none(part) for part in get_args(hint))
