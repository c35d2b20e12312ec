"""A run that goes on with another optimiser or scheduler than it began with is refused, or told what it keeps."""

import warnings

import pytest
import torch
from fits import bare, last, regression, trainer
from lightning.pytorch.cli import ReduceLROnPlateau

from metalit.checks.resuming import OuterSettings
from metalit.data import BatchDataModule
from metalit.errors import InputError
from metalit.modules import SupervisedLearner

ADAM, PLAIN = (lambda groups: torch.optim.Adam(groups, lr=0.01)), (lambda groups: torch.optim.SGD(groups, lr=0.01))
COSINE = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)  # noqa: E731
STEPS = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4)  # noqa: E731


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"optimizer": ADAM}, {"optimizer": PLAIN}, "model.optimizer: it is SGD now, and Adam in the run"),
        ({"optimizer": ADAM}, {"optimizer": torch.optim.AdamW}, "model.optimizer: it is AdamW now, and Adam in"),
        ({}, {"optimizer": PLAIN}, "model.optimizer: it is SGD now, and Adam in the run"),
        ({"scheduler": COSINE}, {}, "model.scheduler: it is None now, and CosineAnnealingLR in"),
        ({}, {"scheduler": COSINE}, "model.scheduler: it is CosineAnnealingLR now, and None in"),
        ({"scheduler": COSINE}, {"scheduler": STEPS}, "model.scheduler: it is StepLR now, and Cosine"),
        ({"lr_by_name": {"*bias": 0.1}}, {}, r"model.lr_by_name: .*1 of the rest; 1 of \*bias, now they are 2 of the"),
        ({}, {"lr_by_name": {"*": 0.1}}, r"model.lr_by_name: .*2 of the rest, now they are 2 of \*; go on"),
        ({"lr_by_name": {"*bias": 0.1}}, {"lr_by_name": {"*weight": 0.1}}, "model.lr_by_name: "),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["", "by an older version"])
def test_another_optimiser_or_scheduler_does_not_go_on(before, now, told, named, tmp_path):
    path = _of_a_run(tmp_path, before, named)
    if not named and now.get("optimizer") is torch.optim.AdamW:
        pytest.skip("the states of Adam and AdamW look alike")
    with pytest.raises(InputError, match=told if named else "^model") as refused:
        _go_on(tmp_path, now, path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"lr_by_name": {"*bias": 0.1}}, {"lr_by_name": {"*bias": 0.2}}, r"keeps optimizer\[\*bias\].lr=0.1 .*; 0.2"),
        (
            {"optimizer": ADAM, "scheduler": COSINE},
            {"optimizer": lambda groups: torch.optim.Adam(groups, lr=0.5), "scheduler": COSINE},
            "keeps optimizer.lr=0.01 .*; 0.5",
        ),
        (
            {"scheduler": COSINE},
            {"scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)},
            "keeps scheduler.T_max=4 .*; 9",
        ),
        ({"clip_norm": 1.0}, {}, "model.clip_norm was 1.0 in the run that is continued, and is None now"),
    ],
)
def test_other_settings_are_told(before, now, told, tmp_path):
    path = _of_a_run(tmp_path, before)
    with pytest.warns(UserWarning, match=told) as found:
        _go_on(tmp_path, now, path)
    assert len([warning for warning in found if "continue" in str(warning.message)]) == 1
    kept = torch.load(path, weights_only=True)["outer_settings"]["values"]
    now_kept = torch.load(last(tmp_path), weights_only=True)["outer_settings"]["values"]
    assert now_kept == kept


def test_another_choice_of_what_trains_is_refused(tmp_path):
    path = _of_a_run(tmp_path, {})
    learner = SupervisedLearner(torch.nn.Linear(3, 1))
    learner.network.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"what may train \(requires_grad\) is not what it was: .* 2 of the rest, now"):
        bare(tmp_path).fit(learner, BatchDataModule(regression(), batch_size=8), ckpt_path=path)


def _both(optimizer):
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, COSINE(optimizer)], [1])


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": _both},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 4), "optimizer": PLAIN},
        {"scheduler": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", threshold=1e9, patience=0)},
        {"optimizer": torch.optim.Adafactor, "lr_by_name": {"*bias": 0.1}, "clip_norm": 1.0},
        {"optimizer": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9), "scheduler": STEPS},
    ],
)
def test_the_same_settings_go_on_in_silence(options, tmp_path):
    path = _of_a_run(tmp_path, options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*continue")
        _go_on(tmp_path, options, path)


def _of_a_run(tmp_path, options, named=True):
    _go_on(tmp_path, options, None, steps=2)
    path = tmp_path / "before.ckpt"
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    if not named:
        del checkpoint["outer_settings"]
    torch.save(checkpoint, path)
    return str(path)


def _go_on(tmp_path, options, path, steps=4):
    learner = SupervisedLearner(torch.nn.Linear(3, 1), **options)
    run = trainer(tmp_path, steps=steps, val_check_interval=1.0)
    run.fit(learner, BatchDataModule(regression(), batch_size=8), ckpt_path=path)


@pytest.mark.parametrize(
    ("kind", "number", "name", "state"),
    [
        (torch.optim.Adam, 2, "exp_avg", torch.zeros(2, 3)),
        (torch.optim.Adam, -1, "exp_avg", torch.zeros(3)),
        (torch.optim.Adam, 0, "exp_avg", torch.zeros(3, 2)),
        (torch.optim.Adam, 0, "exp_avg", torch.zeros(1)),
        (torch.optim.Adafactor, 0, "row_var", torch.zeros(3, 1)),
    ],
)
def test_a_state_of_no_parameter_or_of_another_shape_is_refused(kind, number, name, state):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
    optimizer = kind(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    settings, kept = OuterSettings(), optimizer.state_dict()
    settings.kept = {"optimizer_states": [kept], "lr_schedulers": []}
    settings.check(optimizer, None)
    kept["state"][number] = kept["state"].get(number, {}) | {name: state}
    with pytest.raises(InputError, match=r"^ckpt_path: the checkpoint's optimizer_states is not what training saves"):
        settings.check(optimizer, None)


def test_a_checkpoint_without_schedulers_is_one_of_weights_alone():
    optimizer, settings = ADAM([torch.nn.Parameter(torch.ones(2))]), OuterSettings()
    settings.load({"optimizer_states": [optimizer.state_dict()]})
    with pytest.raises(InputError, match="saved with weights alone"):
        settings.check(optimizer, None)


@pytest.mark.parametrize("made", [None, 0, "Adam", torch.nn.Linear(1, 1)])
@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_what_makes_something_else_is_refused(name, made, tmp_path):
    learner = SupervisedLearner(torch.nn.Linear(3, 1), **{name: lambda _: made})
    with pytest.raises(InputError, match=f"model.{name}: what it makes is a {type(made).__name__}"):
        bare(tmp_path).fit(learner, BatchDataModule(regression(), batch_size=8))


@pytest.mark.parametrize("made", [0, "Adam", {}])
def test_what_makes_nothing_is_refused(made, tmp_path):
    learner = SupervisedLearner(torch.nn.Linear(3, 1), optimizer=made)
    with pytest.raises(InputError, match=r"model.optimizer=.* must be a function"):
        bare(tmp_path).fit(learner, BatchDataModule(regression(), batch_size=8))
