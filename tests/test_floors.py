import ast
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median

import pytest

import metalit

ROOT = Path(metalit.__file__).parent
FLOORS = {
    **dict.fromkeys(("__init__", "tree", "keys", "errors", "judging"), 0),
    **dict.fromkeys(("private_torch", "private_lightning"), 0),
    **dict.fromkeys(("autodiff", "losses", "networks", "unrounded", "linsolve", "locks"), 1),
    **dict.fromkeys(("checkpoints", "notices"), 1),
    **dict.fromkeys(("problem", "inner", "compiling"), 2),
    **dict.fromkeys(("adapt", "scaled", "problems"), 3),
    **dict.fromkeys(("hypergradients", "data"), 4),
    **dict.fromkeys(("training", "checks", "evaluation", "modules", "callbacks", "runs", "checking"), 5),
    **dict.fromkeys(("cli", "__main__"), 6),
}
SAME_FLOOR = {
    *(("checks", "training"), ("__main__", "cli")),
    *(("modules", part) for part in ("training", "checks", "evaluation")),
    *(("checking", part) for part in ("training", "modules", "callbacks")),
    *(("callbacks", part) for part in ("training", "checks", "evaluation", "modules", "runs")),
}
KNOW_LIGHTNING = {"data", "checkpoints", "notices", "private_lightning"}
TORCH_ALONE = {part for part, floor in FLOORS.items() if floor <= 4} - KNOW_LIGHTNING


def imports(file: str, source: str) -> Iterator[tuple[str, list[str]]]:
    """Each module that a file of metalit imports, wherever in it, with the names that it takes from there."""
    package = ["metalit", *Path(file).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), [alias.name for alias in node.names]


def imported_modules(file: str, source: str) -> Iterator[str]:
    """Absolute dotted names of all that a file of metalit imports."""
    for module, names in imports(file, source):
        yield from (f"metalit.{name}" for name in names) if names and module == "metalit" else [module]


def imported_files(file: str, source: str, files: Container[str]) -> set[str]:
    """The files of metalit that a file imports, and the ``__init__`` of other packages, which Python runs first."""
    modules = {each for module, names in imports(file, source) for each in (module, *(f"{module}.{n}" for n in names))}
    paths = [Path(*module.split(".")[1:]) for module in modules if module.startswith("metalit.")]
    named = {str(found) for path in paths for found in (path.with_suffix(".py"), path / "__init__.py")}
    run_first = {
        str(above / "__init__.py") for path in paths for above in path.parents if above not in Path(file).parents
    }
    return {each for each in named | run_first if each in files} - {file}


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The first circle of a graph, from a node to itself; the empty list where there is none."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for node in sorted(graph[path[-1]]):
            if node in path:
                return [*path[path.index(node) :], node]
            if node not in done and (found := walk([*path, node])):
                return found
        done.add(path[-1])
        return []

    return next((found for node in sorted(graph) if node not in done and (found := walk([node]))), [])


def offences(file: str, source: str) -> list[str]:
    """``file -> imported module: why not`` for each import that the floors forbid."""
    part = Path(file).parts[0].removesuffix(".py")
    if part not in FLOORS:
        return [f"{file}: has no floor"]
    reasons = ((name, _reason(part, name)) for name in imported_modules(file, source))
    return [f"{file} -> {name}: {reason}" for name, reason in reasons if reason]


def _reason(part: str, name: str) -> str | None:
    top, *inside = name.split(".")
    if top != "metalit":
        foreign = part in TORCH_ALONE and top != "torch" and top not in sys.stdlib_module_names
        return f"floor {FLOORS[part]} knows torch and the standard library alone" if foreign else None
    other = inside[0] if inside else "nothing in particular"
    if other not in FLOORS:
        return f"{other} has no floor"
    if other in KNOW_LIGHTNING and part in TORCH_ALONE and FLOORS[other] < FLOORS[part]:
        return f"floor {FLOORS[part]} knows torch and the standard library alone"
    if other == part or FLOORS[other] < FLOORS[part] or (part, other) in SAME_FLOOR:
        return None
    return f"{part} is on floor {FLOORS[part]}, {other} on floor {FLOORS[other]}"


def test_every_file_imports_from_the_floors_below_alone():
    files = sorted(ROOT.rglob("*.py"))
    found = [offence for file in files for offence in offences(str(file.relative_to(ROOT)), file.read_text("utf-8"))]
    assert found == []


def test_no_files_import_each_other_in_a_circle():
    files = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in ROOT.rglob("*.py")}
    graph = {file: imported_files(file, source, files) for file, source in files.items()}
    assert "adapt.py" in graph["hypergradients/base.py"]  # the walk sees something
    assert " -> ".join(circle(graph)) == ""


