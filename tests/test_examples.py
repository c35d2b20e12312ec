"""Every example runs as it stands, and prints the numbers that theory gives.

A new example adds one entry to ``PRINTED``: the beginnings of lines, and the numbers that follow in them.
"""

import ast
import re
import runpy
from pathlib import Path
from unittest.mock import ANY

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")

PRINTED = {
    "create_graph": {
        "∇x w   ∇y w": [10, 20, 30, 10],
        "∂(∂w/∂x₁)/∂x   ∂(∂w/∂x₁)/∂y, cleared": [2, 4, 16, 2],
        "the same, the first gradient not cleared": [12, 24, 46, 12],
        "the difference is the first gradient": [10, 20, 30, 10],
        "v = (1, 0): the row of x₁": [2, 4, 16, 2],
        "2y₁², 2y₁y₂   4x₁y₁ + 2x₂y₂, 2x₂y₁": [2, 4, 16, 2],
        "v = (3, -2)": [-2, -4, 24, -22],
        "2yyᵀv   2(yᵀv)x + 2(xᵀy)v": [-2, -4, 24, -22],
        "x.grad   y.grad                             : None   None": [],
    },
    "per_sample": {
        "by_backward": [0, ANY, 1],
        "by_grad": [0, ANY, ANY],
        "by_functional_jacobian": [0, ANY, ANY],
        "by_per_sample": [0, ANY, ANY],
        "u = u(x, t)    NameError: name 'u' is not defined": [],
        "grad(y, a)     RuntimeError: grad can be implicitly created only for scalar outputs": [],
        "cure: a gradient for each row: per_sample_gradients(u, x, t, by=0) = ": [2, 2, 2],
        "the loop, first": [0, pytest.approx(1.264, abs=1e-3)],
        "the loop, after jacobian(partial_model)": [pytest.approx(1.264, abs=1e-3), 0],
        "per_sample_jacobian, after that": [0, pytest.approx(1.264, abs=1e-3)],
        "the weight of the model is still a: False": ANY,
        "weight ": [10, 2, 2, 3, 0],
        "bias ": [10, 2, 2, 0],
        "∂²u/∂x² + u": [pytest.approx(0, abs=1e-14)],
        "∂²u/∂x² − ∂u/∂t": [pytest.approx(0, abs=1e-14)],
    },
    "perturbed": {
        "0.weight": [pytest.approx(26.681804053109, rel=1e-12)] * 3,
        "0.bias": [pytest.approx(22.881394918087, rel=1e-12)] * 3,
        "1.weight": [pytest.approx(61.285638144127, rel=1e-12)] * 3,
        "1.bias": [16, 16, 16],
        "the network is as it was: True; every .grad is None: True": [],
        "norm of the norms        :": [pytest.approx(72.438983590735, rel=1e-12)],
        "norm of the concatenation:": [pytest.approx(72.438983590735, rel=1e-12)],
        "[4, 1] − [4]": [16, pytest.approx(4 * 11.968091, abs=1e-5), -16, -16],
        "[4] − [4]": [4, pytest.approx(11.968091, abs=1e-5), -4, -4],
    },
}


def numbers_after(label: str, output: str) -> list[float]:
    """The numbers of the first line that begins with ``label``, behind it."""
    lines = [line.strip() for line in output.splitlines()]
    rest = [line.removeprefix(label) for line in lines if line.startswith(label)]
    assert rest, f"no line begins with {label!r}:\n{output}"
    return [float(number.replace("−", "-")) for number in NUMBER.findall(rest[0])]


@pytest.fixture(scope="module")
def outputs():
    """What each example printed, by its name."""
    return {}


@pytest.fixture
def printed(outputs, capsys):
    """Run an example as a script, once, and return what it printed."""

    def run(name):
        if name not in outputs:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
            captured = capsys.readouterr()
            assert captured.err == ""
            outputs[name] = captured.out
        return outputs[name]

    return run


@pytest.mark.parametrize(("name", "label"), [(name, label) for name, labels in PRINTED.items() for label in labels])
def test_prints(name, label, printed):
    assert numbers_after(label, printed(name)) == PRINTED[name][label]


@pytest.mark.parametrize("name", PRINTED)
def test_fits_the_folder(name, printed):
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    assert "\n\n" in ast.get_docstring(ast.parse(source))
    assert f"[`{name}.py`]({name}.py)" in (FOLDER / "README.md").read_text("utf-8")
    assert max(map(len, printed(name).splitlines())) <= 120


def test_the_three_gradients_at_perturbed_weights_are_equal_to_the_last_digit(printed):
    lines = [line.split() for line in printed("perturbed").splitlines() if line.startswith(("0.", "1."))]
    assert [line[0] for line in lines] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(line[-1] == "True" for line in lines)


def test_every_example_is_tested():
    assert {file.stem for file in FOLDER.glob("*.py")} <= PRINTED.keys()


def test_runs_in_a_process_of_its_own(shell):
    result = shell("examples/create_graph.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert numbers_after("the same, the first gradient not cleared", result.stdout) == [12, 24, 46, 12]
