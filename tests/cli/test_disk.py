"""What the file system refuses is one line with the path and a way out, and the last good checkpoint stays whole."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from metalit.callbacks import LastCheckpoint
from metalit.checkpoints import read_checkpoint

MAML, RIDGE = "configs/sine_maml.yaml", "configs/bilevel_ridge.yaml"
OFTEN = ["--last_checkpoint.seconds=0", "--trainer.val_check_interval=1.0"]


@pytest.fixture
def experiment(tmp_path):
    return tmp_path / "lightning_logs" / "sine_maml"


def only_line(output):
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("metalit: error: ")]
    return line


def test_a_full_disk_leaves_the_last_checkpoint(metalit, experiment, monkeypatch):
    save = torch.save

    def full(checkpoint, file):
        if checkpoint["global_step"] < 4:
            return save(checkpoint, file)
        with open("/dev/full", "wb", buffering=0) as disk:
            save(checkpoint, disk)

    monkeypatch.setattr(torch, "save", full)
    status, output = metalit("fit", MAML, *OFTEN)
    monkeypatch.undo()
    assert status == 1
    folder = experiment / "version_0/checkpoints"
    line = only_line(output)
    assert f"error: {folder / 'last.ckpt'}: No space left on device; free some space" in line
    assert "--ckpt_path last" in line
    assert os.listdir(folder) == ["last.ckpt"]
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 3
    assert metalit("fit", MAML, "--ckpt_path=last")[0] == 0


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_a_folder_that_is_removed_in_mid_run(metalit, experiment, monkeypatch, again):
    save = LastCheckpoint.save_now

    def remove(saver, trainer):
        if trainer.global_step == 3:
            shutil.rmtree(experiment / "version_0")
            if again:
                (experiment / "version_0").mkdir()
        save(saver, trainer)

    monkeypatch.setattr(LastCheckpoint, "save_now", remove)
    status, output = metalit("fit", MAML, *OFTEN, "--trainer.logger=false")
    assert status == 1
    assert f"error: {experiment / 'version_0'}: the folder of the run was removed" in only_line(output)
    assert not list(experiment.rglob("*.ckpt"))


@pytest.mark.parametrize("below", ["lightning_logs", "lightning_logs/sine_maml"])
def test_a_file_in_place_of_the_folder_of_runs(metalit, tmp_path, below):
    file = tmp_path / below
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    status, output = metalit("fit", MAML)
    assert status == 2
    line = only_line(output)
    assert str(tmp_path / "lightning_logs/sine_maml") in line
    assert "--trainer.default_root_dir" in line
    assert file.read_text() == "mine"


def test_a_file_in_place_of_a_folder_of_a_run(metalit, experiment):
    metalit("fit", MAML)
    (experiment / "version_0/figures").write_text("mine")
    assert metalit("test", MAML, "--figures.tasks=1")[0] == 0  # pictures never end a run
    metalit("fit", RIDGE)
    results = experiment.with_name("bilevel_ridge") / "version_0/results"
    shutil.rmtree(results)
    results.write_text("mine")
    status, output = metalit("fit", RIDGE, "--ckpt_path=last", "--trainer.max_steps=9")
    assert status == 1
    assert f"error: {results}" in only_line(output)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_root_that_cannot_be_written(metalit, tmp_path, monkeypatch, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, output = metalit("fit", MAML)
    assert status == 2
    assert f"cannot be made ({os.strerror(number)}); name one that can be written" in only_line(output)


class TestPredict:
    @pytest.fixture
    def points(self, tmp_path):
        file = tmp_path / "points.csv"
        file.write_text("task,x,y\nmine,-2.0,0.4\nmine,1.0,0.0\nmine,2.5,\n")
        return file

    def test_replaces_what_it_wrote_and_nothing_else(self, metalit, trained, points):
        trained(MAML)
        predict = ["predict", MAML, f"--data.predict_file={points}"]
        target = points.with_name("points_predicted.csv")
        status, output = metalit(*predict)
        assert status == 0
        assert f"predictions: {target}\n" in output
        first = target.read_text()
        status, output = metalit(*predict)
        assert status == 0
        assert f"predictions: {target} (replaced)\n" in output
        assert target.read_text() == first
        for name, words in ((target.name, "task,x,y\nmy,own,notes\n"), (target.with_suffix(".png").name, "my picture")):
            target.unlink(missing_ok=True)
            target.with_suffix(".png").unlink(missing_ok=True)
            points.with_name(name).write_text(words)
            status, output = metalit(*predict)
            assert status == 2
            assert f"{points.with_name(name)} is no earlier prediction of y, and is not overwritten" in only_line(
                output
            )
            assert points.with_name(name).read_text() == words

    def test_beside_a_file_in_a_folder_that_cannot_be_written(self, metalit, trained, points, monkeypatch):
        trained(MAML)

        def refuse(frame, path, **_):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("pandas.DataFrame.to_csv", refuse)
        status, output = metalit("predict", MAML, f"--data.predict_file={points}")
        assert status == 1
        line = only_line(output)
        assert f"error: {points.with_name('points_predicted.csv')}: Permission denied; use a folder that can be" in line
        assert "for predict, a copy of the file there" in line
