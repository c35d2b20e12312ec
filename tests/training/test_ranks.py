"""Several processes are one: they share the very tasks that one would draw, and write what one would write, once."""

from functools import cache

import pandas as pd
import pytest
import torch
from fits import last, scalars
from forks import run_ranks
from ranks import CASES, COMPILED, HALF, STEPS, fit_each
from torch.utils._pytree import tree_flatten

STATES = ("state_dict", "inner", "optimizer_states", "lr_schedulers", "global_step", "scaling")
LONG = pytest.mark.long
THREE = ("MAML", "ridge, warm", "tasks, judged", "supervised", "SAM, chunks")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the cases of a kind have been trained on a number of ranks, forked from this one."""

    @cache
    def train(names, ranks, halfway=0):
        root = tmp_path_factory.mktemp(f"ranks{ranks}")
        run_ranks(ranks, root / "log", fit_each, root, ranks, halfway, names)
        return root

    return train


def same_state(one, several, exactly=False):
    """Two checkpoints, to 1e-12 or bit for bit."""
    tolerance = 0.0 if exactly else 1e-12
    parts = [tree_flatten({name: state[name] for name in STATES if name in state}) for state in (one, several)]
    assert parts[0][1] == parts[1][1]
    for value, other in zip(parts[0][0], parts[1][0], strict=True):
        if isinstance(value, float | torch.Tensor):
            torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance)
        else:
            assert other == value


def same_folder(one, several, rel):
    """Logged scalars, pictures and tables: the same names at the same steps, each written once."""
    told = [scalars(root) for root in (one, several)]
    assert told[0].keys() == told[1].keys()
    for tag in told[0]:
        assert [step for step, _ in told[0][tag]] == [step for step, _ in told[1][tag]], tag
        values = [[value for _, value in part[tag]] for part in told]
        assert values[1] == pytest.approx(values[0], rel=rel, abs=1e-7), tag
    files = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*") if "events" not in path.name)
        for root in (one, several)
    ]
    assert files[0] == files[1]
    assert [len(list(root.rglob("events*"))) for root in (one, several)] == [1, 1]


def compared(trained, kind, name, ranks, shown=None):
    roots = [trained(tuple(kind), 1) / name, trained(tuple(shown or kind), ranks) / name]
    states = [torch.load(last(root), weights_only=True) for root in roots]
    assert states[0]["global_step"] == STEPS
    return roots, states


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(trained, name):
    roots, states = compared(trained, CASES, name, 2)
    same_state(*states)
    same_folder(*roots, rel=1e-5)


@pytest.mark.parametrize("name", [*THREE, *(pytest.param(name, marks=LONG) for name in CASES if name not in THREE)])
def test_three_ranks_are_one(trained, name):
    shown = THREE if name in THREE else [name for name in CASES if name not in THREE]
    roots, states = compared(trained, CASES, name, 3, shown)
    same_state(*states)
    same_folder(*roots, rel=1e-5)


def test_two_ranks_find_the_same_accuracies_and_confusions(trained):
    roots = [trained(tuple(CASES), ranks) / "classes, tested/run/version_0" for ranks in (1, 2)]
    for file in ("test.csv", "test_confusion.csv"):
        one, two = (pd.read_csv(root / file) for root in roots)
        pd.testing.assert_frame_equal(one, two, rtol=1e-5)
    assert one.drop(columns="true class").to_numpy().sum() == 9 * 3 * 3
    assert "accuracy" in pd.read_csv(roots[0] / "test.csv")


@LONG
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", COMPILED)
def test_several_ranks_that_compile_are_one(trained, name, ranks):
    roots, states = compared(trained, COMPILED, name, ranks)
    same_state(*states)
    same_folder(*roots, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=LONG)])
@pytest.mark.parametrize("name", HALF)
def test_several_ranks_in_half_precision_agree_on_the_scale(trained, name, ranks):
    # parameters that differ in the last digit may round differently in half precision, and so only stay near
    _, states = compared(trained, HALF, name, ranks)
    assert all(1 < state["MixedPrecision"]["scale"] < 2.0**30 for state in states)
    for parameter, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][parameter], value, rtol=0.05, atol=0.05)


def test_chunks_are_the_whole(trained):
    root = trained(tuple(CASES), 1)
    for whole, parts in (("MAML", "MAML, chunks"), ("MAML", "MAML, fused"), ("SAM", "SAM, chunks")):
        states = [torch.load(last(root / name), weights_only=True)["state_dict"] for name in (whole, parts)]
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-12, atol=1e-12)


@LONG
@pytest.mark.parametrize("halfway", [8, 10])  # a validation comes after every fourth step
@pytest.mark.parametrize("name", [*CASES, *HALF])
def test_two_ranks_are_resumed_bit_for_bit(trained, name, halfway):
    kind = tuple(CASES if name in CASES else HALF)
    whole, parts = (trained(kind, 2, step) / name for step in (0, halfway))
    same_state(*(torch.load(last(root), weights_only=True) for root in (whole, parts)), exactly=True)
