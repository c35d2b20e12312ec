"""Mixed precision with the device's own gradient scaler: the gradient is nearly the full one, and overflow is seen."""

import pytest
import torch
from fits import last, trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from on_device import CASES, maml, on, outer, sine

pytestmark = pytest.mark.gpu
BOUNDS = {"16-mixed": 5e-3, "bf16-mixed": 4e-2}
KINDS = ("MAML", "logistic, warm", "supervised", "SAM")


def precision(name, device, scale=2.0**16):
    """The Trainer's option; on the CPU, where the Trainer takes 16-mixed for bf16-mixed, a plugin does it."""
    if name == "16-mixed":
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        return {"plugins": [MixedPrecision("16-mixed", device, scaler=scaler)]}
    return {"precision": name}


class Gradient(Callback):
    """Keeps what the optimiser was given first."""

    def __init__(self):
        self.found = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.found is None:
            gradients = [p.grad.reshape(-1) for group in optimizer.param_groups for p in group["params"]]
            self.found = torch.cat(gradients).double().cpu()


def gradient(tmp_path, device, learner, data, **options):
    kept = Gradient()
    trainer(tmp_path, 1, callbacks=[kept], logger=False, val_check_interval=1.0, **on(device), **options).fit(
        learner, data
    )
    return kept.found


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_nearly_the_full_one(tmp_path, device, record_property, name, kind):
    case = CASES[name]
    full = gradient(tmp_path, device, case.learner(), case.data())
    half = gradient(tmp_path, device, case.learner(), case.data(), **precision(kind, device))
    error = float((half - full).norm() / full.norm())
    record_property("error", error)
    assert error < BOUNDS[kind]


@pytest.mark.parametrize("kind", BOUNDS)
def test_compiled_it_is_too(tmp_path, capfd, device, record_property, kind):
    full = gradient(tmp_path, device, maml(), sine())
    half = gradient(tmp_path, device, maml(compile=True), sine(), **precision(kind, device))
    error = float((half - full).norm() / full.norm())
    record_property("error", error)
    assert "not compiled" not in capfd.readouterr().out
    assert error < BOUNDS[kind]


def test_the_trainer_brings_the_scaler_of_the_device(tmp_path, device):
    if device == "cpu":
        pytest.skip("on the CPU the Trainer takes 16-mixed for bf16-mixed")
    made = trainer(tmp_path, 1, precision="16-mixed", **on(device))
    assert made.precision_plugin.device == "cuda"
    assert type(made.precision_plugin.scaler) is torch.amp.GradScaler


def test_too_large_a_scale_falls_and_no_step_is_lost(tmp_path, device, record_property):
    learner, start = maml(), maml()
    made = trainer(tmp_path, 6, **on(device), **precision("16-mixed", device, 2.0**40))
    made.fit(learner, sine())
    scale = torch.load(last(tmp_path), weights_only=True)["MixedPrecision"]["scale"]
    record_property("scale", scale)
    assert made.global_step == 6
    assert 1 <= scale < 2.0**40
    assert torch.isfinite(outer(learner)).all()
    assert not torch.equal(outer(learner), outer(start))
