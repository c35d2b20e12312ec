"""Checkpoints, pictures, the progress bar and the table of test errors."""

import csv
import os
import pty
import sys
from contextlib import suppress
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from fits import last, scalars, trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback
from matplotlib.image import imread

from metalit.__main__ import main
from metalit.callbacks import BestCheckpoint, FitFigures, LastCheckpoint
from metalit.callbacks.atomic import AtomicCheckpointIO
from metalit.callbacks.figures import draw_fits
from metalit.data import Columns, Episodes, Scaling, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.evaluation.interval import mean_with_interval
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot

MAML = "configs/sine_maml.yaml"


def folder(tmp_path, version=0):
    return tmp_path / "lightning_logs" / "sine_maml" / f"version_{version}"


def saves(tmp_path, seconds, **options):
    """After which of eight steps ``last.ckpt`` is saved, and whether by the validation."""
    saved = []

    class Watch(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            saved.append((trainer.global_step, trainer.validating))
            super()._save_checkpoint(trainer, filepath)

    module, data = small()
    trainer(tmp_path, 8, **options, callbacks=[Watch(seconds)], num_sanity_val_steps=0).fit(module, data)
    return saved


def small():
    """A learner and its data."""
    module = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), eval_steps=1)
    return module, TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(4, 5, 5), Episodes(4, 5, 5))


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("options", "validated"),
        [
            ({"val_check_interval": 3}, {3, 6}),
            ({"val_check_interval": 0.5}, {4, 8}),
            ({"val_check_interval": 3, "limit_val_batches": 0}, set()),
            ({"val_check_interval": 1.0, "limit_train_batches": 2, "check_val_every_n_epoch": 2}, {4, 8}),
            ({"val_check_interval": 3, "limit_train_batches": 2, "check_val_every_n_epoch": None}, {3, 6}),
        ],
    )
    def test_the_last_one_is_saved_when_its_time_has_come_or_after_the_validation_that_comes(
        self, tmp_path, options, validated
    ):
        saved = saves(tmp_path, 0.0, **options)
        assert saved == [(step, step in validated) for step in range(1, 9)]

    def test_the_last_one_knows_the_outcome_of_a_validation_that_nobody_foresaw(self, tmp_path):
        class Stop(Callback):
            """Ends the run, which then validates."""

            def on_train_batch_end(self, trainer, *_):
                trainer.should_stop = trainer.global_step == 5

        best = BestCheckpoint()
        module, data = small()
        # the stop comes after the save, and before Lightning decides
        run = trainer(tmp_path, 8, val_check_interval=4, callbacks=[best, LastCheckpoint(0.0)])
        run.callbacks.append(Stop())
        run.fit(module, data)
        kept = torch.load(last(tmp_path), weights_only=True)
        state = next(value for key, value in kept["callbacks"].items() if key.startswith("BestCheckpoint"))
        assert kept["global_step"] == 5
        assert state["current_score"] == best.current_score
        assert len(scalars(tmp_path)["val/loss"]) == 2

    def test_the_last_one_must_come_after_the_best_one(self, tmp_path):
        module, data = small()
        with pytest.raises(InputError, match=r"callbacks: LastCheckpoint .*must come after.*BestCheckpoint\(\), Last"):
            trainer(tmp_path, 1, callbacks=[LastCheckpoint(), BestCheckpoint()]).fit(module, data)

    def test_a_save_that_is_cut_short_leaves_the_checkpoint_before_it(self, tmp_path, monkeypatch):
        saver, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
        saver.save_checkpoint({"step": 1}, path)

        class Cut(Exception):
            pass

        def half(checkpoint, file):
            file.write(b"half of it")
            raise Cut

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(Cut):
            saver.save_checkpoint({"step": 2}, path)
        monkeypatch.undo()
        assert list(path.parent.iterdir()) == [path]
        assert torch.load(path, weights_only=True) == {"step": 1}
        saver.save_checkpoint({"step": 3}, path)
        assert torch.load(path, weights_only=True) == {"step": 3}
        assert list(path.parent.iterdir()) == [path]

    def test_what_a_disk_refuses_is_told_where_torch_tells_what_follows(self, tmp_path, monkeypatch):
        """Torch ends its archive after a write that failed, too, and then finds that it is not whole."""

        def full(checkpoint, file):
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 1536 vs 1430") from None

        def broken(checkpoint, file):
            raise RuntimeError("cannot be saved")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
        monkeypatch.setattr(torch, "save", broken)
        with pytest.raises(RuntimeError, match="cannot be saved"):
            AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    def test_what_is_no_local_file_is_saved_as_lightning_does(self):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, "memory://runs/last.ckpt")
        with fsspec.open("memory://runs/last.ckpt") as file:
            assert torch.load(file, weights_only=True) == {"step": 1}

    def test_a_users_own_way_to_save_is_kept(self, tmp_path):
        class Own(TorchCheckpointIO):
            pass

        own = Own()
        module, data = small()
        run = trainer(tmp_path, 1, plugins=[own])
        run.fit(module, data)
        assert run.strategy.checkpoint_io is own

    def test_checkpoints_are_saved_beside_the_one_that_they_replace(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path / "no such folder"))
        monkeypatch.setattr("tempfile.mkstemp", None)
        module, data = small()
        run = trainer(tmp_path, 1)
        run.fit(module, data)
        assert isinstance(run.strategy.checkpoint_io, AtomicCheckpointIO)
        assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 1

    def test_the_last_one_waits_for_its_time(self, metalit, tmp_path):
        assert saves(tmp_path, 1000.0, val_check_interval=1.0) == [(8, True)]
        assert metalit("fit", MAML, "--trainer.val_check_interval=1.0", "--last_checkpoint.seconds=0")[0] == 0
        assert torch.load(folder(tmp_path) / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 6

    def test_the_best_one_has_the_lowest_validation_loss(self, metalit, tmp_path):
        # a rate that makes everything worse after the first validation
        metalit("fit", MAML, "--trainer.val_check_interval=1", "--model.optimizer.lr=0.5")
        best = torch.load(folder(tmp_path) / "checkpoints/best.ckpt", weights_only=True)
        last = torch.load(folder(tmp_path) / "checkpoints/last.ckpt", weights_only=True)
        state = next(value for key, value in last["callbacks"].items() if key.startswith("BestCheckpoint"))
        assert last["global_step"] == 6
        assert best["global_step"] < 6
        assert float(state["best_model_score"]) <= float(last_loss(last))

    def test_a_moved_run_remembers_its_best_score(self, tmp_path):
        state = BestCheckpoint().state_dict() | {
            "dirpath": "where it was",
            "best_model_path": "where it was/best.ckpt",
            "best_model_score": torch.tensor(0.25),
        }
        moved = BestCheckpoint()
        moved.dirpath = str(tmp_path)
        (tmp_path / "best.ckpt").touch()
        moved.load_state_dict(state)
        assert moved.best_model_score == 0.25
        assert moved.best_model_path == str(tmp_path / "best.ckpt")
        fake = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=bool))
        assert not moved.check_monitor_top_k(fake, torch.tensor(0.3))
        assert moved.check_monitor_top_k(fake, torch.tensor(0.2))


