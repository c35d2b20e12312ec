"""From a folder shaped like Omniglot to a learner that names new classes, by the command line."""

import shutil
from pathlib import Path

import pandas as pd
import yaml
from picture_folders import omniglot_like
from PIL import Image

CONFIG = """
seed_everything: 0
model:
  class_path: MetaLearner
  init_args:
    problem:
      class_path: Prototypes
      init_args: {network: {class_path: Conv4, init_args: {channels: auto, size: auto, width: 8}}}
data:
  class_path: TaskDataModule
  init_args:
    tasks: {class_path: ClassTasks, init_args: {source: {class_path: ImageFolder, init_args: {size: 16, channels: 1}}}}
    train: {ways: 4, shots: 1, queries: 5}
    val: {ways: 3, shots: 1, queries: 5}
    test: {ways: 4, shots: 5, queries: 5}
trainer: {accelerator: cpu}
"""


def test_a_folder_of_characters_is_learned_tested_and_used(metalit, tmp_path):
    pictures, config = omniglot_like(tmp_path / "omniglot"), tmp_path / "characters.yaml"
    given = yaml.safe_load(CONFIG)
    given["data"]["init_args"]["tasks"]["init_args"]["source"]["init_args"]["folder"] = str(pictures)
    config.write_text(yaml.safe_dump(given))
    status, output = metalit("fit", str(config), "--figures.tasks=1", "--trainer.max_steps=20")
    assert status == 0, output
    assert "(val/accuracy = " in output
    status, output = metalit("test", str(config), "--figures.tasks=1")
    assert status == 0, output
    run = tmp_path / "lightning_logs/characters/version_0"
    assert {"val.png", "test.png", "test_errors.png"} <= {path.name for path in (run / "figures").iterdir()}
    table = pd.read_csv(run / "test.csv").set_index("predictor")
    assert {"learner", "nearest neighbour", "nearest class mean", "logistic regression"} == set(table.index)
    assert table["accuracy"]["learner"] > 0.6  # by chance it is 0.25
    held_out = pd.read_csv(run / "test_confusion.csv", index_col="true class")
    assert held_out.to_numpy().sum() == 6 * 4 * 5
    names = list(held_out.index)
    assert all("/" in name for name in names)
    # the user's own folder: two examples each of classes never seen, and others of them beside the folders
    mine = asked_of(pictures, names[:3], tmp_path / "mine")
    shutil.rmtree(pictures)  # the training data is not needed
    status, output = metalit("predict", str(config), f"--data.predict_folder={mine}")
    assert status == 0, output
    found = pd.read_csv(tmp_path / "mine_predicted.csv")
    assert len(found) == 9
    assert set(found["predicted"]) <= {"class 0", "class 1", "class 2"}
    right = [
        file.startswith(kind.replace(" ", "_")) for file, kind in zip(found["file"], found["predicted"], strict=True)
    ]
    assert sum(right) >= 6
    assert (found.filter(like="probability").sum(axis=1) - 1).abs().max() < 1e-5
    with Image.open(tmp_path / "mine_predicted.png") as picture:
        assert picture.width > 400


def asked_of(pictures: Path, names: list[str], folder: Path) -> Path:
    for number, name in enumerate(names):
        files = sorted((pictures / name).iterdir())
        (folder / f"class {number}").mkdir(parents=True)
        for file in files[:2]:
            shutil.copy(file, folder / f"class {number}")
        for file in files[-3:]:
            shutil.copy(file, folder / f"class_{number}_{file.name}")
    return folder
