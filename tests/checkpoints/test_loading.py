"""A checkpoint is data: loading one builds what it configures, and never runs what it names."""

import copy
import sys
from functools import partial

import pytest
import torch
from fits import given_checkpoint, parameters
from torch import nn

from metalit.checkpoints.classes import arguments
from metalit.data import BatchDataModule, Episodes, MatrixDataModule, SplitsDataModule, TaskDataModule
from metalit.errors import InputError
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner

LEARNERS = {
    "sine_metasgd": (MetaLearner, TaskDataModule),
    "bilevel_ridge": (BilevelLearner, SplitsDataModule),
    "low_rank": (BilevelLearner, MatrixDataModule),
    "sam_digits": (SupervisedLearner, BatchDataModule),
}
MARKED = []


class Noisy(nn.Module):
    """A network of the user's, in a module that is imported."""

    def __init__(self, width: int = 3, **more):
        super().__init__()
        MARKED.append(width)
        self.layer = nn.Linear(1, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.layer(x).tanh())


class Touches:
    """A class that is none of what any argument wants; building it leaves a mark."""

    def __init__(self, *_, **__):
        MARKED.append("touched")


def touch(*_, **__):
    MARKED.append("called")


@pytest.fixture(autouse=True)
def unmarked():
    MARKED.clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return given_checkpoint(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def changed(saved, tmp_path):
    """Write a checkpoint whose configuration is another."""

    def write(change, key="hyper_parameters"):
        checkpoint = copy.deepcopy(saved("sine_metasgd"))
        change(checkpoint[key])
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


@pytest.mark.parametrize("config", LEARNERS)
def test_what_the_command_line_trained_loads_by_its_file_alone(config, saved, tmp_path):
    path, checkpoint = tmp_path / "it.ckpt", saved(config)
    torch.save(checkpoint, path)
    learner, data = (kind.load_from_checkpoint(path) for kind in LEARNERS[config])
    assert (type(learner), type(data)) == LEARNERS[config]
    for name, value in learner.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name].to(value)), name
    assert learner.hparams == checkpoint["hyper_parameters"]
    assert (
        learner.configure_optimizers()["optimizer"].defaults["lr"]
        == (checkpoint["hyper_parameters"]["optimizer"]["init_args"]["lr"])
    )
    if isinstance(data, TaskDataModule):
        assert data.episodes["val"] == Episodes(6, 5, 100)
        assert data.tasks.frequency == (0.8, 1.2)


def test_arguments_that_are_given_hold(saved, tmp_path):
    torch.save(saved("sine_metasgd"), tmp_path / "it.ckpt")
    load = partial(MetaLearner.load_from_checkpoint, tmp_path / "it.ckpt")
    assert load(eval_steps=2).hparams["eval_steps"] == 2
    with pytest.raises(InputError, match="no argument 'eval_stps'; it takes problem, "):
        load(eval_stps=2)
    with pytest.raises(InputError, match="another network"):
        load(inner_optimizer=SGD(0.1))


def test_a_network_of_the_users_loads_once_its_module_is_imported(changed, saved, tmp_path):
    def own(kept):
        kept["problem"]["init_args"]["network"] = {
            "class_path": f"{__name__}.Noisy",
            "init_args": {"width": 4},
            "dict_kwargs": {"act": {"class_path": "torch.nn.Tanh"}},
        }

    with pytest.raises(InputError, match="another network"):
        MetaLearner.load_from_checkpoint(changed(own))
    assert MARKED == [4]


def test_the_subclass_that_was_trained_is_built(changed):
    def named(kept):
        kept["_class_path"] = f"{__name__}.OwnLearner"

    assert type(MetaLearner.load_from_checkpoint(changed(named))) is OwnLearner
    with pytest.raises(InputError, match="the checkpoint is of a OwnLearner"):
        BilevelLearner.load_from_checkpoint(changed(named))


class OwnLearner(MetaLearner):
    """A learner of the user's."""


def spec(path, **given):
    return {"class_path": path, "init_args": given}


