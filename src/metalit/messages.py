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
    r"|Option '(?P<option>[^']+)' is not accepted"
)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_KEY = re.compile(r"Parser key \"([^\"]+)\":?")
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
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
    owner = (_CLASS.findall(message) or [None])[-1]
    where = ".".join(_KEY.findall(message))
    unknown = _UNKNOWN.search(message)
    if unknown and owner and unknown["flag"]:
        # an option below a dataclass inside a class: "--train.shts=3"
        unknown = _UNKNOWN.search("Group '{}' does not accept option '{}'".format(*unknown["flag"].rsplit(".", 1)))
    if unknown:
        return _unknown_key(unknown, where, owner, known)
    lines = [_CLASS.sub("", _KEY.sub("", line)).strip(" :") for line in message.splitlines()]
    told = " ".join(line.removeprefix("- ") for line in lines if not _NOISE.match(line) and line.strip("- "))
    no_class = _NO_CLASS.search(told)
    if no_class:
        told = f"there is no class {no_class['name']!r}{_hint(no_class['name'], classes)}"
    told = re.sub(r"[Ee]xpected an? <class '(?:[\w.]*\.)?(\w+)'>", r"expected a value of type \1", told)
    return f"{where}: {told}" if where else told


def _unknown_key(found: re.Match[str], where: str, owner: str | None, known: Iterable[str]) -> str:
    if found["flag"] or found["top"]:
        key = (found["flag"] or found["top"]).replace(".init_args", "")
        known = list(known)
        sections = {name.split(".")[0] for name in known}
        section = key.split(".")[0]
        if section in sections:
            return f"there is no key {key!r}{_hint(key, [name for name in known if name.startswith(section)])}"
        return f"there is no key {section!r}{_hint(section, sections)}"
    key = (found["option"] or found["grouped"]).split(".")[0]
    names = _arguments(owner, None) if owner else []
    if found["group"] and found["group"].split(".")[0] not in names:
        place = f"{where}: " if where else ""
        key = found["group"].split(".")[0]
        return f"{place}{owner.rsplit('.', 1)[-1]} has no key {key!r}{_hint(key, names)} It takes {', '.join(names)}"
    names = _arguments(owner, found["group"]) if owner else []
    group = found["group"] or (owner.rsplit(".", 1)[-1] if owner else "")
    place = f"{where}: " if where else ""
    return f"{place}{group} has no key {key!r}{_hint(key, names)} It takes {', '.join(names)}"


def _hint(name: str, candidates: Iterable[str]) -> str:
    near = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _arguments(class_path: str, group: str | None) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    target = getattr(import_module(module), name)
    if group:
        target = get_type_hints(target.__init__)[group.split(".")[0]]
    return list(inspect.signature(target).parameters)
