"""A run is run again, and said to be the same or not."""

import json

import pytest

from metalit.__main__ import main

MAML = "configs/sine_maml.yaml"
OTHERS = ["configs/bilevel_ridge.yaml", "configs/sgd_digits.yaml", "configs/sam_digits.yaml", "configs/low_rank.yaml"]


def again(folder, capfd, *options):
    status = main(["reproduce", str(folder), *options])
    captured = capfd.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize("config", [MAML, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_the_same_bits(trained, capfd, tmp_path, config):
    trained(config)
    experiment = tmp_path / "lightning_logs" / config.split("/")[1].removesuffix(".yaml")
    status, output = again(experiment / "version_0", capfd)
    assert status == 0, output
    assert f"the same: the weights of {experiment / 'version_1'} are those of {experiment / 'version_0'}" in output
    ends = [json.loads((experiment / f"version_{n}/run.json").read_text())["end"] for n in (0, 1)]
    assert ends[0]["weights"] == ends[1]["weights"]


def test_what_differs_is_named(trained, capfd, tmp_path):
    trained(MAML)
    folder = tmp_path / "lightning_logs/sine_maml/version_0"
    record = json.loads((folder / "run.json").read_text())
    record["end"]["weights"] = "0" * 64
    record["versions"]["torch"] = "1.0"
    record["git"] = {"commit": "abc", "clean": True}
    record["data"] = {"points.csv": "1"}
    (folder / "run.json").write_text(json.dumps(record))
    status, output = again(folder, capfd)
    assert status == 1
    assert "NOT the same" in output
    assert "versions.torch: '1.0' then" in output
    assert "git.commit: 'abc' then" in output
    assert "data.points.csv: '1' then, None now" in output
    assert "config." not in output


def test_a_run_that_was_gone_on_with_is_repeated_in_one_go(trained, metalit, capfd, tmp_path):
    trained(MAML)
    longer = ("--trainer.max_steps=9", "--trainer.val_check_interval=1.0", "--model.scheduler.init_args.T_max=6")
    assert metalit("fit", MAML, "--ckpt_path=last", *longer)[0] == 0
    status, output = again(tmp_path / "lightning_logs/sine_maml/version_0", capfd)
    assert status == 0, output
    assert "after 9 outer steps" in output


@pytest.mark.parametrize("spoil", ["end", "file", "config"])
def test_no_end_no_record_no_config(trained, capfd, tmp_path, spoil):
    trained(MAML)
    folder = tmp_path / "lightning_logs/sine_maml/version_0"
    if spoil == "end":
        record = json.loads((folder / "run.json").read_text())
        del record["end"]
        (folder / "run.json").write_text(json.dumps(record))
    else:
        (folder / {"file": "run.json", "config": "config.yaml"}[spoil]).unlink()
    status, output = again(folder, capfd)
    assert status == 2
    (line,) = output.splitlines()
    assert ("has not ended" if spoil == "end" else "holds no run.json and config.yaml") in line
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version_0"]


def test_a_record_of_another_form_is_told(tmp_path, capfd):
    whole = {"from_step": 0, "config": {}, "end": {"steps": 3, "weights": "x"}}
    (tmp_path / "config.yaml").write_text("trainer: 3")
    for part in (
        *({"from_step": None}, {"from_step": "x"}, {"config": 3}, {"earlier": 3}, {"earlier": [3]}, {"earlier": [{}]}),
        {"end": {"steps": "3", "weights": "x"}},
    ):
        (tmp_path / "run.json").write_text(json.dumps({**whole, **part}))
        status, output = again(tmp_path, capfd)
        assert status == 2
        assert output.endswith("is not what a run writes; give another run\n")
        assert len(output.splitlines()) == 1


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_no_run_named(capfd, args):
    assert main(["reproduce", *args]) == 2
    assert "which run?" in capfd.readouterr().err
