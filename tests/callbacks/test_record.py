"""What ``run.json`` holds, and what it never does."""

import hashlib
import json
import os
import socket

import pytest
import torch
from repository import ROOT

from metalit.callbacks.facts import data_hashes, weights_hash, without_places

MAML, GAPMINDER = "configs/sine_maml.yaml", "configs/curves_gapminder.yaml"


def record_of(root, name, version=0):
    return json.loads((root / f"lightning_logs/{name}/version_{version}/run.json").read_text())


def test_a_run_is_recorded_from_its_start_to_its_end(trained, tmp_path):
    trained(MAML)
    record = record_of(tmp_path, "sine_maml")
    assert record["command"][:3] == ["fit", "--config", MAML]
    assert record["config"]["trainer"]["max_steps"] == 6
    assert record["config"]["model"]["init_args"]["problem"]["init_args"]["network"]["init_args"]["sizes"][0] == 1
    assert {"python", "metalit", "torch", "lightning"} <= record["versions"].keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert record["from_step"] == 0
    assert record["end"]["steps"] == 6
    assert record["end"]["seconds"] > 0
    kept = torch.load(tmp_path / "lightning_logs/sine_maml/version_0/checkpoints/last.ckpt", weights_only=True)
    assert record["end"]["weights"] == weights_hash(kept["state_dict"])


def test_no_person_machine_or_place_is_named(trained, tmp_path, monkeypatch):
    trained(MAML)
    text = (tmp_path / "lightning_logs/sine_maml/version_0/run.json").read_text()
    for secret in (str(tmp_path), str(ROOT), os.path.expanduser("~"), socket.gethostname(), "PYTHONPATH"):
        assert secret not in text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/home/ada/points.csv", "…/points.csv"),
        ("~/points.csv", "…/points.csv"),
        ("--data.tasks.file=/home/ada/x.csv", "--data.tasks.file=…/x.csv"),
        ("{file: /home/ada/x.csv, other: /y/z}", "{file: …/x.csv, other: …/z}"),
        ("C:\\Users\\ada\\x.csv", "…/x.csv"),
        ("data/x.csv", "data/x.csv"),
        ("../up/x.csv", "../up/x.csv"),
        ("./here/x.csv", "./here/x.csv"),
        ("1/2", "1/2"),
        ("/", "…/"),
    ],
)
def test_a_place_is_shortened_to_its_last_name(given, kept):
    assert without_places(given) == kept


def test_every_data_file_is_hashed(tmp_path):
    (tmp_path / "pictures/b").mkdir(parents=True)
    (tmp_path / "points.csv").write_text("x,y\n")
    (tmp_path / "pictures/b/1.png").write_bytes(b"1")
    data = {
        "init_args": {
            "tasks": {"init_args": {"file": f"{tmp_path}/points.csv", "folder": f"{tmp_path}/pictures", "x": ["x"]}},
            "predict_file": f"{tmp_path}/points.csv.gone",
        }
    }
    found = data_hashes(data)
    assert found.keys() == {"…/points.csv", "…/pictures"}
    assert found["…/points.csv"] == hashlib.sha256(b"x,y\n").hexdigest()
    (tmp_path / "pictures/b/1.png").write_bytes(b"2")
    assert data_hashes(data)["…/pictures"] != found["…/pictures"]
    (tmp_path / "pictures/b/1.png").write_bytes(b"1")
    assert data_hashes(data) == found
    (tmp_path / "pictures/b/1.png").rename(tmp_path / "pictures/b/2.png")
    assert data_hashes(data)["…/pictures"] != found["…/pictures"]


def test_the_hash_of_weights_is_of_their_bits():
    weights = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(2)}
    again = {"b": torch.tensor(2), "a": torch.tensor([0.0, 1.0])}
    assert weights_hash(weights) == weights_hash(again)
    for other in (
        {**weights, "a": torch.tensor([-0.0, 1.0])},
        {**weights, "a": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {**weights, "a": torch.tensor([[0.0, 1.0]])},
        {"c": weights["a"], "b": weights["b"]},
    ):
        assert weights_hash(other) != weights_hash(weights)


def test_what_is_gone_on_with_keeps_the_former_records(trained, metalit, tmp_path):
    trained(MAML)
    assert metalit("fit", MAML, "--ckpt_path=last", "--trainer.max_steps=9")[0] == 0
    record = record_of(tmp_path, "sine_maml")
    assert (record["from_step"], record["end"]["steps"]) == (6, 9)
    (earlier,) = record["earlier"]
    assert (earlier["from_step"], earlier["end"]["steps"]) == (0, 6)
