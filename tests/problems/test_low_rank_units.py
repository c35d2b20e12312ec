"""Low rank in any units: fits are the same but for their scale, and all that is told is in the matrix's units."""

import numpy as np
import pytest
import torch
from fits import Kill, KilledError, last, scalars, trainer
from torch.testing import assert_close

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data import MatrixDataModule
from metalit.hypergradients import Direct, Unrolled
from metalit.inner import SGD, Newton
from metalit.modules import BilevelLearner
from metalit.problem import Matrix
from metalit.problems import LowRank

VALUES = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SCALES = [4.0**13, 4.0**-13]  # about 1e8 and 1e-8


def fit(root, scale, exact=False, precision="32-true", steps=20, callbacks=(), ckpt=None):
    root.mkdir(exist_ok=True)
    np.save(root / "matrix.npy", scale * VALUES.numpy())
    torch.manual_seed(0)
    inside, outside = (Newton(), Unrolled()) if exact else (SGD(), Direct())
    learner = BilevelLearner(
        LowRank(6, 4, 2, exact), inside, outside, optimizer=lambda groups: torch.optim.Adam(groups, lr=0.1)
    )
    data = MatrixDataModule(str(root / "matrix.npy"))
    callbacks = [BestCheckpoint(), LastCheckpoint(), *callbacks]
    run = trainer(root, steps, precision=precision, callbacks=callbacks, log_every_n_steps=5)
    run.fit(learner, data, ckpt_path=ckpt)
    return learner, data


def results(learner, data):
    found = learner.results(data.draw("val", torch.arange(1)))
    return found["u"]["u"].detach(), found["v"]["v"].detach()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("exact", "precision"), [(False, "32-true"), (True, "32-true"), (False, "64-true")])
def test_a_fit_is_that_of_the_scaled_matrix_bit_for_bit(scale, exact, precision, tmp_path):
    (first, _), (other, data) = (
        fit(tmp_path / name, factor, exact, precision) for name, factor in (("one", 1.0), ("other", scale))
    )
    (u, v), (large_u, large_v) = results(first, data), results(other, data)
    assert first.problem.unit == 1
    assert torch.equal(large_u, scale**0.5 * u)
    # where V is solved for, it is that of the matrix which is asked for
    assert exact or torch.equal(large_v, scale**0.5 * v)
    for name in ("train/loss", "val/loss"):
        one, two = scalars(tmp_path / "one")[name], scalars(tmp_path / "other")[name]
        assert [(step, pytest.approx(scale**2 * value, rel=1e-6)) for step, value in one] == two
    assert scalars(tmp_path / "one")["val/relative_error"] == scalars(tmp_path / "other")["val/relative_error"]


@pytest.mark.parametrize("scale", [1e8, 1e-8])
@pytest.mark.parametrize("exact", [False, True])
def test_the_optimum_is_reached_at_every_scale_and_written_in_its_units(scale, exact, tmp_path):
    learner, data = fit(tmp_path, scale, exact, steps=60 if exact else 300)
    learner.trainer.validate(learner, data, verbose=False)
    assert abs(learner.scores["learned"]["excess"]) < 1e-3
    u, v = (factor.double() for factor in results(learner, data))
    left, values, right = torch.linalg.svd(VALUES, full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    assert (u @ v.T / scale - best).norm() < 0.1 * best.norm()
    kept = torch.load(last(tmp_path), weights_only=True)["state_dict"]
    assert torch.equal(kept["problem.u"].double(), u)
    if not exact:
        assert torch.equal(kept["problem.v"].double(), v)
    loaded = LowRank(6, 4, 2, exact)
    loaded.load_state_dict({name.removeprefix("problem."): value for name, value in kept.items()})
    assert torch.equal(loaded.u.double(), u)
    loss = learner.scores["learned"]["loss"]
    assert loss == pytest.approx(float((scale * VALUES - u @ v.T).square().sum()), rel=1e-3)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, data = fit(tmp_path / "whole", 1e-8)
    with pytest.raises(KilledError):
        fit(tmp_path / "run", 1e-8, callbacks=[Kill(10)])
    resumed, _ = fit(tmp_path / "run", 1e-8, ckpt=last(tmp_path / "run"))
    for one, other in zip(results(whole, data), results(resumed, data), strict=True):
        assert torch.equal(one, other)


def test_a_learned_factor_keeps_its_units_where_another_matrix_comes():
    problem = LowRank(6, 4, 2).double()
    begun = {name: value.detach().clone() for name, value in problem.outer().items()}
    observed, key = torch.ones(6, 4, dtype=torch.bool), torch.tensor(0)
    seen = []
    for scale in (1e8, 1.0, 1e-8):
        problem.check(Matrix(scale * VALUES, observed, key))
        seen.append({name: value.clone() for name, value in problem.state_dict().items()})
    for name, value in begun.items():
        assert torch.equal(seen[0][name], 2.0**13 * value)
        assert torch.equal(seen[0][name], seen[1][name])
        assert torch.equal(seen[0][name], seen[2][name])
    assert problem.state_dict().keys() == {"u", "v"}


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-4, 1.0, 1e7])
@pytest.mark.parametrize("missing", [False, True])
def test_an_exact_factor_is_exact_at_every_scale(scale, missing):
    torch.manual_seed(1)
    problem = LowRank(6, 4, 2, exact=True)
    observed = torch.ones(6, 4, dtype=torch.bool)
    if missing:
        observed[0, 1] = observed[3, 2] = False
    values = (scale * VALUES * observed).float()
    task = Matrix(values, observed, torch.tensor(0))
    outer = {"problem": {"u": problem.u.detach()}, "optimizer": {}}
    found = Unrolled(steps=1)(problem, Newton(), outer, task).inner["v"].double()
    u = problem.u.detach().double()
    for column in range(4):
        rows = observed[:, column]
        right = torch.linalg.lstsq(u[rows], values[rows, column, None].double()).solution[:, 0]
        assert_close(found[column], right, rtol=1e-5, atol=1e-6 * float(right.norm()))
