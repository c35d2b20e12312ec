"""What ``trainer.validate`` and ``trainer.test`` return is what was found, and is written where it belongs."""

import pytest
import torch
from fits import bare, last, scalars, trainer
from lightning.pytorch.loggers import CSVLogger
from tiny import DATA, LEARNERS, supervised
from torch.utils.data import DataLoader, TensorDataset

FOUND = {
    "meta": {"val": {"loss", "loss_step_0", "loss_step_1"}, "test": {"loss_step_0", "loss_step_1"}},
    "bilevel": {"val": {"loss"}, "test": {"loss"}},
    "supervised": {"val": {"loss", "accuracy"}, "test": {"loss", "accuracy"}},
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_metrics_are_handed_back(kind, tmp_path):
    module, data = LEARNERS[kind](), DATA[kind]()
    run = bare(tmp_path, steps=2)
    run.fit(module, data)
    for split, evaluate in (("val", run.validate), ("test", run.test)):
        (found,) = evaluate(module, data, verbose=False)
        assert {f"{split}/{name}" for name in FOUND[kind][split]} <= found.keys()
        assert all(type(value) is float for value in found.values())
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        assert metrics == pytest.approx(found, rel=1e-6)
        judged = float(module.task_losses[:, 1].mean()) if kind == "meta" else module.scores["learned"]["loss"]
        assert found[f"{split}/loss_step_1" if kind == "meta" else f"{split}/loss"] == pytest.approx(judged)


def test_they_are_written_once_over_the_outer_step(tmp_path):
    module, data = supervised(), DATA["supervised"]()
    trainer(tmp_path, steps=4).fit(module, data)
    run = trainer(tmp_path, steps=4, callbacks=[])
    (found,) = run.test(module, data, ckpt_path=last(tmp_path), verbose=False)
    logged = scalars(tmp_path)
    assert logged["test/loss"] == [(4, pytest.approx(found["test/loss"]))]
    assert "epoch" not in logged


def test_the_table_that_lightning_prints_has_them(tmp_path, capsys):
    module = supervised()
    rows = TensorDataset(torch.randn(6, 4), torch.arange(6) % 3)
    run = bare(tmp_path, logger=CSVLogger(tmp_path))
    (found,) = run.validate(module, DataLoader(rows, batch_size=4))
    assert found.keys() == {"val/loss", "val/accuracy"}
    assert f"{found['val/loss']:.3f}" in capsys.readouterr().out
    (again,) = run.validate(module, DataLoader(rows, batch_size=2), verbose=False)
    assert again == pytest.approx(found)