HERE = __name__
PLACES = {
    "optimizer": lambda kept, value: kept.update(optimizer=value),
    "scheduler": lambda kept, value: kept.update(scheduler=value),
    "problem": lambda kept, value: kept.update(problem=value),
    "network": lambda kept, value: kept["problem"]["init_args"].update(network=value),
    "loss": lambda kept, value: kept["problem"]["init_args"].update(loss=value),
    "inner optimiser": lambda kept, value: kept.update(inner_optimizer=value),
    "inside an optimiser": lambda kept, value: kept["optimizer"]["init_args"].update(lr=value),
    "in a list": lambda kept, value: kept.update(lr_by_name={"*": [value]}),
    "beside": lambda kept, value: kept["problem"].update(dict_kwargs={"network": value}),
    "the learner": lambda kept, value: kept.update(_class_path=value),
}
NAMES = {
    "a function": spec(f"{HERE}.touch"),
    "a function by its name": f"{HERE}.touch",
    "a class of no fitting kind": spec(f"{HERE}.Touches"),
    "a class of the standard library": spec("logging.FileHandler", filename="mark"),
    "a command": spec("os.system", command="touch mark"),
    "a command that a module of metalit imports": spec("metalit.callbacks.atomic.os.system", command="touch mark"),
    "a class of torch's that is no layer": spec("torch.utils.data.DataLoader", dataset=[]),
    "a module of ours and not a class": spec("metalit.cli.command_line.run", args=[]),
    "a module that is not imported": spec("unseen.Net"),
    "no name": spec(["os", "system"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_imported_called_or_built(name, place, changed, tmp_path, monkeypatch):
    (tmp_path / "unseen.py").write_text("import pathlib\npathlib.Path('mark').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(lambda kept: PLACES[place](kept, copy.deepcopy(NAMES[name])))
    monkeypatch.chdir(tmp_path)
    if isinstance(NAMES[name], str) and place in ("inside an optimiser", "in a list"):
        MetaLearner.load_from_checkpoint(path)  # a word where a number should be
    else:
        with pytest.raises(InputError) as refused:
            MetaLearner.load_from_checkpoint(path)
        assert "\n" not in str(refused.value)
    assert MARKED == []
    assert not (tmp_path / "mark").exists()
    assert "unseen" not in sys.modules


def test_what_must_be_imported_before_is_said(changed):
    path = changed(lambda kept: PLACES["network"](kept, spec("my.nets.Net")))
    with pytest.raises(InputError, match=r"problem.network names my.nets.Net, .*import the module 'my.nets' before"):
        MetaLearner.load_from_checkpoint(path)


def test_data_modules_run_nothing_either(changed):
    path = changed(lambda kept: kept.update(tasks=spec(f"{HERE}.Touches")), "datamodule_hyper_parameters")
    with pytest.raises(InputError, match="which is no TaskDistribution"):
        TaskDataModule.load_from_checkpoint(path)
    assert MARKED == []


@pytest.mark.parametrize("legacy", ["hparams", "module_arguments"])
def test_older_names_of_the_configuration_are_not_heard(legacy, saved, tmp_path):
    checkpoint = copy.deepcopy(saved("sine_metasgd"))
    checkpoint[legacy] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "optimizer": spec(f"{HERE}.touch"),
        "scheduler": spec(f"{HERE}.touch"),
    }
    torch.save(checkpoint, tmp_path / "it.ckpt")
    MetaLearner.load_from_checkpoint(tmp_path / "it.ckpt").configure_optimizers()
    assert MARKED == []


def test_other_ways_of_lightnings_are_refused(saved, tmp_path):
    torch.save(saved("sine_metasgd"), tmp_path / "it.ckpt")
    with pytest.raises(InputError, match="hparams_file="):
        MetaLearner.load_from_checkpoint(tmp_path / "it.ckpt", hparams_file="x.yaml")
    with pytest.raises(InputError, match="weights_only=False"):
        MetaLearner.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=False)


def test_a_learner_that_python_built_needs_its_arguments(saved, tmp_path):
    checkpoint = {name: value for name, value in saved("sine_metasgd").items() if name != "hyper_parameters"}
    torch.save(checkpoint, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=r"keeps no 'problem'.*give problem=..., and all else that it was given"):
        MetaLearner.load_from_checkpoint(tmp_path / "it.ckpt")


class Takes:
    """Arguments of many kinds."""

    def __init__(
        self,
        pair: tuple[float, int],
        layers: list[nn.Module],
        by_name: dict[str, nn.Module] | None = None,
        kind: type[nn.Module] = nn.Tanh,
        untyped=None,
        word: str = "",
    ):
        pass


def test_values_become_what_their_arguments_are_declared_to_be():
    relu = {"class_path": "torch.nn.ReLU"}
    kept = {"pair": [1.0, 2], "layers": [relu], "by_name": {"a": relu}, "kind": "torch.nn.ELU", "untyped": relu}
    found = arguments(Takes, {**kept, "word": "os.system"}, "it")
    assert found["pair"] == (1.0, 2)
    assert all(isinstance(layer, nn.ReLU) for layer in (*found["layers"], found["by_name"]["a"], found["untyped"]))
    assert found["kind"] is nn.ELU
    assert found["word"] == "os.system"
    with pytest.raises(InputError, match=r"it\.kind names .*Touches, which is no Module"):
        arguments(Takes, {"kind": f"{HERE}.Touches"}, "it")
    for path in (f"{HERE}.Touches", "metalit.cli.command_line.MetalitCLI", "metalit.data.Sine"):
        with pytest.raises(InputError, match=r"it\.untyped names .*, which is no Module"):
            arguments(Takes, {"untyped": spec(path)}, "it")


def test_what_was_loaded_answers_as_what_was_trained(saved, tmp_path):
    torch.save(saved("sine_metasgd"), tmp_path / "it.ckpt")
    first, again = (
        MetaLearner.load_from_checkpoint(source) for source in (tmp_path / "it.ckpt", str(tmp_path / "it.ckpt"))
    )
    assert parameters(first).keys() == parameters(again).keys()
    x = torch.tensor([[0.0], [1.0]])
    assert torch.equal(first.adapt(x, x, 1)(x), again.adapt(x, x, 1)(x))
