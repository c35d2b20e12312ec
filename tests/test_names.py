"""Names of the tests: a file is known by its name alone, and a class is not taken for one of metalit's."""

import ast
from collections import Counter
from pathlib import Path

from repository import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


def classes(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


def test_every_file_of_tests_has_a_name_of_its_own():
    names = Counter(path.name for path in FILES if path.name != "conftest.py")
    assert [name for name, number in names.items() if number > 1] == []


def test_no_class_of_the_tests_goes_by_the_name_of_one_of_ours():
    ours = set().union(*map(classes, (ROOT / "src").rglob("*.py")))
    assert {f"{path.name}: {name}" for path in FILES for name in classes(path) & ours} == set()


def test_no_test_imports_from_a_conftest():
    # of which there are several, and Python knows one by that name
    trees = {path.name: ast.walk(ast.parse(path.read_text())) for path in FILES}
    imports = {name: [node.module for node in tree if isinstance(node, ast.ImportFrom)] for name, tree in trees.items()}
    assert [name for name, modules in imports.items() if "conftest" in modules] == []
