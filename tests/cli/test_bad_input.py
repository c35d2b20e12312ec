"""Everyday mistakes on the command line and in configs: each is told in one line, before anything runs."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from metalit.__main__ import main
from metalit.cli.arguments import check_values
from metalit.cli.messages import explain
from metalit.cli.seeds import taken_out
from metalit.errors import InputError

MAML = "configs/sine_maml.yaml"
RIDGE = "configs/bilevel_ridge.yaml"
ALONE = {"trainer.devices": 1, "trainer.num_nodes": 1, "seed_everything": 0, "threads": None}

OPTIONS = [
    (MAML, ["--data.train=5"], ["data.train=5 must be a group of settings"]),
    (MAML, ["--data.train=null"], ["data.train=null", "TaskDataModule needs a value"]),
    (MAML, ["--trainer=-5"], ["trainer=-5 must be a group"]),
    (MAML, ["--last_checkpoint=[1]"], ["last_checkpoint=[1] must be a group"]),
    (RIDGE, ["--model.problem.log_penalty=1e308"], ["Ridge: log_penalty=1e+308", "80.0 at most"]),
    (MAML, ["--trainer.devices=-1", "--trainer.accelerator=cpu"], ["trainer.devices=-1: ", "int > 0"]),
    (MAML, ["--trainer.devices=null", "--trainer.accelerator=cpu"], ["trainer.devices=null: ", "int > 0"]),
    (MAML, ["--trainer.devices=[0,0]", "--trainer.accelerator=cpu"], ["trainer.devices=[0, 0]: "]),
    (MAML, ["--trainer.devices=4000", "--trainer.accelerator=cpu"], ["trainer.devices=4000: ", "too many"]),
    (MAML, ["--trainer.accelerator=tpu"], ["trainer: ", "torch_xla"]),
    (MAML, ["--trainer.num_nodes=2"], ["trainer.num_nodes=2", "torchrun", "MASTER_ADDR"]),
    (MAML, ["--trainer.num_nodes=2147483647"], ["trainer.num_nodes=2147483647: no cluster"]),
    (
        MAML,
        ["--model.optimizer=data/gapminder.csv"],
        ["model.optimizer=data/gapminder.csv: this file holds no setting"],
    ),
    (MAML, ["--data.tasks", "README.md"], ["data.tasks=README.md: this file holds no settings; name a class"]),
    (MAML, ["--trainer.precision=12"], ["trainer.precision: '12' is none of", "bf16-mixed"]),
    (MAML, ["--trainer.max_time=never"], ["trainer: ", "'never'", "DD:HH:MM:SS"]),
    (MAML, ["--seed_everything=-1"], ["seed_everything=-1", "from 0 to 4294967295"]),
    (MAML, ["--seed_everything=4294967296"], ["seed_everything=4294967296", "from 0 to 4294967295"]),
    (MAML, ["--seed_everything=many"], ["seed_everything", "bool or int", "many"]),
    (MAML, ["--data.seed=99999999999999999999"], ["data.seed=99999999999999999999", "whole number below"]),
    (MAML, ["--model.eval_steps=99999999999999999999"], ["model.eval_steps=99999999999999999999"]),
    (MAML, ["--threads=100000"], ["threads=100000", "CPU"]),
    (MAML, ["--threads=0"], ["threads: 0 must be > 0"]),
    (MAML, ["--model.optimizer.lr={x: 0.1}"], ["model.optimizer.lr", "'x'"]),
    (MAML, ["--model.optimizer.lr=null"], ["model.optimizer.lr=null", "Adam needs a value"]),
    (MAML, ["--model.optimizer.differentiable=null"], ["model.optimizer.differentiable=null", "Adam needs a value"]),
    (MAML, ["--model.problem.network.sizes=[1, null, 1]"], ["model.problem.network.sizes: 'null'"]),
    (MAML, ["--model.problem.network.sizes=" + "[" * 4000], ["[[[[ … is nested too deeply"]),
    (MAML, ["--model.optimizer.betas=[1]"], ["model.optimizer.betas: Expected a tuple with 2 elements"]),
    (MAML, ["--model.inner_optimizer.lr=null"], ["model.inner_optimizer.lr=null", "SGD needs a value"]),
    (MAML, ["--model.scheduler.T_max=many"], ["model.scheduler.T_max: expected a value of type int. Got value: many"]),
    (MAML, ["--model.scheduler.T_max=0"], ["model.scheduler", "ZeroDivisionError"]),
    (MAML, ["--model.scheduler.last_epoch=3"], ["model.scheduler", "initial_lr"]),
    (MAML, ["--trainer.default_root_dir=/dev/null/x"], ["/dev/null"]),
    (MAML, ["--ckpt_path=" + "a" * 5000], ["ame too long"]),
    (MAML, ["--experiment=" + "a" * 5000], ["ame too long"]),
    (MAML, ["--trainer.max_steps=0"], ["trainer.max_steps=0: nothing would be trained"]),
    (MAML, ["--trainer.callbacks+=EarlyStopping"], ["trainer.callbacks: ", "required: monitor"]),
    (MAML, ["--trainer.logger=WandbLogger"], ["WandbLogger", "wandb"]),
    (MAML, ["--trainer.logger=Nope"], ["trainer.logger: there is no class 'Nope'"]),
    (MAML, ["--model.inner_optimizer.lr=Learnd"], ["lr: expected a number or a class", "did you mean 'Learned'?"]),
    (MAML, ["--model.eval_steps=few"], ["model.eval_steps: 'few' is none of 'auto', a whole number"]),
    (MAML, ["--model=null"], ["there is no learner", "--config"]),
    (RIDGE, ["--data=TaskDataModule", "--data.tasks=Sine"], ["data.val=0.4", "TaskDataModule takes a group"]),
    (MAML, ["--config=" + "a" * 5000], ["config: File does not exist", "…"]),
]


# each takes the way of another that is in the quick run
LONG = {
    *("--trainer=-5", "--last_checkpoint=[1]", "--trainer.devices=null", "--trainer.devices=[0,0]", "--threads=0"),
    *("--trainer.devices=4000", "--seed_everything=4294967296", "--seed_everything=many", "--trainer.logger=Nope"),
    *("--model.eval_steps=99999999999999999999", "--model.eval_steps=few", "--model.optimizer.differentiable=null"),
    *("--trainer.num_nodes=2147483647", "--data.tasks"),
    *("--model.inner_optimizer.lr=null", "--ckpt_path=" + "a" * 5000, "--model.scheduler.T_max=many"),
}


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [pytest.param(*case, marks=pytest.mark.long if case[1][0] in LONG else ()) for case in OPTIONS],
    ids=[case[1][0][:40] for case in OPTIONS],
)
def test_an_option_that_cannot_be_used_is_told_in_one_line(config, options, told, metalit, tmp_path):
    status, output = metalit("fit", config, *options, tiny=False)
    assert status == 2
    lines = output.strip().splitlines()
    assert lines[-1].startswith("metalit: error: ")
    assert len(lines[-1]) <= 600
    for words in told:
        assert words in lines[-1]
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("version_*"))


FILES = {
    "Latin-1": ("# é\ntrainer: {max_steps: 6}\n".encode("latin-1"), ["is no text in UTF-8"]),
    "UTF-16": ("trainer: {max_steps: 6}\n".encode("utf-16"), ["is no text in UTF-8"]),
    "empty": (b"", ["is empty"]),
    "a comment alone": (b"# nothing\n", ["is empty"]),
    "a list": (b"- 1\n", ["must be a mapping"]),
    "a word": (b"hello\n", ["must be a mapping"]),
    "tabs": (b"trainer:\n\tmax_steps: 3\n", ["line 2, column 1", "cannot start any token"]),
    "brackets without end": (b"model: " + b"[" * 3000 + b"]" * 3000, ["is nested too deeply"]),
    "a key twice": (b"trainer: {max_steps: 6, max_steps: 8}\n", ["duplicate key max_steps"]),
    "a misspelt key": (b"trainer: {max_stps: 6}\n", ["did you mean 'trainer.max_steps'?"]),
    "a wrong value": (b"data: {init_args: {train: {shots: many}}}\n", ["data.train.shots", "int", "many"]),
    "null for a number": (b"model: {init_args: {inner_optimizer: {init_args: {lr: null}}}}\n", ["lr=null"]),
    "a wrong value of a callback": (
        b"trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: many}}]}\n",
        ["trainer.callbacks.patience: expected a value of type int. Got value: many"],
    ),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "more", [[], pytest.param(["--print_config"], marks=pytest.mark.long)], ids=["", "print_config"]
)
def test_a_config_that_cannot_be_used_is_named(kind, more, metalit, tmp_path):
    content, told = FILES[kind]
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    if more and kind == "null for a number":
        pytest.skip("what is printed is not run")
    status, output = metalit("fit", MAML, f"--config={file}", *more, tiny=False)
    assert status == 2
    message = output.strip().splitlines()[-1]
    assert message.startswith("metalit: error: ")
    for words in told:
        assert words in message
    if kind != "null for a number":
        assert str(file) in message


def test_what_was_typed_is_not_said_to_be_of_a_file(metalit):
    _, output = metalit("fit", MAML, "--data.train.shots=many", tiny=False)
    assert output.strip().endswith("Got value: many")


@pytest.mark.parametrize("way", ["typed", "in a second config"])
def test_null_brings_a_default_back_below_a_class(way, metalit, capfd, tmp_path):
    huber = tmp_path / "huber.yaml"
    huber.write_text(
        "model: {init_args: {problem: {init_args: {loss: {class_path: torch.nn.HuberLoss, "
        "init_args: {reduction: none}}}}}}\n"
    )
    back = tmp_path / "back.yaml"
    back.write_text(
        "model: {init_args: {problem: {init_args: {loss: null}}, hypergradient: {init_args: {weights: null}}}}\n"
    )
    typed = ["--model.problem.loss=null", "--model.hypergradient.weights", "null", "--model.optimizer.fused=null"]
    options = typed if way == "typed" else [f"--config={back}"]
    with pytest.raises(SystemExit) as stop:
        metalit("fit", MAML, f"--config={huber}", *options, "--print_config", tiny=False)
    assert stop.value.code == 0
    text = capfd.readouterr().out
    model = yaml.safe_load(text[text.index("seed_everything") :])["model"]["init_args"]
    assert model["problem"]["init_args"]["loss"] is None
    assert model["hypergradient"]["init_args"]["weights"] is None
    assert model["optimizer"]["init_args"]["fused"] is None


def test_null_below_two_classes_is_no_word(metalit, capfd, monkeypatch, tmp_path):
    (tmp_path / "named_nets.py").write_text(
        "from torch import nn\n\n\nclass Named(nn.Linear):\n    def __init__(self, name: str | None = 'x') -> None:\n"
        "        super().__init__(1, 1)\n        self.name = name\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = ["--model.problem.network=named_nets.Named", "--model.problem.network.name=null"]
    with pytest.raises(SystemExit):
        metalit("fit", MAML, *network, "--print_config", tiny=False)
    text = capfd.readouterr().out
    model = yaml.safe_load(text[text.index("seed_everything") :])["model"]["init_args"]
    assert model["problem"]["init_args"]["network"]["init_args"]["name"] is None


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.enable_checkpointing=false"],
        ["--trainer.barebones=true"],
        ["--trainer.fast_dev_run=true", "--model.fused_steps=100", "--model.compile=true"],
        ["--trainer.callbacks+=RichProgressBar"],
        ["--trainer.callbacks+=TQDMProgressBar"],
    ],
    ids=lambda options: options[0],
)
def test_what_the_trainer_offers_goes_with_what_we_add(options, metalit, tmp_path):
    status, output = metalit("fit", MAML, *options)
    assert status == 0, output
    assert "None" not in output
    saved = {path.name for path in Path(tmp_path).rglob("*.ckpt")}
    assert saved == ({"best.ckpt", "last.ckpt"} if "callbacks" in options[0] else set())


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Expected a dot import path string: SGD", "'SGD' is none of those that go here"),
        ("Expected a dot import path string: SDG", "there is no class 'SDG'; did you mean 'SGD'?"),
        (
            "'bool' object has no attribute 'keys'",
            "expected a class, by its name or as {class_path: …, init_args: {…}}",
        ),
    ],
)
def test_what_is_no_class_is_told(message, told):
    assert str(explain(f'Parser key "model":\n  {message}', ["model"], ["SGD", "Adam"])) == f"model: {told}"


@pytest.mark.parametrize("key", ["data.tasks.file", "model.eval_steps"])
def test_without_a_config_there_is_nothing_to_set(key, capfd):
    assert main(["fit", f"--{key}=1"]) == 2
    assert f"error: {key}: there is no config yet in which to set it; add --config" in capfd.readouterr().err


@pytest.mark.parametrize("seeds", ["²", "9" * 5000, "2147483648", "1", ""])
def test_so_many_seeds_are_none(seeds):
    with pytest.raises(InputError, match="must be a whole number from 2 to 9999"):
        taken_out(["fit", f"--seeds={seeds}"])


@pytest.mark.parametrize("key", ["model.problem.network.sizes", "data.train.tasks", "data.tasks.source.faces"])
def test_very_many_are_warned_of(key):
    config = Namespace({key: [2, 10**6], **ALONE})
    with pytest.warns(UserWarning, match=f"{key}=1000000 is a very large number"):
        check_values(config)


@pytest.mark.parametrize("key", ["model.eval_steps", "model.hypergradient.steps", "data.val.shots"])
def test_more_than_any_machine_can_take_is_refused_before_it_is_begun(key):
    def config(number):
        return Namespace({key: number, **ALONE})

    with pytest.raises(InputError, match=f"{key}=2147483648 is more than any machine can take"):
        check_values(config(2147483648))
    with pytest.warns(UserWarning, match=f"{key}=2147483647 is a very large number"):
        check_values(config(2147483647))


def test_a_seed_and_the_steps_of_training_may_be_any_number():
    check_values(Namespace({"data.seed": 2**40, "trainer.max_steps": 2**40, **ALONE}))
