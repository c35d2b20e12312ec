"""A run that is killed anywhere goes on from its last checkpoint as if it had not been, bit for bit, whoever learns."""

from itertools import product

import pytest
import torch
from fits import Kill, KilledError, last, scalars, trainer
from lightning.pytorch import Callback
from ranks import CASES, HALF
from torch.utils._pytree import tree_leaves

from metalit.callbacks import BestCheckpoint, LastCheckpoint

STEPS = 12


class KillInValidation(Callback):
    """Ends a run in the middle of the validation after a step."""

    def __init__(self, step):
        self.step = step

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KilledError


# a validation comes after every fourth step
KILLS = {
    "at once": Kill(1),
    "between two steps": Kill(6),
    "after a validation": Kill(8),
    "in a validation": KillInValidation(8),
}


def fit(root, name, *callbacks, ckpt_path=None, steps=STEPS, **more):
    make, data, options = {**CASES, **HALF}[name]
    options = {**(options() if callable(options) else options), "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    options |= more
    callbacks = [BestCheckpoint(), LastCheckpoint(seconds=0.0), *callbacks]
    trainer(root, steps, val_check_interval=4, callbacks=callbacks, **options).fit(make(), data(), ckpt_path=ckpt_path)


def everything(root):
    """All that a checkpoint holds of the learner and its optimiser, and every scalar by name and step."""
    kept = torch.load(last(root), weights_only=True)
    assert kept["global_step"] == STEPS
    parts = [kept[name] for name in ("state_dict", "optimizer_states", "lr_schedulers")]
    parts += [kept.get("inner"), kept.get("MixedPrecision")]
    # of two values at one step the later, of the run that went on
    return tree_leaves(parts), {name: dict(values) for name, values in scalars(root).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing stopped ends with."""
    ends = {}

    def end(name):
        if name not in ends:
            root = tmp_path_factory.mktemp("whole")
            fit(root, name)
            ends[name] = everything(root)
        return ends[name]

    return end


@pytest.mark.parametrize("step", [8, 12])
def test_where_validations_come_across_epochs(tmp_path, step):
    """They come after every fourth step, and an epoch ends after every fifth."""
    options = {"limit_train_batches": 5, "check_val_every_n_epoch": None, "steps": 14}
    fit(tmp_path / "whole", "ridge, warm", **options)
    with pytest.raises(KilledError):
        fit(tmp_path / "parts", "ridge, warm", Kill(step), **options)
    fit(tmp_path / "parts", "ridge, warm", ckpt_path=last(tmp_path / "parts"), **options)
    expected, found = (torch.load(last(tmp_path / name), weights_only=True) for name in ("whole", "parts"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "inner"):
        assert str(expected[part]) == str(found[part])
    best = [
        state["best_model_score"]
        for kept in (expected, found)
        for name, state in kept["callbacks"].items()
        if name.startswith("Best")
    ]
    assert best[0] == best[1]


PAIRS = list(product([name for name in (*CASES, *HALF) if "fused" not in name], [*KILLS, "at its end"]))
SHORT = {*product(("MAML", "ridge, warm", "SAM", "SAM, half"), (*KILLS, "at its end"))}
SHORT |= {(name, "between two steps") for name, _ in PAIRS}


@pytest.mark.parametrize(
    ("name", "kill"), [pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.long) for pair in PAIRS]
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, tmp_path, name, kill):
    expected, told = whole(name)
    if kill == "at its end":
        fit(tmp_path, name, steps=7)
    else:
        with pytest.raises(KilledError):
            fit(tmp_path, name, KILLS[kill])
    fit(tmp_path, name, ckpt_path=last(tmp_path))
    found, logged = everything(tmp_path)
    for value, other in zip(expected, found, strict=True):
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert logged == told
