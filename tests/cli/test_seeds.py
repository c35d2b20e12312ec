"""Several seeds of one configuration: each is its own single run, and the table is their mean."""

import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from metalit.cli.seeds import summary, taken_out
from metalit.errors import InputError

MAML = "configs/sine_maml.yaml"
OTHERS = ["configs/bilevel_ridge.yaml", "configs/sgd_digits.yaml", "configs/low_rank.yaml"]


@pytest.mark.parametrize("config", [MAML, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_each_is_its_own_run_and_the_table_their_mean(metalit, tmp_path, config):
    status, output = metalit("fit", config, "--seeds=2")
    assert status == 0, output
    experiment = tmp_path / "lightning_logs" / config.split("/")[1].removesuffix(".yaml")
    assert "mean of 2 seeds ± 95 % interval" in output
    tables = [pd.read_csv(experiment / f"version_{seed}/test.csv") for seed in range(2)]
    found = pd.read_csv(experiment / "seeds.csv")
    score = found.iloc[0]
    values = [frame[score["score"]].iloc[0] for frame in tables]
    assert values[0] != values[1]
    assert score["mean"] == pytest.approx(np.mean(values))
    assert score["ci95"] == pytest.approx(12.706204736 * np.std(values, ddof=1) / 2**0.5)
    alone = tmp_path / "alone"
    seeds = ["--seed_everything=1", "--data.seed=1"]
    if config != MAML and "low_rank" not in config:
        seeds.append("--data.split_seed=1")
    assert metalit("fit", config, *seeds, f"--trainer.default_root_dir={alone}")[0] == 0
    ends = [
        torch.load(next(folder.rglob("last.ckpt")), weights_only=True)["state_dict"]
        for folder in (experiment / "version_1", alone)
    ]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])


def test_rows_are_matched_by_their_labels():
    first = pd.DataFrame({"predictor": ["learner", "learner", "other"], "inner_steps": [0, 1, None]})
    tables = [first.assign(loss=[1.0, 2.0, 3.0], loss_ci95=9.0, tasks=5), first.assign(loss=[3.0, 2.0, 5.0])]
    found = summary(tables)
    assert found["score"].tolist() == ["loss"] * 3
    assert found["mean"].tolist() == [2.0, 2.0, 4.0]
    assert found["std"].tolist() == pytest.approx([2**0.5, 0.0, 2**0.5])
    assert found["ci95"].tolist() == pytest.approx([12.706204736, 0.0, 12.706204736])
    assert found["inner_steps"].isna().tolist() == [False, False, True]


def test_configs_are_compared_seed_by_seed():
    script = runpy.run_path("scripts/compare_seeds.py")
    columns = ["predictor", "inner_steps", "loss", "loss_ci95", "tasks"]
    first = [
        pd.DataFrame([("learner", k, loss, 9.0, 5) for k, loss in enumerate(seed)], columns=columns)
        for seed in ((4.0, 1.0), (5.0, 3.0))
    ]
    bar = pd.DataFrame([("bar", None, 6.0, 9.0, 5)], columns=columns)
    second = [pd.concat([frame.assign(loss=frame["loss"] + seed), bar]) for seed, frame in enumerate(first)]
    found = {"a": script["by_row"](first), "b": script["by_row"](second)}
    assert [*found["b"]] == ["learner, 0 inner steps", "learner, 1 inner step", "bar"]
    compared = script["differences"](found)
    assert {label: scores["loss"].tolist() for label, scores in compared.items()} == {
        "b, learner, 0 inner steps − a, learner, 0 inner steps": [0.0, 1.0],
        "b, learner, 1 inner step − a, learner, 1 inner step": [0.0, 1.0],
        "b, bar − learner, 1 inner step": [5.0, 2.0],
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "configs",
    [
        [MAML],
        ["configs/sgd_digits.yaml", "configs/sam_digits.yaml"],
        ["configs/bilevel_ridge.yaml"],
        ["configs/low_rank.yaml", "configs/low_rank_exact.yaml"],
    ],
)
def test_each_learner_is_compared(configs, monkeypatch, capsys, tmp_path):
    options = ["--trainer.max_steps=200", "--trainer.val_check_interval=100", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["compare_seeds.py", *configs, "--seeds=2", *options])
    runpy.run_path("scripts/compare_seeds.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "test scores over 2 seeds" in printed
    assert " − " in printed.split("test scores over")[1]


def test_what_is_no_number_of_seeds():
    for given in ("1", "0", "-3", "x", "2.5"):
        with pytest.raises(InputError, match="must be a whole number from 2 to 9999"):
            taken_out(["fit", f"--seeds={given}"])
    with pytest.raises(InputError, match="leave --ckpt_path out"):
        taken_out(["fit", "--seeds", "3", "--ckpt_path", "last"])
    with pytest.raises(InputError, match="trained from their start by fit"):
        taken_out(["test", "--seeds", "3"])
    assert taken_out(["fit", "--config", "a.yaml", "--seeds", "3", "--x=1"]) == (
        3,
        ["fit", "--config", "a.yaml", "--x=1"],
    )
    assert taken_out(["fit", "--config", "a.yaml"]) == (None, ["fit", "--config", "a.yaml"])


def test_several_processes_are_refused(metalit, tmp_path):
    status, output = metalit("fit", MAML, "--seeds=2", "--trainer.devices=2", "--trainer.strategy=ddp_spawn")
    assert status == 2, output
    assert "seeds: 2 processes" in output
    assert not (tmp_path / "lightning_logs").exists()