def last_loss(checkpoint):
    return next(
        value["current_score"] for key, value in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint")
    )


class TestFigures:
    def learner(self, inputs=1):
        torch.manual_seed(0)
        module = MetaLearner(FewShot(MLP([inputs, 8, 1])), SGD(0.01), Unrolled(1), eval_steps=5)
        module.scaling = Scaling.identity(inputs, 1)
        return module

    def test_draws_truth_support_and_the_fits_that_there_are(self):
        data = TaskDataModule(Sine(), *[Episodes(4, 5, 10)] * 3)
        figure = draw_fits(self.learner(), data.pictured("val", 3), Sine(), (0, 1, 5, 10))
        assert len(figure.axes) == 3
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        assert list(lines) == ["truth", "before adapting", "1 step", "5 steps", "support"]
        x, y = lines["truth"].get_data()
        assert (np.diff(x) >= 0).all()
        task = data.pictured("val", 3)
        # the support points lie on the truth
        points = torch.cat([task.support.y[0, :, 0], task.query.y[0, :, 0]])
        np.testing.assert_allclose(np.sort(y), np.sort(points.numpy()))
        np.testing.assert_allclose(lines["support"].get_ydata(), task.support.y[0, :, 0].numpy())
        assert not np.allclose(lines["before adapting"].get_ydata(), lines["5 steps"].get_ydata())
        # a fit is drawn as far as the truth, support points included
        adapted = self.learner().adapt(task.support.x[0], task.support.y[0], steps=5)
        np.testing.assert_array_equal(lines["5 steps"].get_xdata(), x)
        expected = adapted(torch.tensor(x)[:, None].float())[:, 0]
        np.testing.assert_allclose(lines["5 steps"].get_ydata(), expected.numpy(), rtol=1e-4, atol=1e-5)

    def test_padding_is_not_drawn(self):
        points = Points(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), torch.tensor([[True, True, False, False]]))
        task = Task(Points(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)), points, torch.zeros(1, dtype=torch.long))
        figure = draw_fits(self.learner(), task, Sine(), (0,))
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        assert len(lines["before adapting"].get_xdata()) == 2 + 2
        assert len(lines["truth"].get_xdata()) == 2 + 2

    def test_noisy_points_are_not_joined_to_a_curve(self):
        data = TaskDataModule(Sine(noise=0.5), *[Episodes(4, 5, 10)] * 3)
        truth = draw_fits(self.learner(), data.pictured("val", 1), data.tasks, (0,)).axes[0].lines[0]
        assert (truth.get_marker(), truth.get_linestyle()) == (".", "None")

    def test_several_inputs_are_drawn_as_predicted_over_true(self):
        source = SimpleNamespace(columns=Columns("task", ["a", "b"], ["c"]), noisy=False)
        points = Points(torch.randn(1, 4, 2), torch.randn(1, 4, 1))
        task = Task(points, points, torch.zeros(1, dtype=torch.long))
        figure = draw_fits(self.learner(2), task, source, (0, 1))
        assert figure.axes[0].get_xlabel() == "true c"

    def test_appear_in_tensorboard_at_the_outer_step(self, metalit, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        metalit("fit", MAML, "--figures.tasks=2")
        events = EventAccumulator(str(folder(tmp_path)), size_guidance={"images": 0})
        events.Reload()
        assert [event.step for event in events.Images("pictures/fits_val")] == [3, 6]
        assert imread(folder(tmp_path) / "figures/val.png").std() > 0.05

    def test_bad_settings(self):
        with pytest.raises(InputError, match="tasks=-1"):
            FitFigures(tasks=-1)


class TestProgress:
    def test_is_quiet_where_there_is_no_terminal(self, metalit):
        _, output = metalit("fit", MAML)
        assert "it/s" not in output
        assert "\x1b[" not in output

    def test_shows_rate_errors_and_the_best_one_in_a_terminal(self, tmp_path):
        options = ["--trainer.max_steps=6", "--trainer.val_check_interval=0.5", "--trainer.log_every_n_steps=3"]
        options += ["--model.compile=false", "--model.fused_steps=3"]
        sizes = ["--data.val.tasks=6", f"--trainer.default_root_dir={tmp_path}", "--figures.tasks=0"]
        process, terminal = pty.fork()
        if process == 0:
            status = 1
            try:
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                status = main(["fit", "--config", MAML, *options, *sizes])
            finally:
                sys.stdout.flush()
                os._exit(status)
        shown = bytearray()
        with suppress(OSError):  # which is how a terminal ends
            while data := os.read(terminal, 4096):
                shown.extend(data)
        _, status = os.waitpid(process, 0)
        text = shown.decode(errors="replace")
        assert status == 0, text
        for words in ("Training", "6/6", "it/s", "val/loss:", "best:", "train/loss:"):
            assert words in text, words


class TestReport:
    def test_rows_of_the_file_are_the_errors(self, metalit, trained, tmp_path):
        trained("configs/curves_gapminder.yaml")
        status, output = metalit("test", "configs/curves_gapminder.yaml", "--data.test.tasks=all")
        assert status == 0
        file = tmp_path / "lightning_logs/curves_gapminder/version_0/test.csv"
        with file.open() as handle:
            rows = list(csv.DictReader(handle))
        assert {row["predictor"] for row in rows} == {
            "learner",
            "one polynomial for all tasks",
            "a polynomial for each support set",
            "an empirical-Bayes polynomial",
        }
        assert rows[0]["tasks"] == "43"
        # errors of the baselines do not depend on training: those of the shipped data
        errors = {row["predictor"]: float(row["lifeExp_absolute_error"]) for row in rows}
        assert errors["one polynomial for all tasks"] == pytest.approx(10.0, abs=0.5)
        assert errors["a polynomial for each support set"] == pytest.approx(2.1, abs=0.5)
        assert errors["an empirical-Bayes polynomial"] == pytest.approx(1.6, abs=0.3)
        assert "43 test tasks, adapted to 3 points each" in output.replace("\n", " ")

    def test_one_task_is_enough(self, metalit, trained):
        trained(MAML)
        assert metalit("test", MAML, "--data.test.tasks=1")[0] == 0

    def test_interval_is_that_of_a_sample_mean(self):
        values = torch.tensor([1.0, 2.0, 4.0, 9.0])
        interval = mean_with_interval(values)
        assert interval.mean == 4.0
        assert interval.half_width == pytest.approx(1.96 * np.std(values.numpy(), ddof=1) / 2)

    def test_values_that_are_not_finite_are_counted_and_not_dropped(self):
        interval = mean_with_interval(torch.tensor([1.0, torch.inf, torch.nan]))
        assert np.isnan(interval.mean)
        assert (interval.diverged, interval.tasks) == (2, 3)


def test_best_checkpoint_watches_what_it_is_told():
    assert BestCheckpoint(monitor="val/loss_step_5").monitor == "val/loss_step_5"
