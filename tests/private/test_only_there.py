"""What other libraries call private is named in two files alone, and in those of the compiler."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

import metalit

ROOT = Path(metalit.__file__).parent
FILES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for file in sorted(ROOT.rglob("*.py"))}
# compiled programs are made by names that are private to torch, and checked against the eager run each time
ALLOWED = {"private_torch.py", "private_lightning.py", "compiling/compiler.py", "compiling/cache.py"}
# named tuples call these so, and Python documents them
PUBLIC = {"_replace", "_make", "_fields", "_asdict", "_exit"}
# methods that a class of ours overrides: the two files name them, and their tests hold that they are called
OVERRIDDEN = {
    *("_apply", "_save_to_state_dict", "_load_from_state_dict"),
    *("_save_checkpoint", "_get_train_description", "_parse_ckpt_path"),
}


def own_names() -> set[str]:
    """All private names that metalit gives to anything itself."""
    nodes = [node for source in FILES.values() for node in ast.walk(ast.parse(source))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return names | {
        node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def foreign_names(source: str, own: set[str]) -> Iterator[str]:
    """Private names of others in a file: imported, read as an attribute, or asked for by ``getattr``."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("metalit"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            names = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            names = [name for name in names if name not in own]
        yield from (name for name in names if re.match(r"_[a-zA-Z]", name) and name not in PUBLIC)


def test_no_file_names_what_is_private_to_others():
    """Give it a small function in ``private_torch.py`` or ``private_lightning.py``, and a test beside this one."""
    own = own_names()
    found = {file: list(foreign_names(source, own)) for file, source in FILES.items() if file not in ALLOWED}
    assert {file: names for file, names in found.items() if names} == {}


def test_no_class_reads_what_is_private_to_its_bases():
    """Likewise; and a method of a base that is overridden belongs to ``OVERRIDDEN``, with a test that it is called."""
    names = (file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in FILES)
    modules = [importlib.import_module(f"metalit.{name}") for name in names if name not in ("__init__", "__main__")]
    classes = [
        each
        for module in modules
        for each in vars(module).values()
        if inspect.isclass(each) and each.__module__ == module.__name__
    ]
    found = {each.__qualname__: names for each in classes if (names := inherited_names(each) - OVERRIDDEN)}
    assert found == {}


# given to a class by its metaclass, that of Python's abstract classes and that of torch's functions
BY_METACLASS = ("_abc_impl", "_backward_cls")


def inherited_names(kind: type) -> set[str]:
    """The private names of its foreign bases that a class uses or replaces."""
    used = set(re.findall(r"(?:self|cls|super\(\))\.(_[a-z]\w*)", inspect.getsource(kind)))
    used |= {name for name in vars(kind) if re.match(r"_[a-z]", name) and name not in BY_METACLASS}
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith(("lightning.", "torch."))]
    return used & set().union(*map(private_names, bases))


@cache
def private_names(kind: type) -> set[str]:
    """Those that a class gives to its methods and its attributes."""
    try:
        source = inspect.getsource(kind)
    except OSError:  # it is written in C++
        source = ""
    return set(vars(kind)) | set(re.findall(r"self\.(_[a-z]\w*)\b[^=\n]*=", source))


def test_the_check_finds_what_a_base_keeps_to_itself():
    class Layer(nn.Module):
        def names(self):
            return self._buffers, self._own

    assert inherited_names(Layer) == {"_buffers"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.utils._pytree import tree_map", "_pytree"),
        ("from torch._C import x", "_C"),
        ("from lightning.pytorch import _private", "_private"),
        ("import torch._dynamo", "_dynamo"),
        ("trainer._data_connector.x()", "_data_connector"),
        ("getattr(trainer, '_layer_sync', None)", "_layer_sync"),
    ],
)
def test_the_check_finds_a_private_name(source, name):
    assert list(foreign_names(source, {"_own"})) == [name]


@pytest.mark.parametrize("source", ["self._own = value._own", "pair._replace(a=1)", "from metalit.x import _y"])
def test_the_check_lets_pass_what_is_ours_or_public(source):
    assert list(foreign_names(source, {"_own"})) == []
