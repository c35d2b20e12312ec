"""What a checkpoint was trained with, beside what it is used with: every difference is told, or refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from metalit.__main__ import main
from metalit.cli.provenance import Difference, check, differences, given_keys, on_purpose, run_of, weight
from metalit.errors import InputError

MAML = "configs/sine_maml.yaml"
SHORT = ("--trainer.max_steps=2", "--trainer.val_check_interval=1.0")


def spec(path, **given):
    return {"class_path": path, "init_args": given}


def test_differences_are_found_key_by_key():
    kept = {
        "model": {
            "_class_path": "m.A",
            "_instantiator": "x",
            "net": spec("n.Net", sizes=[1, 2], act="a", old=1),
            "rate": 1.0,
            "by": {"*": 1.0},
            "loss": None,
            "gone": spec("p.SAM"),
        }
    }
    now = {
        "class_path": "m.A",
        "init_args": {
            "net": spec("n.Net", sizes=[1, 3], act="b", new=2),
            "rate": 1,
            "by": {"*": 2.0},
            "loss": spec("l.Huber", delta=1.0),
            "gone": None,
        },
    }
    found = {each.key: (each.trained, each.now) for each in differences(kept, {"model": now, "data": {}})}
    assert found == {
        "model.net.sizes": ([1, 2], [1, 3]),
        "model.net.act": ("a", "b"),
        "model.by.*": (1.0, 2.0),
        "model.loss": (None, "l.Huber"),
        "model.gone": ("p.SAM", None),
    }


def test_of_another_class_the_class_alone_is_told():
    kept = {"data": {"_class_path": "m.A", "tasks": spec("n.Sine", x=1)}}
    other = {"class_path": "m.A", "init_args": {"tasks": spec("n.Curves", x=2)}}
    (found,) = differences(kept, {"data": other})
    assert str(found) == "data.tasks=Curves, and the checkpoint was trained with Sine"
    (found,) = differences(kept, {"data": {"class_path": "m.B", "init_args": {"tasks": spec("n.Sine", x=3)}}})
    assert found.key == "data"


def test_a_configuration_of_any_kind_is_compared():
    for odd in ({"class_path": 5, "init_args": [1]}, {"class_path": "n.Net", "init_args": "x"}, [{}], {1: 2}, "x"):
        found = list(differences({"model": {"_class_path": "m.A", 1: 2, "net": odd}}, {"model": spec("m.A", net=None)}))
        assert [each.key for each in found] == ["model.net"]
    deep = {}
    for _ in range(10**5):
        deep = {"a": deep}
    with pytest.raises(InputError, match="nested too deeply"):
        list(check("it", {"model": deep}, {"model": deep}, "test", []))


@pytest.mark.parametrize(
    ("key", "fit", "validate", "test", "predict"),
    [
        ("model", "refused", "refused", "refused", "refused"),
        ("model.inner_optimizer.lr", "refused", "refused", "refused", "refused"),
        ("model.hypergradient.steps", "refused", "refused", "refused", "refused"),
        ("model.problem.adapt", "refused", "refused", "refused", "refused"),
        ("model.perturbation.rho", "refused", "mentioned", "mentioned", "nothing"),
        ("model.compile", "nothing", "nothing", "nothing", "nothing"),
        ("model.compile_seconds", "nothing", "nothing", "nothing", "nothing"),
        ("model.optimizer.lr", "nothing", "nothing", "nothing", "nothing"),
        ("data.tasks.x", "refused", "refused", "refused", "refused"),
        ("data.split_seed", "refused", "refused", "refused", "nothing"),
        ("data.val", "refused", "refused", "refused", "nothing"),
        ("data.batch_size", "refused", "mentioned", "mentioned", "nothing"),
        ("data.train.shots", "refused", "mentioned", "mentioned", "nothing"),
        ("data.val.shots", "mentioned", "refused", "nothing", "nothing"),
        ("data.test.shots", "mentioned", "nothing", "refused", "nothing"),
        ("data.test.tasks", "mentioned", "nothing", "mentioned", "nothing"),
        ("data.tasks.file", "refused", "refused", "refused", "mentioned"),
        ("data.predict_file", "nothing", "nothing", "nothing", "nothing"),
    ],
)
def test_what_a_difference_is_for_each_subcommand(key, fit, validate, test, predict):
    found = [weight(Difference(key, "a", "b"), stage) for stage in ("fit", "validate", "test", "predict")]
    assert found == [fit, validate, test, predict]
    assert weight(Difference("data.tasks.file", "old/it.csv", "it.csv"), "test") == "mentioned"


def test_what_the_command_line_names_is_on_purpose():
    args = ["test", "--model.inner_optimizer.init_args.lr=1", "--data.tasks.class_path", "Sine", "--model=MetaLearner"]
    assert given_keys(args) == {"model.inner_optimizer.lr", "data.tasks", "model"}
    for key, found in (
        ("model.inner_optimizer.lr", True),
        ("data.tasks.x", True),
        ("model", True),
        ("model.eval_steps", False),
        ("model.inner_optimizer", False),
    ):
        assert on_purpose(key, args) == found, key


@pytest.fixture
def trained(metalit):
    """A run whose inner rate and number of tasks are others than its config's."""
    status, output = metalit("fit", MAML, *SHORT, "--model.inner_optimizer.lr=0.02", "--data.test.tasks=3")
    assert status == 0, output


