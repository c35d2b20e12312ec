"""Explains the parser's errors in one line that names the option, its value and the nearest right one."""

import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from traceback import walk_tb
from typing import NamedTuple, get_type_hints

from metalit.cli.memory import asked_for, lacks_memory
from metalit.errors import InputError

_UNKNOWN = re.compile(
    r"unrecognized arguments: --(?P<flag>[^\s=]+)"
    r"|Subcommand '\w+' does not accept option '(?P<top>[^']+)'"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<grouped>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted(?:\. Got value: Namespace\(class_path='(?P<callable>[^']+)')?"
)
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_NESTED = re.compile(r"Given value: NestedArg\(key='(?P<key>[^']+)'")
_BASE = re.compile(
    r"OuterLearner is abstract|given class_path '[\w.]*LightningDataModule'"
)  # of what no config has named
_KEY = re.compile(r"Parser key \"([^\"]+)\":?")
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_DENIED = re.compile(r"Importing '(?P<name>[^']+)' is not allowed, denied by")
_NO_GROUP = re.compile(r"Unable to load config '(?P<value>[^\n]*)'$", re.MULTILINE)
_CALLABLE = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: ")
_TYPE = re.compile(r"Expected an? <class '(?:[\w.]*\.)?(?P<type>\w+)'>(?:\. Got value: (?P<value>.*))?$")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(?P<values>.*)\](?:\. Got value: (?P<value>.*))?$")
_BOUND = re.compile(r"Not of type \w+: does not conform to restriction v(?P<bound>[<>=]+)(?P<least>\S+)")
_VALUE = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val=)?(?P<value>.*?)\)?$", re.MULTILINE)
_NO_SUBCLASS = re.compile(r"Not a valid subclass of (?P<family>\w+)(?:\. Got value: (?P<value>.*))?$")
_SPEC = re.compile(r"\. Got value: Namespace\(.*$")
_REQUIRED = "the following arguments are required: "
_NOISE = re.compile(
    r"(Does not validate against|Subtypes:|Errors|Expected a <class 'NoneType'>|Given value|Expected a path but"
    r"|Subclass types expect one of|a class path \(str\)|a dict with(out)? )"
)
_WORDS = {"int": "a whole number", "float": "a number", "Sequence": "a list"}
_NO_KEYS = re.compile(r"'\w+' object has no attribute 'keys'")
_LONGEST = 400  # characters of an explanation


class Explanation(NamedTuple):
    """What is wrong, and with which option: its dotted key, as on the command line, or nothing."""

    key: str
    text: str

    def __str__(self) -> str:
        text = self.text if len(self.text) <= _LONGEST else f"{self.text[:_LONGEST]} …"
        return f"{self.key}: {text}" if self.key and self.key not in text else text


def explain(message: str, keys: Iterable[str], classes: Iterable[str]) -> Explanation:
    """Turn a message of jsonargparse into one that a person can act on.

    Args:
        message: what the parser said.
        keys: all keys that there are, dotted.
        classes: the short names of classes that configs may name.

    >>> print(explain("unrecognized arguments: --trainer.max_stps 3", ["trainer.max_steps"], []))
    there is no key 'trainer.max_stps'; did you mean 'trainer.max_steps'?
    """
    message = message.replace("${oc.decode:null}", "null")  # what null was turned into (metalit.cli.arguments)
    where = _path(message)
    nested = _NESTED.search(message)
    if nested and _BASE.search(message):
        key = f"{where}.{nested['key']}"
        return Explanation(key, f"{key}: there is no config yet in which to set it; add --config configs/NAME.yaml")
    unknown = _UNKNOWN.search(message)
    owner = unknown and (unknown["callable"] or (_CLASS.findall(message) or [None])[-1])
    if unknown and owner and _has_arguments(owner):
        text = _no_key_of(owner, unknown)
        return Explanation(where, f"{where}: {text}" if where else text)
    if unknown and not where:
        group = f"{unknown['group']}.{unknown['grouped']}" if unknown["group"] else None
        key = (unknown["flag"] or unknown["top"] or group or unknown["option"]).replace(".init_args", "")
        return Explanation(key, _no_key(key, keys))
    no_group = _NO_GROUP.search(message)
    if no_group:
        return Explanation(where, f"{where}={no_group['value']} must be a group of settings, such as {{name: value}}")
    lines = [_CALLABLE.sub("", line).lstrip(" -") for line in message.splitlines()]
    lines = [_SPEC.sub("", _KEY.sub("", _CLASS.sub("", line)).strip(" :")) for line in lines]
    value = _VALUE.search(message)
    reason = _reason([line for line in lines if line and not _NOISE.match(line)], value["value"] if value else None)
    denied = _DENIED.search(message)
    if denied:
        reason = f"a config may not name {denied['name']!r}, which can run or change anything; name a class of your own"
    no_class = _NO_CLASS.search(reason)
    if no_class:
        kinds = [kind["type"] for kind in map(_TYPE.match, lines) if kind]
        other = f"expected {' or '.join([*_words(kinds), 'a class'])}, and " if _words(kinds) else ""
        name, known = no_class["name"], set(classes)
        wrong = f"{name!r} is none of those that go here" if name in known else f"there is no class {name!r}"
        reason = f"{other}{wrong}{'' if name in known else _hint(name, known)}"
    if _NO_KEYS.search(reason):
        reason = "expected a class, by its name or as {class_path: …, init_args: {…}}"
    return Explanation(where, reason)


