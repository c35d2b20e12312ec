"""What the parser says of bad options, in one line that names the option, its value and the nearest right one."""

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import get_type_hints

_UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<flag>[^\s=]+)"
    r"|Subcommand '\w+' does not accept option '(?P<top>[^']+)'"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<grouped>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted(?:\. Got value: Namespace\(class_path='(?P<callable>[^']+)')?"
)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_KEY = re.compile(r"Parser key \"([^\"]+)\":?")
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_DENIED = re.compile(r"Importing '(?P<name>[^']+)' is not allowed, denied by")
_NOISE = re.compile(
    r"^(- )?(Does not validate against|Subtypes:|Errors|Expected a <class 'NoneType'>|Given value|Expected a path but)"
)


def explain(message: str, known: Iterable[str], classes: Iterable[str]) -> str:
    """Turn a message of jsonargparse into one that a person can act on.

    Args:
        message: what the parser said.
        known: the keys that it knows, dotted.
        classes: the short names of classes that configs may name.

    >>> explain("unrecognized arguments: --trainer.max_stps 3", ["trainer.max_steps"], [])
    "there is no key 'trainer.max_stps'; did you mean 'trainer.max_steps'?"
    """
    where = ".".join(_KEY.findall(message))
    unknown = _UNKNOWN.search(message)
    if unknown:
        owner = unknown["callable"] or (_CLASS.findall(message) or [None])[-1]
        found = _no_key_of(owner, unknown) if owner else _no_key(unknown["flag"] or unknown["top"], known)
        return f"{where}: {found}" if where else found
    lines = [_CLASS.sub("", _KEY.sub("", line)).strip(" :") for line in message.splitlines()]
    told = " ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line) and line.strip("- "))
    denied = _DENIED.search(told)
    if denied:
        told = f"a config may not name {denied['name']!r}, which can run or change anything; name a class of your own"
    no_class = _NO_CLASS.search(told)
    if no_class:
        told = f"there is no class {no_class['name']!r}{_hint(no_class['name'], classes)}"
    told = re.sub(r"[Ee]xpected an? <class '(?:[\w.]*\.)?(\w+)'>", r"expected a value of type \1", told)
    return f"{where}: {told}" if where else told


def _no_key(key: str, known: Iterable[str]) -> str:
    key, known = key.replace(".init_args", ""), list(known)
    section, sections = key.split(".")[0], {name.split(".")[0] for name in known}
    if section not in sections:
        return f"there is no key {section!r}{_hint(section, sections)}"
    return f"there is no key {key!r}{_hint(key, [name for name in known if name.startswith(section)])}"


def _no_key_of(owner: str, unknown: re.Match[str]) -> str:
    """The key may lie below one of the owner's arguments that is a group, such as ``train.shts`` of a DataModule."""
    path = ".".join(filter(None, (unknown["group"], unknown["flag"] or unknown["grouped"] or unknown["option"])))
    first, *rest = path.split(".")
    names, holder = _arguments(owner, None), owner.rsplit(".", 1)[-1]
    if first in names and rest:
        names, holder, first = _arguments(owner, first), first, rest[0]
    return f"{holder} has no key {first!r}{_hint(first, names)} It takes {', '.join(names)}"


def _hint(name: str, candidates: Iterable[str]) -> str:
    near = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _arguments(class_path: str, group: str | None) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    target = getattr(import_module(module), name)
    if group:
        target = get_type_hints(target.__init__)[group]
    return list(inspect.signature(target).parameters)