@pytest.fixture
def points(tmp_path):
    (tmp_path / "points.csv").write_text("task,x,y\nmine,-2.0,0.4\nmine,1.0,0.0\nmine,2.5,\n")
    return f"--data.predict_file={tmp_path / 'points.csv'}"


@pytest.mark.usefixtures("trained")
def test_another_setting_than_trained_is_refused_unless_it_is_said(metalit, points, tmp_path):
    told = "model.inner_optimizer.lr=0.01, and the checkpoint was trained with 0.02"
    for subcommand, *options in (
        ("fit", "--ckpt_path=last", "--trainer.max_steps=4"),
        ("validate",),
        ("test", "--data.test.tasks=4"),
        ("predict", points),
    ):
        status, output = metalit(subcommand, MAML, *SHORT, *options)
        assert status == 2, subcommand
        assert told in output.strip().splitlines()[-1]
        assert "--model.inner_optimizer.lr=0.02 as trained" in output.strip().splitlines()[-1]
        assert "--model.inner_optimizer.lr=0.01 on purpose" in output.strip().splitlines()[-1]
    assert not (tmp_path / "points_predicted.csv").exists()
    status, output = metalit("test", MAML, *SHORT, "--model.inner_optimizer.lr=0.01", "--data.test.tasks=4")
    assert status == 0, output
    assert f"metalit: {told}" in output
    assert "metalit: data.test.tasks=4, and the checkpoint was trained with 3" in output
    assert metalit("test", MAML, *SHORT, "--model.inner_optimizer.lr=0.02", "--data.test.tasks=3")[0] == 0


@pytest.mark.usefixtures("trained")
def test_without_a_config_the_runs_own_is_taken_wherever_it_lies(points, tmp_path, capfd, monkeypatch):
    moved = tmp_path / "elsewhere/lightning_logs/renamed/version_0"
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "lightning_logs/sine_maml/version_0", moved)
    best = moved / "checkpoints/best.ckpt"
    assert main(["test", "--ckpt_path", str(best)]) == 0
    output = capfd.readouterr().out
    assert f"metalit: with the configuration of the run, {moved / 'config.yaml'}" in output
    assert "was trained with" not in output
    assert len((moved / "test_tasks.csv").read_text().splitlines()) == 3 + 1
    written = yaml.safe_load((moved / "config_test.yaml").read_text())
    assert written["model"]["init_args"]["inner_optimizer"]["init_args"]["lr"] == 0.02
    assert main(["predict", f"--ckpt_path={best}", points]) == 0
    assert main(["validate", "--ckpt_path", str(best), "--data.val.tasks=4", "--model.inner_optimizer.lr=0.03"]) == 0
    output = capfd.readouterr().out
    assert "metalit: model.inner_optimizer.lr=0.03, and the checkpoint was trained with 0.02" in output
    assert "metalit: data.val.tasks=4, and the checkpoint was trained with 6" in output
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["validate", "--experiment=renamed", "--ckpt_path=last"]) == 0
    assert "validating" in capfd.readouterr().out
    assert [path.name for path in moved.parent.iterdir()] == ["version_0"]
    assert main(["validate", "--ckpt_path=last"]) == 2
    assert "of which run? Give --ckpt_path FILE, or --experiment NAME" in capfd.readouterr().err
    (moved / "config.yaml").unlink()
    assert main(["test", f"--ckpt_path={best}"]) == 2
    assert "there is no config.yaml in the run" in capfd.readouterr().err


def test_a_runs_own_config_names_its_experiment(metalit, tmp_path):
    assert metalit("fit", MAML, *SHORT)[0] == 0
    run = tmp_path / "lightning_logs/sine_maml/version_0"
    own = str(run / "config.yaml")
    assert run_of(own) == run
    assert main(["fit", "--config", own]) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == ["version_0", "version_1"]
    assert main(["fit", "--config", own, "--ckpt_path=last", "--trainer.max_steps=4", "--model.scheduler.T_max=2"]) == 0
    assert torch.load(run.with_name("version_1") / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    # what that run went on from is not what it left
    resumed = str(run.with_name("version_1") / "config.yaml")
    assert Path(yaml.safe_load(Path(resumed).read_text())["ckpt_path"]).name == "last.ckpt"
    assert f"testing {run.with_name('version_1') / 'checkpoints/best.ckpt'}" in metalit("test", resumed, tiny=False)[1]
    assert [path.name for path in run.parent.parent.iterdir()] == ["sine_maml"]


def test_on_slurm_a_checkpoint_that_nobody_named_is_not_taken(metalit, tmp_path, monkeypatch):
    for name, value in {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 17, "PROCID": 0, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "hpc_ckpt_3.ckpt").touch()
    status, output = metalit("fit", MAML, *SHORT)
    assert status == 2
    assert "hpc_ckpt_3.ckpt' by itself" in output.strip().splitlines()[-1]


def test_a_checkpoint_that_python_saved_has_nothing_to_compare(metalit, tmp_path):
    assert metalit("fit", MAML, *SHORT)[0] == 0
    path = tmp_path / "lightning_logs/sine_maml/version_0/checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in checkpoint.items() if "hyper_param" not in name}, path)
    status, output = metalit("test", MAML, *SHORT, "--model.inner_optimizer.lr=0.03")
    assert status == 0
    assert "keeps no configuration" in output
