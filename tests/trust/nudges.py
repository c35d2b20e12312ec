"""Settings, records, checkpoints and arrays whose form is right, and of which a few values are anything."""

import copy
import io
import random
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
import yaml
from fuzz import VALUES

from metalit.__main__ import main
from metalit.cli.short_names import class_names

HUGE = (10**6, 10**9, 2**31 - 1, 2**31, 2**63, 10**30)
# fmt: off
INTS = (*(range(-1, 7)), *(range(-1, 7)), 16, 17, 100, 0.5, None, "auto", "all", *HUGE)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, 1e-9, 100.0, float("nan"), float("inf"), float("-inf"), 3, None)
OTHERS = (
    None, True, False, 0, -1, 3, 0.5, float("nan"), "", "x", "auto", [], [1], [[1]], {}, {"a": 1}, ["a", None],
    {"class_path": "os.system"}, {"class_path": "metalit.inner.SGD", "init_args": {"lr": "x"}},
)
TEXTS = ("", "x", "*", "a/b", "Tanh", "hidden1", "Softmax", "BatchNorm1d", "data/gapminder.csv", "a" * 3000, "auto", 1)
FAMILIES = (
    ("Unrolled", "Recomputed", "Truncated", "FirstOrder", "Reptile", "Implicit", "FiniteDifference", "F2SA", "Direct"),
    ("SGD", "Adam", "RMSprop", "Newton", "NoSteps", "MetaSGD", "MetaCurvature", "ALFA", "Learned"),
    ("FewShot", "Prototypes", "Matching", "ProtoMAML", "RidgeHead", "BayesianHead", "NeuralProcess"),
    ("Ridge", "Logistic", "Cleaning", "LowRank", "ThetaPhi"),
    ("Sine", "Curves", "ClassTasks"),
    ("Glyphs", "ImageFolder", "Arrays", "CsvRows", "SklearnTable"),
    ("MLP", "Conv4", "torch.nn.Linear", "torch.nn.Conv2d"),
    ("MetaLearner", "BilevelLearner", "SupervisedLearner"),
    ("TaskDataModule", "SplitsDataModule", "BatchDataModule", "MatrixDataModule"),
    ("CG", "NormalCG", "Neumann", "Dense", "Nystrom"),
    ("SAM", "AdaptiveSAM", "WeightNoise"),
    ("torch.optim.Adam", "torch.optim.SGD", "torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Rprop"),
)
# fmt: on
CLASSES = """
model:
  class_path: MetaLearner
  init_args:
    problem:
      class_path: Prototypes
      init_args: {network: {class_path: Conv4, init_args: {channels: auto, size: auto, width: 4, pools: 3}}}
data:
  class_path: TaskDataModule
  init_args:
    tasks: {class_path: ClassTasks, init_args: {source: {class_path: SOURCE}, rotations: true}}
    train: {ways: 2, shots: 1, queries: 2}
    val: {ways: 2, shots: 1, queries: 2}
    test: {ways: 2, shots: 2, queries: 2}
"""
Way = tuple[str | int, ...]


def leaves(tree: Any, path: Way = ()) -> Iterator[Way]:
    """The way to each value, and to each group of them."""
    if path:
        yield path
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in parts:
        yield from leaves(value, (*path, key))


def value_like(draw: random.Random, value: Any) -> Any:
    """Another value, that may well be allowed in the same place."""
    if draw.random() < 0.1:
        return draw.choice((*OTHERS, *VALUES))
    if isinstance(value, dict) and "class_path" in value:
        name = draw.choice(_kin(value["class_path"]))
        return draw.choice((name, {"class_path": name}, {**copy.deepcopy(value), "class_path": name}))
    if isinstance(value, list | tuple):
        return _list_like(draw, list(copy.deepcopy(value)))
    likes = {bool: (True, False), int: INTS, float: FLOATS, str: TEXTS}
    return draw.choice(likes.get(type(value), OTHERS))


def _list_like(draw: random.Random, other: list[Any]) -> Any:
    place, what = draw.randrange(len(other) + 1), draw.randrange(4)
    if what == 0:
        return other[:place] + other[place + 1 :]
    if what == 1:
        return [*other[:place], draw.choice((*other, 1, "x", None)), *other[place:]]
    if what == 2 and place < len(other):
        other[place] = value_like(draw, other[place])
        return other
    return draw.choice(([], [other], other * 2))


def _kin(path: Any) -> list[str]:
    """The classes that may stand where this one does, and a few of any kind."""
    known = sorted(class_names())
    family = next((family for family in FAMILIES if any(str(path).endswith(f".{name}") for name in family)), ())
    return [*(family * 5), "Conv4", "torch.nn.Linear", *known[::7]]


