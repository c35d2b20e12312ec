"""A checkpoint is of no device: it goes on, adapts and predicts on either; and a run resumes on a GPU bit for bit."""

import pytest
import torch
from fits import Kill, KilledError, last, trainer
from on_device import CASES, apart, maml, on, sine

from metalit.callbacks import LastCheckpoint
from metalit.modules import MetaLearner

pytestmark = pytest.mark.gpu
STEPS = 8
WAYS = [("cpu", "device"), ("device", "cpu")]


def fit(root, device, learner, data, *callbacks, ckpt_path=None, **options):
    callbacks = [LastCheckpoint(seconds=0.0), *callbacks]
    options = {"val_check_interval": 4, "num_sanity_val_steps": 0, "callbacks": callbacks, **on(device), **options}
    trainer(root, STEPS, **options).fit(learner, data, ckpt_path=ckpt_path)
    return learner


def kept(root):
    """What a run ended with."""
    found = torch.load(last(root), weights_only=True, map_location="cpu")
    assert found["global_step"] == STEPS
    return {name: found.get(name) for name in ("state_dict", "optimizer_states", "inner")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MAML", {}),
        ("MAML", {"compile": True, "optimizer": None}),
        ("MAML", {"compile": True, "optimizer": None, "fused_steps": 2}),
        ("logistic, warm", {"optimizer": None}),
        ("SAM", {"optimizer": None}),
    ],
    ids=["MAML", "MAML, compiled", "MAML, compiled, fused", "logistic, warm", "SAM"],
)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(tmp_path, device, name, options):
    case, fused = CASES[name], options.get("fused_steps", 1)
    every = {"log_every_n_steps": fused}
    fit(tmp_path / "whole", device, case.learner(**options), case.data(), **every)
    with pytest.raises(KilledError):
        fit(tmp_path / "parts", device, case.learner(**options), case.data(), Kill(6), **every)
    end = case.learner(**options)
    fit(tmp_path / "parts", device, end, case.data(), ckpt_path=last(tmp_path / "parts"), **every)
    torch.testing.assert_close(kept(tmp_path / "parts"), kept(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=["from the CPU", "to the CPU"])
@pytest.mark.parametrize("name", ["MAML", "logistic, warm", "SAM"])
def test_a_run_goes_on_on_the_other_device(tmp_path, device, record_property, name, way):
    first, second = (device if each == "device" else each for each in way)
    case, double = CASES[name], {"precision": "64-true"}
    expected = fit(tmp_path / "whole", "cpu", case.learner(), case.data(), **double)
    with pytest.raises(KilledError):
        fit(tmp_path / "parts", first, case.learner(), case.data(), Kill(6), **double)
    found = case.learner()
    fit(tmp_path / "parts", second, found, case.data(), ckpt_path=last(tmp_path / "parts"), **double)
    error = apart(found, expected, case.learner())
    record_property("error", error)
    assert error < 1e-8


@pytest.mark.parametrize("way", WAYS, ids=["from the CPU", "to the CPU"])
def test_what_was_learned_on_one_device_adapts_on_the_other(tmp_path, device, record_property, way):
    first, second = (device if each == "device" else each for each in way)
    fit(tmp_path, first, maml(optimizer=None), sine())
    x = torch.linspace(-4, 4, 5).unsqueeze(1)
    y, rest = torch.sin(x), torch.linspace(-5, 5, 50).unsqueeze(1)
    found = []
    for place in (first, second):
        made = {name: getattr(maml(), name) for name in ("problem", "inner_optimizer", "hypergradient")}
        learner = MetaLearner.load_from_checkpoint(last(tmp_path), map_location=place, **made).to(place)
        found.append(learner.adapt(x.to(place), y.to(place), steps=3)(rest.to(place)).cpu())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    record_property("error", error)
    assert error < 1e-4
