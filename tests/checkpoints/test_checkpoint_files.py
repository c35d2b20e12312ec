"""A file that is no whole checkpoint of a learner is refused in one line, and never read as another one."""

import copy
import io
import random
import zipfile
from types import SimpleNamespace

import pytest
import torch
from fits import bare, given_checkpoint, last, regression, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from metalit.checkpoints import read_checkpoint
from metalit.checks.resuming import check_network, check_state, restoring_is_told
from metalit.data import BatchDataModule
from metalit.errors import InputError
from metalit.modules import MetaLearner, SupervisedLearner


@pytest.fixture(scope="module")
def small():
    """A checkpoint of a small learner, as a learner saves it, in a few kilobytes."""
    learner = SupervisedLearner(nn.Linear(3, 1))
    run = trainer("nowhere", steps=1, logger=False, callbacks=[], enable_checkpointing=False, val_check_interval=1.0)
    run.fit(learner, BatchDataModule(regression(), batch_size=8))
    return run._checkpoint_connector.dump_checkpoint(weights_only=False)


@pytest.fixture
def content(small):
    file = io.BytesIO()
    torch.save(small, file)
    return file.getvalue()


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def outcome(content, right):
    """Whether it is read; then it must be the right one."""
    try:
        found = read_checkpoint(io.BytesIO(content))
    except InputError:
        return False
    assert same(right, found)
    return True


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.long)])
def test_a_flipped_bit_is_noticed_or_changes_nothing(count, content, small):
    draw = random.Random(count)
    read = 0
    for _ in range(count):
        place = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        read += outcome(bytes(flipped), small)
    assert read < count / 2
    assert outcome(content, small)


def test_half_a_file_is_none(content, small):
    draw = random.Random(0)
    for length in [0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(50))]:
        assert not outcome(content[:length], small)


def test_a_flipped_weight_is_noticed_wherever_it_is_read(content, tmp_path):
    weights = [name for name in zipfile.ZipFile(io.BytesIO(content)).namelist() if "/data/" in name]
    record = zipfile.ZipFile(io.BytesIO(content)).read(weights[0])
    place = content.index(record)
    (tmp_path / "last.ckpt").write_bytes(content)
    (tmp_path / "best.ckpt").write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    told = r"best.ckpt' is damaged.* use another one: last.ckpt in"
    learner, data = SupervisedLearner(nn.Linear(3, 1)), BatchDataModule(regression(), batch_size=8)
    with pytest.raises(InputError, match=told):
        SupervisedLearner.load_from_checkpoint(tmp_path / "best.ckpt", network=nn.Linear(3, 1))
    for name in ("fit", "validate", "test"):
        run = trainer(tmp_path, steps=3, logger=False, callbacks=[], enable_checkpointing=False, val_check_interval=1.0)
        with pytest.raises(InputError, match=told):
            getattr(run, name)(learner, data, ckpt_path=str(tmp_path / "best.ckpt"))
        with pytest.raises(InputError, match="there is no such file"):
            getattr(run, name)(learner, data, ckpt_path=str(tmp_path / "none.ckpt"))


