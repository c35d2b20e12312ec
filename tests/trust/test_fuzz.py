"""Fed with anything: a result, or one line of at most 500 letters and the exit status 2 (or 1), whatever comes in."""

import os
import random
import shutil
from pathlib import Path

import pytest
from fuzz import Fed, command_line, judge_call, judge_command, spoilt_bytes, spoilt_yaml, table
from picture_folders import omniglot_like

from metalit.checkpoints import read_checkpoint
from metalit.data import Arrays, ClassTasks, CsvRows, Curves, Episodes, ImageFolder
from metalit.data.classes.asked import AskedPictures
from metalit.data.table import Columns, read_asked

CASES = int(os.environ.get("METALIT_CASES", "10000"))
SHORT = 60
CURVES = ["task", "a", "b", "y"]


def both(share, short=SHORT):
    """Few cases in the quick run, and this share of all in the long one."""
    return pytest.mark.parametrize(
        "cases",
        [
            pytest.param(range(short), id="few"),
            pytest.param(range(short, short + int(share * CASES)), id="many", marks=pytest.mark.trust),
        ],
    )


@pytest.fixture
def fed(trust):
    counts = Fed()
    yield counts
    trust("cases", counts)
    assert not counts.faults, "\n".join(counts.faults[:20])


@both(0.12, 6)
def test_command_lines(cases, fed, trained, tmp_path):
    trained("configs/sine_maml.yaml")
    (tmp_path / "points.csv").write_text("task,x,y\n" + "".join(f"a,{n},{n % 2 or ''}\n" for n in range(9)))
    for case in cases:
        judge_command(command_line(random.Random(case), tmp_path), fed, "command lines")


@both(0.08, 4)
def test_configurations(cases, fed, tmp_path):
    texts = [path.read_text() for path in sorted(Path("configs").glob("*.yaml"))]
    for case in cases:
        draw = random.Random(case)
        file = tmp_path / "config.yaml"
        file.write_bytes(spoilt_yaml(draw, draw.choice(texts)))
        options = ["--trainer.fast_dev_run=1", "--model.compile=false", f"--trainer.default_root_dir={tmp_path}"]
        judge_command(["fit", f"--config={file}", *options], fed, "configurations")


@both(0.25)
def test_curves(cases, fed, tmp_path):
    file = tmp_path / "curves.csv"
    for case in cases:
        draw = random.Random(case)
        file.write_bytes(table(draw, CURVES))
        skip, size = draw.random() < 0.5, Episodes(shots=draw.choice((1, 3, 50)))

        def read(skip=skip, size=size):
            curves = Curves(str(file), "task", ["a", "b"], ["y"], skip_short=skip)
            curves.needs(dict.fromkeys(("train", "val", "test"), size))
            curves.prepare()
            for split in ("train", "val", "test"):
                curves.check(split, size)

        judge_call(read, fed, "tables of curves", f"case {case}: {file.read_bytes()!r}")


@both(0.25)
def test_points_to_predict(cases, fed, tmp_path):
    file = tmp_path / "points.csv"
    for case in cases:
        draw = random.Random(case)
        file.write_bytes(table(draw, CURVES, asked="y"))
        alone = draw.random() < 0.3

        def read(alone=alone):
            read_asked(str(file), Columns("task", ["a", "b"], ["y"]), {}, alone)

        judge_call(read, fed, "points to predict", f"case {case}: {file.read_bytes()!r}")


@both(0.1)
def test_tables_of_classes(cases, fed, tmp_path):
    file = tmp_path / "rows.csv"
    for case in cases:
        file.write_bytes(table(random.Random(case), ["kind", "a", "b"]))
        judge_call(lambda: CsvRows(str(file), "kind", classes=True).read(), fed, "tables of classes", f"case {case}")


@both(0.1)
def test_checkpoints(cases, fed, trained, tmp_path):
    trained("configs/sine_maml.yaml")
    whole = (tmp_path / "lightning_logs/sine_maml/version_0/checkpoints/last.ckpt").read_bytes()
    file = tmp_path / "spoilt.ckpt"
    for case in cases:
        file.write_bytes(spoilt_bytes(random.Random(case), whole))
        judge_call(lambda: read_checkpoint(file), fed, "checkpoints", f"case {case}")


@both(0.05, 6)
def test_folders_of_images(cases, fed, tmp_path):
    whole = omniglot_like(tmp_path / "whole", 3, 4, 5, 28)
    for case in cases:
        draw, folder = random.Random(case), tmp_path / "spoilt"
        shutil.copytree(whole, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for file in draw.sample(files, draw.choice((0, 1, 3))):
            file.write_bytes(spoilt_bytes(draw, file.read_bytes()))
        if draw.random() < 0.3:
            (folder / draw.choice(("Thumbs.db", "empty", "é☃", "notes.txt"))).write_bytes(b"x")
        if draw.random() < 0.2:
            shutil.rmtree(draw.choice(files).parent)
        if draw.random() < 0.2:
            (folder / "nothing").mkdir()
        asks = draw.random() < 0.3
        if asks:
            shutil.copy(draw.choice([file for file in files if file.exists()]), folder / "asked.png")

        def read(folder=folder, asks=asks):
            if asks:
                AskedPictures(str(folder)).values((1, 8, 8))
                return
            tasks = ClassTasks(ImageFolder(str(folder), size=8))
            tasks.prepare()
            for split in ("train", "val", "test"):
                tasks.check(split, Episodes(shots=1, queries=1, ways=2))

        judge_call(read, fed, "folders of images", f"case {case}")
        shutil.rmtree(folder)


@both(0.05)
def test_arrays(cases, fed, tmp_path):
    import numpy as np

    file = tmp_path / "arrays.npz"
    generator = np.random.default_rng(0)
    np.savez(file, x=generator.integers(0, 255, (40, 8, 8), dtype=np.uint8), y=np.repeat(np.arange(8), 5))
    wholes = [file.read_bytes()]
    np.savez_compressed(file, x=np.zeros((40, 8, 8)), y=np.repeat(np.arange(8), 5))
    wholes.append(file.read_bytes())
    np.save(tmp_path / "x.npy", np.ones((40, 8)))
    np.save(tmp_path / "y.npy", np.repeat(np.arange(8), 5))
    wholes.append((tmp_path / "x.npy").read_bytes())
    for case in cases:
        file.write_bytes(spoilt_bytes(random.Random(case), wholes[case % 3]))

        def read(y=str(tmp_path / "y.npy") if case % 3 == 2 else None):
            tasks = ClassTasks(Arrays(str(file), y))
            tasks.prepare()
            tasks.check("train", Episodes(shots=1, queries=1, ways=2))

        judge_call(read, fed, "arrays", f"case {case}")