def test_a_circle_is_named():
    files = {
        "a/__init__.py": "from metalit.a.one import x",
        "a/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from metalit.b import two",
        "b/__init__.py": "",
        "b/two.py": "from ..c import y",
        "c.py": "def f():\n    import metalit.a.one",
    }
    graph = {file: imported_files(file, source, files) for file, source in files.items()}
    assert graph["c.py"] == {"a/__init__.py", "a/one.py"}
    assert circle(graph) == ["a/__init__.py", "a/one.py", "b/two.py", "c.py", "a/__init__.py"]
    assert circle(graph | {"c.py": set()}) == []


def test_of_two_parts_of_a_floor_one_alone_imports_the_other():
    assert [pair for pair in SAME_FLOOR if pair[::-1] in SAME_FLOOR] == []


def test_files_are_small():
    """A file that grows holds a second thing: give that a file of its own."""
    lines = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in ROOT.rglob("*.py")}
    most = {file: 200 if file.startswith("training/") else 300 for file in lines}
    assert {file: count for file, count in lines.items() if count > most[file]} == {}
    assert median(lines.values()) < 100


def test_the_walk_sees_the_whole_package_and_its_imports():
    files = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in ROOT.rglob("*.py")}
    assert {Path(file).parts[0].removesuffix(".py") for file in files} >= FLOORS.keys()
    assert "metalit.tree" in imported_modules("adapt.py", files["adapt.py"])
    assert "metalit.cli.command_line" in imported_modules("__main__.py", files["__main__.py"])


@pytest.mark.parametrize(
    ("file", "source", "module"),
    [
        ("tree.py", "import metalit.autodiff", "metalit.autodiff"),
        ("tree.py", "from metalit.keys import fold", "metalit.keys"),
        ("autodiff.py", "from metalit import problem", "metalit.problem"),
        ("adapt.py", "from metalit.problems import FewShot", "metalit.problems"),
        ("inner/sgd.py", "def f():\n    from metalit.adapt import adapt", "metalit.adapt"),
        ("inner/sgd.py", "from ..adapt import adapt", "metalit.adapt"),
        ("inner/sgd.py", "from .. import adapt", "metalit.adapt"),
        ("hypergradients/base.py", "from metalit.data import Sine", "metalit.data"),
        ("data/sine.py", "import metalit.hypergradients.base as b", "metalit.hypergradients.base"),
        ("runs.py", "from metalit.modules import MetaLearner", "metalit.modules"),
        ("modules/meta.py", "from metalit.cli.command_line import run", "metalit.cli.command_line"),
        ("modules/meta.py", "from metalit.callbacks import Progress", "metalit.callbacks"),
        ("modules/meta.py", "from metalit.cli.messages import explain", "metalit.cli.messages"),
        ("networks.py", "import numpy as np", "numpy"),
        ("problem.py", "if x:\n    import lightning.pytorch", "lightning.pytorch"),
        ("hypergradients/unrolled.py", "from pandas import read_csv", "pandas"),
        ("adapt.py", "import math, torchvision", "torchvision"),
        ("adapt.py", "from metalit.private_lightning import trainer_of", "metalit.private_lightning"),
        ("adapt.py", "import metalit", "metalit"),
        ("adapt.py", "from metalit.novelty import x", "metalit.novelty"),
    ],
)
def test_the_checker_names_an_offending_import(file, source, module):
    innocent = "from __future__ import annotations\nimport math\nfrom torch import Tensor\n"
    found = offences(file, innocent + source)
    assert [offence.split(": ")[0] for offence in found] == [f"{file} -> {module}"]


def test_the_checker_says_why():
    assert offences("inner/sgd.py", "import numpy\nfrom metalit.adapt import adapt") == [
        "inner/sgd.py -> numpy: floor 2 knows torch and the standard library alone",
        "inner/sgd.py -> metalit.adapt: inner is on floor 2, adapt on floor 3",
    ]


def test_the_checker_names_a_file_without_a_floor():
    assert offences("novelty/new.py", "") == ["novelty/new.py: has no floor"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "hypergradients/unrolled.py",
            "from metalit.hypergradients.base import Estimate\nfrom .base import Hypergradient",
        ),
        ("hypergradients/unrolled.py", "from metalit import adapt, tree\nfrom ..inner.base import InnerOptimizer"),
        ("modules/meta.py", "from metalit.training import ranks\nimport lightning"),
        ("callbacks/report.py", "from metalit.modules import MetaLearner\nfrom metalit.data import Sine\nimport rich"),
        ("data/table.py", "import numpy as np\nimport pandas as pd\nfrom metalit.problem import Task"),
        ("cli/command_line.py", "from metalit.cli.messages import explain\nfrom metalit.runs import find_checkpoint"),
        ("inner/__init__.py", "from metalit.inner.sgd import SGD\nfrom .base import GradFn"),
    ],
)
def test_the_checker_lets_imports_from_below_and_beside_pass(file, source):
    assert offences(file, source) == []
