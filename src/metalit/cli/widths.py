"""Numbers of networks that a configuration leaves to its data: ``sizes: [auto, 40, 40, auto]``, ``channels: auto``."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from jsonargparse import ArgumentParser, Namespace

from metalit.data import RowSource, TaskDistribution
from metalit.data.base import WAYS, Split
from metalit.errors import InputError

_AUTO = "auto"
_FEW_SHOT = "metalit.problems.FewShot"
_OF = {  # what is left to the data, and what of the data says it
    "inputs": "columns of x",
    "outputs": "columns of y",
    "channels": "images",
    "size": "images",
    "ways": "classes",
}


class _Width(NamedTuple):
    """A place of the configuration that says ``auto``, and for what."""

    path: str
    holder: Any
    key: Any
    what: str


def fill_widths(config: Namespace) -> None:
    """Put numbers in place of every ``auto`` below ``model``: those that ``data`` has.

    Inputs are the columns of x, a category counting once for each level, those of a table with its noise, or the
    pixels of an image in all its channels; outputs are the columns of y, or the classes of a table or of a task.
    ``channels``, ``size`` and ``ways`` are those of images and of tasks of classes.

    Raises:
        InputError: the data has no columns, no images or no classes; numbers that are not those of a table of curves;
            splits of different ways, or a network of features, where it has an output for each class; what its table or
            tasks raise.
    """
    places = list(_places(config.get("model"), "model"))
    _check_ways(config, [place for place in places if place.what == "ways"])
    if places:
        numbers = _numbers(config.get("data"), places[0].path)
        for place in places:
            if place.what not in numbers:
                raise InputError(
                    f"{place.path}: 'auto' follows the {_OF[place.what]} of data.tasks, and there are none; give a "
                    "number, or other tasks"
                )
            place.holder[place.key] = numbers[place.what]
    _check_head(config)
    _check(config)


def _check_head(config: Namespace) -> None:
    """A network that ends in features has no output for each class."""
    network = config.get("model.init_args.problem.init_args.network")
    few_shot = _is(config.get("model.init_args.problem"), _FEW_SHOT)
    if few_shot and _is(network, "metalit.networks.Conv4") and network["init_args"].get("ways") is None:
        raise InputError(
            "model.problem.network.ways=null: FewShot needs a network with an output for each class; write 'auto', or "
            "use a problem that makes its own head of features, such as Prototypes or ProtoMAML"
        )


def _check(config: Namespace) -> None:
    """The data's columns are all inputs and outputs of an MLP: other widths are an error before it is built."""
    network = config.get("model.init_args.problem.init_args.network")
    tasks = config.get("data.init_args.tasks")
    if not (_is(network, "metalit.networks.MLP") and _is(tasks, "metalit.data.Curves")):
        return
    sizes = network["init_args"]["sizes"]
    curves = _made(TaskDistribution, tasks)
    answers = _is(config.get("model.init_args.problem"), _FEW_SHOT)  # elsewhere they are features
    right = [len(curves.inputs), *sizes[1:-1], len(curves.columns.y) if answers else sizes[-1]]
    if list(sizes) != right:
        raise InputError(
            f"model.problem.network.sizes={list(sizes)}, but the data has {right[0]} input(s) {curves.inputs} and "
            f"{right[-1]} output(s) {list(curves.columns.y)}; give {right}, or write 'auto' for the first and the last"
        )


def _check_ways(config: Namespace, places: list[_Width]) -> None:
    """A network that has an output for each class of a task cannot meet tasks of other numbers of them."""
    given = config.get("data.init_args") or Namespace()
    ways = _ways(given) if given.get("tasks") else {}
    if len(set(ways.values())) > 1 and (places or _is(config.get("model.init_args.problem"), _FEW_SHOT)):
        told = ", ".join(f"data.{split}.ways={number}" for split, number in ways.items())
        raise InputError(
            f"{told}: the network has one output for each class of a task, so these must be equal; or use a problem "
            "that takes any number of classes, such as Prototypes"
        )


def _ways(given: Namespace) -> dict[str, int]:
    """The classes of a task of each split."""
    return {split: (given.get(split) or Namespace()).get("ways") or WAYS for split in get_args(Split)}


def _is(given: Any, class_path: str) -> bool:
    return isinstance(given, Namespace) and given.get("class_path") == class_path


def _places(node: Any, path: str) -> Iterator[_Width]:
    if isinstance(node, list):
        for position, member in enumerate(node):
            yield from _places(member, f"{path}.{position}")
    if not isinstance(node, Namespace | dict):
        return
    members = vars(node) if isinstance(node, Namespace) else node
    for key, value in list(members.items()):
        below = f"{path}.{key}".replace(".init_args", "")
        if key == "sizes" and isinstance(value, list) and _AUTO in value:
            ends = {0: "inputs", -1: "outputs"}
            yield from (_Width(below, value, at, what) for at, what in ends.items() if value[at] == _AUTO)
        elif value == _AUTO and (key in _OF or key == "features"):
            yield _Width(below, members, key, "inputs" if key == "features" else key)
        else:
            yield from _places(value, below)


def _numbers(data: Any, path: str) -> dict[str, Any]:
    """What there is, by what it is the number of."""
    given = (data or Namespace()).get("init_args") or Namespace()
    if isinstance(given.get("tasks"), Namespace):
        tasks = _made(TaskDistribution, given["tasks"])
        shape = list(tasks.input_shape())
        images = {"channels": shape[0], "size": shape[1:]} if len(shape) == 3 else {}
        if not tasks.of_classes:
            return {"inputs": math.prod(shape), "outputs": len(tasks.columns.y), **images}
        ways = _ways(given)["train"]
        return {"inputs": math.prod(shape), "outputs": ways, "ways": ways, **images}
    if isinstance(given.get("rows"), Namespace):
        rows = _made(RowSource, given["rows"]).read()
        return {"inputs": len(rows.columns) + (given.get("noise_columns") or 0), "outputs": len(rows.classes) or 1}
    raise InputError(f"{path}: 'auto' follows the columns of data.tasks or data.rows, and there are none; give numbers")


def _made(family: type, given: Namespace) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=family)
    try:
        return parser.instantiate_classes(Namespace(made=given)).made
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from None