def nudged(draw: random.Random, tree: Any, times: int = 3) -> Any:
    """A copy of which up to so many values are others, gone, or there once more."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, times)):
        ways = [way for way in leaves(tree) if way[0] != "trainer" or draw.random() < 0.1]
        if not ways:
            break
        *above, last = draw.choice(ways)
        holder = tree
        for key in above:
            holder = holder[key]
        if isinstance(holder, tuple):
            continue
        if draw.random() < 0.05:
            del holder[last]
        else:
            holder[last] = value_like(draw, holder[last])
    return tree


@cache
def resolved(config: str) -> dict[str, Any]:
    """Every setting of a config, at the size of a test."""
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main(["fit", f"--config={config}", "--print_config"])
    tree = yaml.safe_load(out.getvalue())
    model, data = tree["model"]["init_args"], (tree["data"] or {}).get("init_args", {})
    model |= {name: value for name, value in (("compile", False), ("fused_steps", 1)) if name in model}
    if isinstance(model.get("eval_steps"), int):
        model["eval_steps"] = min(model["eval_steps"], 10)
    for split in ("train", "val", "test"):
        if isinstance(data.get(split), dict):
            data[split]["tasks"] = 2
    tree["trainer"] |= {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1, "accelerator": "cpu"}
    return tree


def settings(draw: random.Random, configs: list[str]) -> bytes:
    """A config with every setting in it, of which a few are others."""
    tree = nudged(draw, resolved(draw.choice(configs)))
    if draw.random() < 0.7:
        trainer = tree.get("trainer")
        if isinstance(trainer, dict):
            trainer["fast_dev_run"] = True
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def options(draw: random.Random, config: str) -> list[str]:
    """The same as options of a command line: each names a setting, and gives it another value."""
    tree = resolved(config)
    found = []
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(leaves(tree)))
        value = tree
        for key in path:
            value = value[key]
        name = ".".join(str(key) for key in path if key not in ("init_args", "class_path") and isinstance(key, str))
        if name:
            given = yaml.safe_dump(value_like(draw, value), default_flow_style=True, width=10**6)
            found.append(f"--{name}={given.removesuffix(chr(10)).removesuffix(chr(10) + '...')}")
    return found


def checkpoint(draw: random.Random, whole: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that is whole, and of which a few parts are not what was saved."""
    found = copy.deepcopy(whole)
    if draw.random() < 0.5:
        *above, last = draw.choice(list(_tensors(whole)))
        holder = found
        for key in above:
            holder = holder[key]
        holder[last] = _other_tensor(draw, holder[last])
    return nudged(draw, found) if draw.random() < 0.8 else found


def _tensors(tree: Any) -> Iterator[Way]:
    for path in leaves(tree):
        value = tree
        for key in path:
            value = value[key]
        if isinstance(value, torch.Tensor):
            yield path


def _other_tensor(draw: random.Random, tensor: torch.Tensor) -> Any:
    changes: list[Callable[[], Any]] = [
        lambda: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor - 5,
        lambda: torch.full_like(tensor, 10**6),
        tensor.double,
        lambda: tensor.flatten()[: draw.randrange(3)],
        lambda: tensor.unsqueeze(0),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to_sparse() if tensor.dim() else tensor.bool(),
        tensor.tolist,
    ]
    return draw.choice(changes)()


# fmt: off
KINDS = ("f2", "f4", ">f8", "i1", "u8", "?", "c8", "U3", "S2", "M8[s]", "m8[s]", "O", ">u2", "f16")
ALONE = (1, "x", np.nan, b"\xff", 1j)
TEXTS_OF_ARRAYS = ((b"\xff\xfe", b"a"), ("a" * 2000, "é", "\0", "\ud800", ""))
# fmt: on


def array(draw: random.Random, whole: np.ndarray) -> np.ndarray:
    """An array of another form, another kind or other values."""
    changes: list[Callable[[], np.ndarray]] = [
        lambda: whole.reshape(-1),
        lambda: whole[..., None],
        lambda: whole[: draw.randrange(3)],
        lambda: np.array(draw.choice(ALONE)),
        lambda: whole[:0],
        lambda: np.asfortranarray(whole).T,
        lambda: whole.astype(draw.choice(KINDS)),
        lambda: _with_one(draw, whole),
        lambda: np.array(draw.choices(draw.choice(TEXTS_OF_ARRAYS), k=len(whole))),
        lambda: np.zeros(len(whole), dtype=[("a", "f4"), ("b", "i4")]),
        lambda: np.repeat(whole, 2, axis=0),
        lambda: whole,
    ]
    with np.errstate(all="ignore"):
        return draw.choice(changes)()


def _with_one(draw: random.Random, whole: np.ndarray) -> np.ndarray:
    other = whole.astype("f8")
    other.flat[draw.randrange(other.size)] = draw.choice((np.nan, np.inf, 1e300))
    return other
