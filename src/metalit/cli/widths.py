"""Widths of networks that a configuration leaves to its data: ``sizes: [auto, 40, 40, auto]``."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from metalit.data import RowSource, TaskDistribution
from metalit.errors import InputError

_AUTO = "auto"


class _Width(NamedTuple):
    """A place of the configuration that says ``auto``."""

    path: str
    holder: Any
    key: Any
    is_input: bool


def fill_widths(config: Namespace) -> None:
    """Put numbers in place of every ``auto`` below ``model``: the inputs and outputs that ``data`` has.

    Inputs are the columns of x, a category counting once for each level, or those of a table with its noise; outputs
    are the columns of y, or the classes of a table.

    Raises:
        InputError: the data has no columns; numbers that are not those of a table of curves; what its table or tasks
            raise.
    """
    places = list(_places(config.get("model"), "model"))
    if places:
        inputs, outputs = _columns(config.get("data"), places[0].path)
        for place in places:
            place.holder[place.key] = inputs if place.is_input else outputs
    _check(config)


def _check(config: Namespace) -> None:
    """The data's columns are all inputs and outputs of an MLP: other widths are an error before it is built."""
    network = config.get("model.init_args.problem.init_args.network")
    tasks = config.get("data.init_args.tasks")
    if not (_is(network, "metalit.networks.MLP") and _is(tasks, "metalit.data.Curves")):
        return
    sizes = network["init_args"]["sizes"]
    curves = _made(TaskDistribution, tasks)
    answers = _is(config.get("model.init_args.problem"), "metalit.problems.FewShot")  # elsewhere they are features
    right = [len(curves.inputs), *sizes[1:-1], len(curves.columns.y) if answers else sizes[-1]]
    if list(sizes) != right:
        raise InputError(
            f"model.problem.network.sizes={list(sizes)}, but the data has {right[0]} input(s) {curves.inputs} and "
            f"{right[-1]} output(s) {list(curves.columns.y)}; give {right}, or write 'auto' for the first and the last"
        )


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
            yield from (
                _Width(below, value, position, position == 0) for position in (0, -1) if value[position] == _AUTO
            )
        elif key in ("features", "inputs", "outputs") and value == _AUTO:
            yield _Width(below, members, key, key != "outputs")
        else:
            yield from _places(value, below)


def _columns(data: Any, path: str) -> tuple[int, int]:
    given = (data or Namespace()).get("init_args") or Namespace()
    if isinstance(given.get("tasks"), Namespace):
        tasks = _made(TaskDistribution, given["tasks"])
        return len(tasks.inputs), len(tasks.columns.y)
    if isinstance(given.get("rows"), Namespace):
        rows = _made(RowSource, given["rows"]).read()
        return len(rows.columns) + (given.get("noise_columns") or 0), len(rows.classes) or 1
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
