"""A fit on a GPU, compiled or not, learns what a fit on the CPU learns, to rounding."""

import pytest
from on_device import CASES, apart, fitted, maml, sine

pytestmark = pytest.mark.gpu
BOUNDS = {"64-true": 1e-8, "32-true": 1e-3}
COMPILED = [name for name, case in CASES.items() if case.compiles]


def compare(tmp_path, device, name, precision, **options):
    case = CASES[name]
    expected = fitted(tmp_path, "cpu", case.learner(), case.data(), precision=precision)
    found = fitted(tmp_path, device, case.learner(**options), case.data(), precision=precision)
    return apart(found, expected, case.learner())


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_as_it_stands(tmp_path, device, record_property, name, precision):
    error = compare(tmp_path, device, name, precision)
    record_property("error", error)
    assert error < BOUNDS[precision]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(tmp_path, capfd, device, record_property, name, precision):
    error = compare(tmp_path, device, name, precision, compile=True)
    record_property("error", error)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("metalit:")]
    record_property("told", lines)
    assert not [line for line in lines if "not compiled" in line]
    assert [line for line in lines if "compiled the outer step in" in line]
    assert error < BOUNDS[precision]


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_steps(tmp_path, device, record_property, compiled):
    """On a GPU the steps of a call are taken one after the other."""
    options = {"optimizer": None, "fused_steps": 2, "compile": compiled}
    expected = fitted(tmp_path, "cpu", maml(optimizer=None), sine(), precision="64-true")
    found = fitted(tmp_path, device, maml(**options), sine(), precision="64-true")
    error = apart(found, expected, maml())
    record_property("error", error)
    assert error < 1e-6
