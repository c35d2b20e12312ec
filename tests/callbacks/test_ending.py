"""What ends training is told, a run that has ended does not go on by itself, and lacks nothing of its end."""

import torch
from fits import last, same, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

MAML, RIDGE = "configs/sine_maml.yaml", "configs/bilevel_ridge.yaml"
EARLY = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
WORSE = ["--trainer.val_check_interval=2", "--model.optimizer.lr=0.5"]  # and worse


def told(output, start):
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return line


class TestReason:
    def test_the_last_step(self, metalit):
        _, output = metalit("fit", MAML)
        assert told(output, "training ended") == "training ended after outer step 6: trainer.max_steps is 6"
        _, output = metalit("fit", MAML, "--ckpt_path=last")
        assert told(output, "nothing to train").endswith(
            "outer step 6, and trainer.max_steps is 6; to go on, give more steps"
        )

    def test_the_time_is_that_of_all_parts_of_a_run(self, metalit):
        steps = ["--trainer.max_steps=1000000", "--model.scheduler=null"]
        _, output = metalit("fit", MAML, *steps, "--trainer.max_time=00:00:00:01")
        assert "the 0:00:01 of trainer.max_time are used up" in told(output, "training ended")
        _, output = metalit("fit", MAML, *steps, "--trainer.max_time=00:00:00:01", "--ckpt_path=last")
        line = told(output, "nothing to train")
        assert "the 0:00:01 of trainer.max_time are used up" in line
        assert line.endswith("to go on, give more time")
        assert "training sine_maml" not in output
        _, output = metalit("test", MAML, "--ckpt_path=last")
        assert "Timer" not in output

    def test_early_stopping_goes_on_with_more_patience_alone(self, metalit):
        stop = [*EARLY, *WORSE, "--trainer.max_steps=50", "--trainer.callbacks.patience=2"]
        _, output = metalit("fit", MAML, *stop)
        first = told(output, "training ended")
        assert "EarlyStopping ended it: Monitored metric val/loss did not improve in the last 2 records" in first
        _, output = metalit("fit", MAML, *stop, "--ckpt_path=last")
        assert "did not improve in the last 2 records" in told(output, "nothing to train")
        _, output = metalit("fit", MAML, *stop, "--ckpt_path=last", "--trainer.callbacks.patience=4")
        later = told(output, "training ended")
        assert later.split(": ")[0] != first.split(": ")[0]
        assert "in the last 4 records" in later or "max_steps" in later

    def test_a_threshold_that_is_kept_still_stops(self, metalit):
        stop = [*EARLY, "--trainer.callbacks.stopping_threshold=1000.0"]
        _, output = metalit("fit", MAML, *stop)
        assert "step 3: EarlyStopping ended it: Stopping threshold reached" in told(output, "training ended")
        _, output = metalit("fit", MAML, *stop, "--ckpt_path=last")
        assert "Stopping threshold reached" in told(output, "nothing to train")
        _, output = metalit("fit", MAML, *stop, "--ckpt_path=last", "--trainer.callbacks.stopping_threshold=1e-9")
        assert told(output, "training ended") == "training ended after outer step 6: trainer.max_steps is 6"

    def test_a_callback_of_the_users(self, metalit, tmp_path, monkeypatch):
        (tmp_path / "enough.py").write_text(
            "from lightning.pytorch import Callback\n\n\nclass Enough(Callback):\n"
            "    def on_train_batch_end(self, trainer, *_): trainer.should_stop = trainer.global_step == 2\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        _, output = metalit("fit", MAML, "--trainer.callbacks+=enough.Enough")
        assert "step 2: a callback ended it (trainer.should_stop)" in told(output, "training ended")


def test_a_run_that_was_killed_before_its_scores_has_them_when_it_is_resumed(metalit, tmp_path):
    metalit("fit", RIDGE)
    folder = tmp_path / "lightning_logs/bilevel_ridge/version_0"
    files = ["val.csv", "results/features.csv"]
    before = [(folder / name).read_text() for name in files]
    for name in files:
        (folder / name).unlink()
    for asked in ("last", "auto"):
        status, output = metalit("fit", RIDGE, f"--ckpt_path={asked}")
        assert status == 0
        assert "scores on val after 6 outer steps" in output
        assert "nothing to train" in output
        assert [(folder / name).read_text() for name in files] == before
    assert not list(folder.glob("config_*"))


def test_averaged_weights_do_not_take_the_place_of_those_that_training_goes_on_from(tmp_path):
    """Where the last step is not validated, LastCheckpoint saves at the end, when the averages are put in."""

    def fit(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        module = MetaLearner(FewShot(MLP([1, 6, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
        average = EMAWeightAveraging(decay=0.5)
        run = trainer(folder, steps, val_check_interval=4, callbacks=[average, BestCheckpoint(), LastCheckpoint()])
        run.fit(module, TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3), ckpt_path=ckpt_path)
        return module

    fit(tmp_path / "parts", 6)
    kept = torch.load(last(tmp_path / "parts"), weights_only=True)
    assert not same(kept["state_dict"], kept["current_model_state"])
    assert same(fit(tmp_path / "parts", 8, last(tmp_path / "parts")), fit(tmp_path / "whole", 8))


def test_a_run_that_trains_nothing_says_why(metalit, tmp_path):
    status, output = metalit("fit", MAML, "--trainer.max_time=00:00:00:00")
    assert status == 0
    assert "the 0:00:00 of trainer.max_time are used up" in told(output, "nothing was trained")
    assert not list(tmp_path.rglob("version_*"))
