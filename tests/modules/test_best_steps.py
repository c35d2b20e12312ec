"""A prediction takes as many inner steps as validation found best, unless it is told how many."""

import pytest
import torch
from fits import last, trainer

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

METASGD = "configs/sine_metasgd.yaml"


def learner(lr, steps=1, **options):
    torch.manual_seed(0)
    return MetaLearner(FewShot(MLP([1, 8, 1])), SGD(lr), Unrolled(steps), eval_steps=4, **options)


def data(**changes):
    episodes = {"train": Episodes(4, 5, 5), "val": Episodes(6, 5, 10), "test": Episodes(6, 5, 10)}
    return TaskDataModule(Sine(), **{**episodes, **changes})


def answers(module, **options):
    x = torch.tensor([[-1.0], [0.5], [2.0]])
    return module.adapt(x, x.sin(), **options)(x)


@pytest.mark.parametrize(("lr", "best"), [(0.02, [4]), (1.0, [0, 1])], ids=["more is better", "more diverges"])
def test_the_number_is_that_of_the_lowest_validation_loss(lr, best, tmp_path):
    module = learner(lr)
    assert module.prediction_steps == 1
    trainer(tmp_path, steps=2).fit(module, data())
    losses = module.evaluation.losses.mean(0).nan_to_num(torch.inf)
    assert module.prediction_steps == int(losses.argmin())
    assert module.prediction_steps in best
    assert torch.equal(answers(module), answers(module, steps=module.prediction_steps))
    assert not torch.equal(answers(module), answers(module, steps=2))
    given = {"problem": FewShot(MLP([1, 8, 1])), "inner_optimizer": SGD(lr), "hypergradient": Unrolled(1)}
    loaded = MetaLearner.load_from_checkpoint(last(tmp_path), **given, eval_steps=4)
    assert torch.equal(answers(loaded), answers(module))
    # another evaluation does not change it
    before = loaded.prediction_steps
    trainer(tmp_path, logger=False, callbacks=[], enable_checkpointing=False).validate(loaded, data(), verbose=False)
    assert loaded.prediction_steps == before


def test_without_a_validation_it_is_that_of_training(tmp_path):
    module = learner(0.02, steps=2)
    trainer(tmp_path / "validated", steps=2).fit(module, data())
    assert module.prediction_steps == 4
    trainer(tmp_path, steps=2, limit_val_batches=0).fit(module, data())
    assert module.prediction_steps == 2
    assert torch.equal(answers(module), answers(module, steps=2))


def test_predict_says_how_many_and_why(metalit, trained, tmp_path):
    trained(METASGD)
    path = tmp_path / "lightning_logs/sine_metasgd/version_0/checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    points = tmp_path / "points.csv"
    points.write_text("task,x,y\nmine,-2.0,0.4\nmine,1.0,0.0\nmine,2.5,\n")
    told = []
    for best, *options in ((3,), (None,), (3, "--model.eval_steps=2")):
        torch.save({**checkpoint, "best_steps": best}, path)
        status, output = metalit("predict", METASGD, f"--data.predict_file={points}", *options)
        assert status == 0, output
        told += [line for line in output.splitlines() if line.startswith("inner steps: ")]
    assert told == [
        "inner steps: 3, the best number in validation",
        "inner steps: 1, as trained: there was no validation",
        "inner steps: 2, as asked",
    ]


def test_a_prediction_that_is_not_finite_writes_nothing(metalit, trained, tmp_path):
    trained(METASGD)
    points = tmp_path / "points.csv"
    points.write_text("task,x,y\nfar,-2.0,1e30\nfar,1.0,0.0\nfar,2.5,\n")
    status, output = metalit("predict", METASGD, f"--data.predict_file={points}", "--model.eval_steps=50")
    assert status == 2
    assert "are not finite" in output.splitlines()[-1]
    assert "model.eval_steps" in output.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.glob("points*")) == ["points.csv"]
