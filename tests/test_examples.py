"""Every example runs as it stands, and prints the numbers that theory gives.

A new example adds one entry to ``PRINTED``: the beginnings of lines, and the numbers that follow in them.
"""

import ast
import re
import runpy
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from metalit.data import MatrixDataModule

FOLDER = Path(__file__).parent.parent / "examples"


def second_singular_value(seed: int) -> float:
    """Of the matrix that ``MatrixDataModule(rows=2, columns=5, seed=seed)`` gives."""
    data = MatrixDataModule(rows=2, columns=5, seed=seed)
    data.prepare()
    return float(np.linalg.svd(data.matrix.values.numpy(), compute_uv=False)[1])


NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")

# σ₂² of the 2×5 matrices of the seeds 0 to 9, by NumPy
ECKART_YOUNG = [round(second_singular_value(seed) ** 2, 6) for seed in range(10)]

# f = (θᵀθ)(φᵀφ) at the θ₀ and φ₀ of examples/bilevel.py
G = [0.74854169, 1.15876757, 0.13345726]
JTG = [0.67254598, 1.56597150, 3.22991363, 2.49647154]
INDIRECT = [-0.05711007, -0.13297641, -0.27427211, -0.21199097]

PRINTED = {
    "bilevel": {
        "g      actual": G,
        "expected": G,
        "Jᵀg    actual": JTG,
        "θ₁ = θ₀ − αg": [0.42140242, 0.65234504, 0.07513171],
        "φ₁ = φ₀ − βJᵀg": [0.06477589, 0.15082567, 0.31108732, 0.24044626],
        "largest error of Jᵀg:": [pytest.approx(0, abs=1e-14)],
        "right": JTG,
        "θ stepped by an optimiser:    RuntimeError": [],
        "θ stepped through .data:": [0.57110074, 1.32976407, 2.74272110, 2.11990968],
        "two backward(), not cleared:": [0.89548305, 2.08506328, 4.30057271, 3.32400758],
        "indirect term, unrolled": INDIRECT,
        "−α(1 − 2αφᵀφ) · Jᵀg": INDIRECT,
    },
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
    "low_rank": {
        **{f"{seed} ": [ANY, pytest.approx(ECKART_YOUNG[seed], rel=1e-3), ECKART_YOUNG[seed]] for seed in range(10)},
        "largest excess over the optimum:": [pytest.approx(0, abs=0.1)],
        "both factors by Adam:": [ANY, ANY, 10, 10],
        "v solved for exactly:": [ANY, ANY, 10, 10],
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


def long_if_low_rank(name, *rest):
    """It trains twenty times: the quick run has two of its ten seeds."""
    return pytest.param(name, *rest, marks=pytest.mark.long if name == "low_rank" else ())


@pytest.mark.parametrize(
    ("name", "label"), [long_if_low_rank(name, label) for name, labels in PRINTED.items() for label in labels]
)
def test_prints(name, label, printed):
    assert numbers_after(label, printed(name)) == PRINTED[name][label]


def test_low_rank_prints_the_optimum_of_its_first_seeds(capsys):
    main = runpy.run_path(str(FOLDER / "low_rank.py"))["main"]
    main.__globals__["SEEDS"] = range(2)
    main()
    output = capsys.readouterr().out
    for seed in range(2):
        assert numbers_after(f"{seed} ", output) == PRINTED["low_rank"][f"{seed} "]
    assert numbers_after("both factors by Adam:", output)[2:] == [2, 2]
    assert numbers_after("v solved for exactly:", output)[2:] == [2, 2]


@pytest.mark.parametrize("name", [long_if_low_rank(name) for name in PRINTED])
def test_fits_the_folder(name, printed):
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    assert "\n\n" in ast.get_docstring(ast.parse(source))
    assert f"[`{name}.py`]({name}.py)" in (FOLDER / "README.md").read_text("utf-8")
    assert max(map(len, printed(name).splitlines())) <= 120


def test_the_three_gradients_at_perturbed_weights_are_equal_to_the_last_digit(printed):
    lines = [line.split() for line in printed("perturbed").splitlines() if line.startswith(("0.", "1."))]
    assert [line[0] for line in lines] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(line[-1] == "True" for line in lines)


def test_expected_and_actual_products_are_equal(printed):
    lines = [line.split("[")[1] for line in printed("bilevel").splitlines() if "actual" in line or "expected" in line]
    assert len(lines) == 4
    assert lines[0::2] == lines[1::2]


@pytest.mark.long
def test_solving_for_one_factor_saves_most_steps(printed):
    both, exact = (
        numbers_after(label, printed("low_rank")) for label in ("both factors by Adam:", "v solved for exactly:")
    )
    assert 3 * exact[0] < both[0]


def test_every_example_is_tested():
    assert {file.stem for file in FOLDER.glob("*.py")} <= PRINTED.keys()


def test_runs_in_a_process_of_its_own(shell):
    result = shell("examples/create_graph.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert numbers_after("the same, the first gradient not cleared", result.stdout) == [12, 24, 46, 12]
