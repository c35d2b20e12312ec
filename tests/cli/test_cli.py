"""The command line: what it builds, what it finds, and what it says of bad input."""

import shutil
import signal
from functools import wraps
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from metalit.__main__ import main

MAML = "configs/sine_maml.yaml"
LONG = pytest.mark.long  # what takes the way of another option


@pytest.fixture
def print_config(metalit):
    def run(*options, config=MAML):
        with pytest.raises(SystemExit) as stop:
            metalit("fit", config, *options, "--print_config", tiny=False)
        assert stop.value.code == 0

    return run


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "--ckpt_path", "tensorboard"):
        assert word in text
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("metalit ")


def test_help_does_not_wait_for_torch(shell):
    code = "import sys, metalit.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert shell("-c", code).returncode == 0


def test_runs_as_a_module(shell):
    assert "metalit fit" in shell("-m", "metalit", "--help").stdout


def test_interpolation_holds_over_files_and_overrides(print_config, capfd, tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text("trainer: {max_steps: 77}\n")
    print_config()
    assert _steps(capfd) == 20000
    print_config(f"--config={later}")
    assert _steps(capfd) == 77
    print_config(f"--config={later}", "--trainer.max_steps=55")
    assert _steps(capfd) == 55


def test_one_device_is_used_unless_more_are_asked_for(print_config, capfd):
    for options, devices in (([], 1), (["--config=configs/trainer/gpus.yaml"], -1), (["--trainer.devices=4"], 4)):
        print_config(*options)
        text = capfd.readouterr().out
        assert yaml.safe_load(text[text.index("seed_everything") :])["trainer"]["devices"] in (devices, str(devices))


def _steps(capfd):
    text = capfd.readouterr().out
    config = yaml.safe_load(text[text.index("seed_everything") :])
    assert config["trainer"]["max_steps"] == config["model"]["init_args"]["scheduler"]["init_args"]["T_max"]
    return config["trainer"]["max_steps"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.max_stps=3"], ["trainer.max_stps", "did you mean 'trainer.max_steps'"]),
        (["--modle.eval_steps=3"], ["'modle'", "did you mean 'model'"]),
        pytest.param(["--model.evl_steps=3"], ["'evl_steps'", "did you mean 'eval_steps'"], marks=LONG),
        pytest.param(["--model.problem.network.szes=[1,1]"], ["'szes'", "did you mean 'sizes'"], marks=LONG),
        (["--model.inner_optimizer.lrr=1"], ["SGD has no key 'lrr'", "did you mean 'lr'"]),
        (["--model.inner_optimizer=SDG"], ["no class 'SDG'", "did you mean 'SGD'"]),
        pytest.param(["--data.train.shts=3"], ["'shts'", "did you mean 'shots'"], marks=LONG),
        pytest.param(["--data.train.shots=many"], ["data.train.shots", "int", "many"], marks=LONG),
        (["--data.train.shots=0"], ["data.train.shots=0", "at least 1"]),
        (["--model.problem.adapt=['ot.*']"], ["adapt", "'ot.*'", "out.weight"]),
        (["--model.inner_optimizer.lr=-1"], ["lr=-1", "positive"]),
        (["--model.hypergradient.steps=3"], ["weights=[0.5, 0.5]", "3 numbers"]),
        (["--model.eval_steps=1"], ["eval_steps=1", "2 inner step"]),
        (["--model.clip_norm=0"], ["clip_norm=0", "positive"]),
        (["--model.lr_by_name={'head*': 0.1}"], ["lr_by_name", "'head*'", "problem.out.weight"]),
        (["--model.problem.network.sizes=[1,4,2]"], ["network", ", 2)", ", 1)", "as many outputs as the targets"]),
        pytest.param(["--model.optimiser.lr=3"], ["'optimiser'", "did you mean 'optimizer'"], marks=LONG),
        (["--model.optimizer.lrr=3"], ["model.optimizer: Adam has no key 'lrr'", "did you mean 'lr'"]),
        pytest.param(
            ["--model.scheduler.T_mx=3"], ["CosineAnnealingLR has no key 'T_mx'", "did you mean 'T_max'"], marks=LONG
        ),
        (["--model.optimizer.lr=-3"], ["model.optimizer", "-3"]),
        pytest.param(["--model.lr_by_name={'*': -1.0}"], ["lr_by_name", "-1.0"], marks=LONG),
        (["--model.problem.network.sizes=[2,4,1]"], ["network", "cannot take inputs of shape", "1 column(s) of x"]),
        (["--model.scheduler.T_max=${trainer.max_stps}"], ["max_stps"]),
        (["--trainer.accumulate_grad_batches=2"], ["accumulate_grad_batches=2", "model.tasks_per_chunk"]),
        pytest.param(["--trainer.gradient_clip_val=1"], ["gradient_clip_val=1", "model.clip_norm"], marks=LONG),
        (["--trainer.val_check_interval=30000"], ["val_check_interval"]),
        (
            ["--trainer.val_check_interval=00:00:10:00"],
            ["error: trainer.val_check_interval: a validation by the clock"],
        ),
        (["--trainer.strategy=nonsense"], ["trainer: ", "'nonsense'", "ddp"]),
        (["--trainer.accelerator=cpu", "--trainer.strategy=fsdp"], ["trainer: ", "fsdp"]),
        pytest.param(["--last_checkpoint.seconds=-1"], ["seconds=-1"], marks=LONG),
        pytest.param(["--trainer.max_steps=-1"], ["trainer.max_steps=-1", "such as"], marks=LONG),
        (["--ckpt_path=nowhere.ckpt"], ["ckpt_path='nowhere.ckpt'", "no such file"]),
        (["--ckpt_path=best"], ["ckpt_path=best", "metalit fit"]),
        pytest.param(["--config=nowhere.yaml"], ["nowhere.yaml", "not exist"], marks=LONG),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gets_one_clear_error_before_training(options, told, metalit, tmp_path):
    status, output = metalit("fit", MAML, *options, tiny=False)
    assert status == 2
    message = output.strip().splitlines()[-1]
    assert message.startswith("metalit: error: ")
    for words in told:
        assert words in message
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_error_of_another_rank_says_whose_it_is(metalit, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    status, output = metalit("fit", MAML, "--trainer.max_steps=-1", tiny=False)
    assert status == 2
    assert output.strip().splitlines()[-1].startswith("metalit: rank 3: error: ")


def test_tasks_of_slurm_that_lightning_cannot_count_are_an_input_error(metalit, monkeypatch):
    for name, value in {"NTASKS": 2, "JOB_NAME": "train", "JOB_ID": 17, "PROCID": 0, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    status, output = metalit("fit", MAML, tiny=False)
    assert status == 2
    assert output.strip().splitlines()[-1].startswith("metalit: error: trainer: You set `--ntasks=2`")


def test_the_command_line_leaves_signals_as_they_were(metalit, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))  # where no scontrol is
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    module = tmp_path / "sender.py"
    module.write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\n\nclass Send(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 1:\n            os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    status, output = metalit("fit", MAML, "--trainer.callbacks+=sender.Send")
    assert status == 143
    assert "stopped by a signal after outer step 2" in output
    assert "the job is not requeued: scontrol requeue 17: " in output
    assert [signal.getsignal(number) for number in numbers] == before


def test_sigterm_that_lightning_hears_is_told_by_the_exit_status(metalit, monkeypatch):
    @wraps(Trainer.fit)  # whose arguments are the command line's
    def ended(*_, **__):
        raise SIGTERMException

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", ended)
    with pytest.raises(SystemExit) as stopped:
        metalit("fit", MAML)
    assert stopped.value.code == 143


@pytest.mark.parametrize("step", [1, 4])
def test_control_c_has_an_exit_status_of_its_own(metalit, monkeypatch, tmp_path, step):
    (tmp_path / "keys.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass Press(Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        f"        if trainer.global_step == {step}:\n            raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            metalit("fit", MAML, "--trainer.callbacks+=keys.Press")
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130


def test_control_c_before_training_is_no_traceback(metalit, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("metalit.cli.command_line.MetalitCLI", press)
    status, output = metalit("fit", MAML)
    assert status == 130
    assert output == "metalit: interrupted\n"


def test_a_misspelt_key_in_a_file(metalit, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(MAML).read_text().replace("inner_optimizer:", "iner_optimizer:"))
    status, output = metalit("fit", str(wrong), tiny=False)
    assert status == 2
    assert "did you mean 'inner_optimizer'" in output


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda text: "", "is no CSV table"),
        (lambda text: text.splitlines()[0], "has no row"),
        (lambda text: text.replace("lifeExp", "life"), "no column 'lifeExp'"),
        (lambda text: text.replace("Asia,1952", "Asia,", 1), "an empty cell in line 2"),
        (lambda text: text.replace("28.801", "old"), "'old' in line 2"),
        (lambda text: text + "Atlantis,Sea,1952,40.0,1,1\n", "'Atlantis'"),
    ],
    ids=["empty", "header only", "unknown column", "missing cell", "text", "too few rows"],
)
def test_a_bad_table_gets_one_clear_error_before_training(edit, told, metalit, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(edit(Path("data/gapminder.csv").read_text()))
    status, output = metalit("fit", "configs/curves_gapminder.yaml", f"--data.tasks.file={table}", tiny=False)
    assert status == 2
    assert told in output.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.ckpt"))


class TestCheckpoints:
    def test_last_goes_on_in_the_same_folder_to_the_same_end(self, metalit, tmp_path):
        whole = tmp_path / "whole"
        assert metalit("fit", MAML, f"--trainer.default_root_dir={whole}")[0] == 0
        scheduler = "--model.scheduler.T_max=6"
        assert metalit("fit", MAML, "--trainer.max_steps=3", "--trainer.val_check_interval=1.0", scheduler)[0] == 0
        status, output = metalit("fit", MAML, "--ckpt_path=last")
        assert status == 0
        folders = list((tmp_path / "lightning_logs" / "sine_maml").iterdir())
        assert [folder.name for folder in folders] == ["version_0"]
        halves, once = (
            torch.load(root / "lightning_logs/sine_maml/version_0/checkpoints/last.ckpt", weights_only=True)
            for root in (tmp_path, whole)
        )
        assert halves["global_step"] == once["global_step"] == 6
        for name, value in once["state_dict"].items():
            assert torch.equal(value, halves["state_dict"][name]), name
        assert "keeps" not in output

    def test_last_means_the_newest_version_that_has_one(self, metalit, trained, tmp_path):
        trained(MAML)
        empty = tmp_path / "lightning_logs" / "sine_maml" / "version_10"
        empty.mkdir()
        shutil.copytree(empty.with_name("version_0"), empty.with_name("version_1"))
        shutil.copytree(empty.with_name("version_1"), empty.with_name("version_3_old"))
        _, output = metalit("validate", MAML, "--ckpt_path=last")
        assert "version_1/checkpoints/last.ckpt" in output

    def test_says_when_it_keeps_a_setting_of_the_checkpoint(self, metalit):
        metalit("fit", MAML, "--model.scheduler=null", "--trainer.max_steps=3")
        _, output = metalit("fit", MAML, "--model.scheduler=null", "--ckpt_path=last", "--model.optimizer.lr=0.5")
        told = [line for line in output.splitlines() if line.startswith("metalit: warning: the checkpoint keeps")]
        assert len(told) == 1
        assert "keeps optimizer.lr=0.003 " in told[0]
        assert "; 0.5, as now configured" in told[0]

    def test_never_overrides_the_configuration(self, metalit, trained):
        trained(MAML)
        _, output = metalit("test", MAML, "--model.eval_steps=3")
        assert "│ 3 " in output
        assert "│ 4 " not in output

    def test_of_another_network_is_refused(self, metalit):
        metalit("fit", MAML)
        status, output = metalit(
            "fit", MAML, "--ckpt_path=last", "--trainer.max_steps=9", "--model.problem.network.sizes=[1,30,1]"
        )
        assert status == 2
        assert "another network" in output
        assert "(40, 1)" in output

    def test_at_the_last_step_has_nothing_left_to_train(self, metalit):
        metalit("fit", MAML)
        status, output = metalit("fit", MAML, "--ckpt_path=last")
        assert status == 0
        assert "nothing to train" in output
        assert "at outer step 6" in output

    def test_without_the_state_of_a_run_is_refused(self, metalit, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
        status, output = metalit("test", MAML, f"--ckpt_path={tmp_path / 'bare.ckpt'}")
        assert status == 2
        assert "it lacks ['global_step', 'loops'" in output

    def test_damaged_is_refused(self, metalit, trained, tmp_path):
        trained(MAML)
        last = tmp_path / "lightning_logs/sine_maml/version_0/checkpoints/last.ckpt"
        last.write_bytes(last.read_bytes()[:3000])
        status, output = metalit("fit", MAML, "--ckpt_path=last")
        assert status == 2
        assert "last.ckpt' is damaged" in output

    def test_with_code_in_it_is_refused_and_not_run(self, metalit, tmp_path):
        evil, mark = tmp_path / "evil.ckpt", tmp_path / "mark"
        torch.save({"state_dict": {}, "payload": _Payload(mark)}, evil)
        status, output = metalit("test", MAML, f"--ckpt_path={evil}")
        assert status == 2
        assert "a pickle can run any code" in output
        assert not mark.exists()


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_checkpoint(metalit, tmp_path):
    # the rate is harmless for three steps and then overflows every weight: step 5 sees it, step 6 reads the flag
    scheduler = tmp_path / "jump.yaml"
    scheduler.write_text(
        "model:\n  init_args:\n    scheduler:\n      class_path: torch.optim.lr_scheduler.MultiStepLR\n"
        "      init_args: {milestones: [3], gamma: 1.0e+40}\n"
    )
    status, output = metalit(
        "fit", MAML, f"--config={scheduler}", "--trainer.max_steps=12", "--trainer.val_check_interval=3"
    )
    assert status == 1
    last = tmp_path / "lightning_logs/sine_maml/version_0/checkpoints/last.ckpt"
    message = output.strip().splitlines()[-1]
    assert message.startswith("metalit: stopped: ")
    assert "at outer step 5" in message
    assert str(last) in message
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 3
    assert all(bool(value.isfinite().all()) for value in kept["state_dict"].values())


def test_a_learner_that_diverges_when_tested_reports_it_and_goes_on(metalit, trained, tmp_path):
    trained(MAML)
    status, output = metalit("test", MAML, "--model.inner_optimizer.lr=1000.0", "--model.eval_steps=30")
    assert status == 0
    assert "6 of 6 diverged" in output
    lines = (tmp_path / "lightning_logs/sine_maml/version_0/test.csv").read_text().splitlines()
    assert lines[31].startswith("learner,30,")
    assert lines[31].endswith(",6,6")


def test_predict_without_a_file(metalit, trained):
    trained(MAML)
    status, output = metalit("predict", MAML)
    assert status == 2
    assert "data.predict_file" in output


def test_model_and_data_may_have_arguments_of_one_name(metalit):
    status, output = metalit("fit", "configs/sgd_digits.yaml", "--model.seed=1", "--data.seed=2")
    assert status == 0, output


def test_no_validation_at_step_zero(metalit):
    status, output = metalit("fit", MAML, "--trainer.val_check_interval=0")
    assert status == 2
    assert "trainer.val_check_interval=0 must be" in output


def test_auto_starts_and_then_goes_on(metalit, tmp_path):
    status, output = metalit("fit", MAML, "--ckpt_path=auto")
    assert status == 0
    assert "going on from" not in output
    status, output = metalit("fit", MAML, "--ckpt_path=auto", "--trainer.max_steps=12")
    assert status == 0
    assert "version_0/checkpoints/last.ckpt at step 6" in output
    assert [folder.name for folder in (tmp_path / "lightning_logs/sine_maml").iterdir()] == ["version_0"]


def test_half_precision_on_the_cpu_is_said_to_be_bfloat16(metalit):
    status, output = metalit("fit", MAML, "--trainer.precision=16-mixed", "--trainer.accelerator=cpu")
    assert status == 0
    assert "Using `precision='bf16-mixed'` instead" in output