def test_other_files(tmp_path):
    (tmp_path / "text.ckpt").write_text("weights")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder.ckpt").mkdir()
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("letter.txt", "dear")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name, told in (
        *((f"{name}.ckpt", "is damaged, or no checkpoint at all") for name in ("text", "empty", "zip", "old")),
        ("folder.ckpt", "is a folder"),
        ("list.ckpt", "it lacks"),
        ("none.ckpt", "there is no such file"),
    ):
        with pytest.raises(InputError, match=rf"ckpt_path='.*{name}'.*{told}") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_dict", [1]),
        ("state_dict", {"a": 1}),
        ("state_dict", {"network.weight": torch.ones(1, 3).to_sparse(), "network.bias": torch.ones(1)}),
        ("state_dict", {"network.weight": torch.ones(1, 3, device="meta"), "network.bias": torch.ones(1)}),
        ("global_step", "3"),
        ("global_step", -1),
        ("loops", []),
        ("callbacks", [1]),
        ("callbacks", {"a": [1]}),
        ("optimizer_states", {}),
        ("optimizer_states", [[]]),
        ("lr_schedulers", [1]),
        ("hyper_parameters", [1]),
        ("pytorch-lightning_version", 2),
        ("pytorch-lightning_version", "new"),
        ("loops", {}),
        ("loops", {"fit_loop": []}),
        ("loops", {"fit_loop": {"epoch_progress": 3}}),
        ("optimizer_states", []),
        ("MixedPrecision", [1]),
        ("outer_settings", {"classes": []}),
        ("outer_settings", {"classes": {}, "values": {}}),
        ("optimizer_states", [{"state": [], "param_groups": [{"params": [0, 1]}]}]),
    ],
)
def test_parts_of_another_kind_are_refused_before_training(name, value, small, tmp_path):
    torch.save({**copy.deepcopy(small), name: value}, tmp_path / "it.ckpt")
    run = trainer(tmp_path, steps=3, logger=False, callbacks=[], enable_checkpointing=False, val_check_interval=1.0)
    learner = SupervisedLearner(nn.Linear(3, 1))
    with pytest.raises(InputError, match=f"ckpt_path.*{name}") as error:
        run.fit(learner, BatchDataModule(regression(), batch_size=8), ckpt_path=str(tmp_path / "it.ckpt"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
@pytest.mark.parametrize(
    "path", ["local://{root}/mine", "{root}/run/version_0/checkpoints/../../../mine", "memory://x", "zip::{root}/mine"]
)
def test_no_file_beyond_its_run_is_deleted(path, key, tmp_path):
    learner, data = SupervisedLearner(nn.Linear(3, 1)), BatchDataModule(regression(), batch_size=8)
    trainer(tmp_path, steps=2).fit(learner, data)
    (tmp_path / "mine").mkdir()
    path = path.format(root=tmp_path)
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    for state in checkpoint["callbacks"].values():
        state[key] = {path: torch.tensor(9.0)} if key == "best_k_models" else path
    torch.save(checkpoint, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match="which would be deleted when the next one is saved"):
        trainer(tmp_path, steps=4).fit(learner, data, ckpt_path=str(tmp_path / "it.ckpt"))
    assert (tmp_path / "mine").exists()


def going_on(saver, loop):
    state, fit_loop = SimpleNamespace(fn=TrainerFn.FITTING), SimpleNamespace(state_dict=lambda: loop)
    return SimpleNamespace(state=state, fit_loop=fit_loop, checkpoint_callbacks=[saver])


def test_a_count_that_is_no_number_is_refused():
    run = going_on(ModelCheckpoint(), {"progress": {"done": 0}})
    check_state(run, {"loops": {"fit_loop": {"progress": {"done": 3}}}})
    with pytest.raises(
        InputError, match=r"the checkpoint's loops\.fit_loop\.progress\.done is not what training saves"
    ):
        check_state(run, {"loops": {"fit_loop": {"progress": {"done": "3"}}}})


def test_files_of_a_remote_run_are_its_own():
    saver = ModelCheckpoint("memory://run")
    run, state = going_on(saver, {}), saver.state_dict()
    checkpoint = {"loops": {"fit_loop": {}}, "callbacks": {saver.state_key: state}}
    state["best_model_path"] = "memory://run/best.ckpt"
    check_state(run, checkpoint)
    for other in ("memory://other/best.ckpt", 7):
        state["best_model_path"] = other
        with pytest.raises(InputError, match="which would be deleted"):
            check_state(run, checkpoint)


def test_the_state_of_a_saver_is_checked_where_training_goes_on(tmp_path):
    learner, data = SupervisedLearner(nn.Linear(3, 1)), BatchDataModule(regression(), batch_size=8)
    trainer(tmp_path, steps=2).fit(learner, data)
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    for state in checkpoint["callbacks"].values():
        del state["best_k_models"]
    torch.save(checkpoint, path := str(tmp_path / "it.ckpt"))
    with pytest.raises(InputError, match="the checkpoint's callbacks of BestCheckpoint is not what training saves"):
        trainer(tmp_path, steps=4).fit(learner, data, ckpt_path=path)
    trainer(tmp_path).validate(learner, data, ckpt_path=path, verbose=False)


def test_a_network_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"'weight' has shape \(1, 4\) in the checkpoint and \(1, 3\) in the config"):
        check_network(nn.Linear(3, 1), {"state_dict": nn.Linear(4, 1).state_dict()})


def test_states_of_other_shapes_are_refused(small, tmp_path):
    other = copy.deepcopy(small)
    other["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(other, tmp_path / "it.ckpt")
    run = trainer(tmp_path, steps=3, logger=False, callbacks=[], enable_checkpointing=False, val_check_interval=1.0)
    with pytest.raises(InputError, match="the checkpoint's optimizer_states is not what training saves"):
        run.fit(
            SupervisedLearner(nn.Linear(3, 1)),
            BatchDataModule(regression(), batch_size=8),
            ckpt_path=str(tmp_path / "it.ckpt"),
        )


def test_another_precision_is_told(small, tmp_path):
    torch.save(small, tmp_path / "it.ckpt")
    run = trainer(tmp_path, logger=False, callbacks=[], enable_checkpointing=False, precision="64-true")
    data = BatchDataModule(regression(), batch_size=8)
    with pytest.warns(UserWarning, match=r"trainer.precision='64-true', and the checkpoint was trained in '32-true'"):
        run.validate(SupervisedLearner(nn.Linear(3, 1)), data, ckpt_path=str(tmp_path / "it.ckpt"), verbose=False)


def test_an_address_is_read_as_safely_as_a_file(tmp_path, monkeypatch):
    asked = []

    def served(address):
        asked.append(address)
        return io.BytesIO(pickled)

    monkeypatch.setattr("metalit.checkpoints.files.urlopen", served)
    file = io.BytesIO()
    torch.save({"state_dict": {}, "payload": Touch(tmp_path / "mark")}, file)
    pickled = file.getvalue()
    with pytest.raises(InputError, match="a pickle can run any code"):
        MetaLearner.load_from_checkpoint("https://example.org/best.ckpt")
    assert asked == ["https://example.org/best.ckpt"]
    assert not (tmp_path / "mark").exists()


class Touch:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


@pytest.mark.parametrize("part", [{"mean": [1.0]}, {"x_mean": [None]}, {"x_mean": 1.0}, {"y_std": ["x"]}])
def test_scaling_of_another_kind(part, tmp_path):
    checkpoint = given_checkpoint(tmp_path)("sine_metasgd")
    torch.save({**checkpoint, "scaling": {**checkpoint["scaling"], **part}}, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match="scaling"):
        MetaLearner.load_from_checkpoint(tmp_path / "it.ckpt")


def test_a_state_that_cannot_be_restored_is_told(small, tmp_path):
    other = copy.deepcopy(small)
    other["optimizer_states"][0]["param_groups"][0]["params"] = [{}, {}]
    torch.save(other, tmp_path / "it.ckpt")
    learner, data = SupervisedLearner(nn.Linear(3, 1)), BatchDataModule(regression(), batch_size=8)
    with pytest.raises(InputError, match=r"the checkpoint cannot be restored \(TypeError"), restoring_is_told():
        bare(tmp_path, 3, val_check_interval=1.0).fit(learner, data, ckpt_path=str(tmp_path / "it.ckpt"))
    with pytest.raises(KeyError), restoring_is_told():
        raise KeyError("what has nothing to do with it")