def _path(message: str) -> str:
    """The keys above one another, of the first branch that goes deepest."""
    deepest: list[str] = []
    above: list[tuple[int, str]] = []
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip(" -"))
        for key in _KEY.findall(line):
            above = [(depth, name) for depth, name in above if depth < indent]
            if not above or above[-1][1] != key:
                above.append((indent, key))
            if len(above) > len(deepest):
                deepest = [name for _, name in above]
    return ".".join(deepest)


def _reason(lines: Sequence[str], value: str | None) -> str:
    """What is wrong; the alternatives of a value are joined to one message."""
    types, choices, families, others = [], [], [], []
    for line in dict.fromkeys(lines):
        kind, literal, no_subclass = _TYPE.match(line), _LITERAL.match(line), _NO_SUBCLASS.match(line)
        if kind:
            types.append(kind["type"])
            value = kind["value"] or value
        elif literal:
            choices.append(literal["values"])
            value = literal["value"] or value
        elif no_subclass:
            families.append(no_subclass["family"])
        elif line.startswith(_REQUIRED):
            others.append(_required(line.removeprefix(_REQUIRED)))
        else:
            bound = _BOUND.match(line)
            others.append(f"{value} must be {bound['bound']} {bound['least']}" if bound else line)
    if others:
        return " ".join(others)
    if choices:
        return f"{value!r} is none of {', '.join([*choices, *_words(types)])}"
    got = "" if value is None or value.startswith("Namespace(") else f". Got value: {value}"
    return f"expected a value of type {' or '.join(dict.fromkeys(types or families))}{got}"


def _words(types: Iterable[str]) -> list[str]:
    """What may stand beside a class or a choice."""
    return [_WORDS[kind] for kind in dict.fromkeys(types) if kind in _WORDS]


def _required(names: str) -> str:
    section, _, name = names.partition(".")
    if name == "model":
        return f"there is no learner: give a config, metalit {section} --config configs/NAME.yaml"
    return f"{_REQUIRED}{names}"


def _no_key(key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    section, sections = key.split(".", maxsplit=1)[0], {name.split(".")[0] for name in keys}
    if section not in sections:
        return f"there is no key {section!r}{_hint(section, sections)}"
    return f"there is no key {key!r}{_hint(key, [name for name in keys if name.startswith(section)])}"


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


def _has_arguments(class_path: str) -> bool:
    try:
        return bool(_arguments(class_path, None))
    except ValueError:  # a builtin, such as Tensor among the types of a learning rate
        return False


def _arguments(class_path: str, group: str | None) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    target = getattr(import_module(module), name)
    if group:
        target = get_type_hints(target.__init__)[group]
    return list(inspect.signature(target).parameters)


def failed_constructor(error: BaseException) -> InputError:
    """Why a class that a config names could not be built: an input error as it was raised, or the first cause."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, InputError):
            return cause
    cause = chain[-1]
    frames = [frame for frame, _ in walk_tb(cause.__traceback__) if frame.f_code.co_name == "__init__"]
    owner = f"{type(frames[0].f_locals.get('self')).__name__}: " if frames else ""
    if lacks_memory(cause):
        return InputError(f"{owner}it cannot be built: {asked_for(cause)}; make it smaller")
    lines = str(cause).splitlines() or [""]
    kind = "" if isinstance(cause, ValueError | TypeError) else f"{type(cause).__name__}: "
    return InputError(f"{owner}it cannot be built: {kind}{lines[0]}")
