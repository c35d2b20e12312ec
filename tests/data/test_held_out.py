"""Which tasks are held out: by fraction, by name, in folds, or none."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from csv_files import curves_of, ragged_rows, sampled, told, written
from fits import bare
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn

from metalit.data import Episodes, Scaling, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

NAMES = [f"t{task}" for task in range(10)]


def held(folder, lengths=(5,) * 10, **options):
    curves = curves_of(folder, ragged_rows(lengths), **options)
    return {split: curves.splits[split].names for split in ("train", "val", "test")}


def test_tasks_are_held_out_by_name(tmp_path):
    found = held(tmp_path, val=["t7", "t1"], test=["t3"])
    assert (found["val"], found["test"]) == (["t1", "t7"], ["t3"])
    assert found["train"] == [name for name in NAMES if name not in ("t1", "t7", "t3")]


def test_tasks_are_held_out_by_a_file_of_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufefft9\r\n\n  t0  \n".encode())
    assert held(tmp_path, test=str(file))["test"] == ["t0", "t9"]


def test_a_fraction_beside_names_is_one_of_all_tasks_without_them(tmp_path):
    found = held(tmp_path, val=0.3, test=["t0", "t1", "t2", "t3"])
    assert [len(names) for names in found.values()] == [3, 3, 4]
    assert not {*found["val"]} & {"t0", "t1", "t2", "t3"}


def test_all_may_be_held_out(tmp_path):
    curves = curves_of(tmp_path, ragged_rows((5,) * 10), val=0, test=1.0)
    assert [curves.count(split) for split in ("train", "val", "test")] == [0, 0, 10]
    assert curves.scaling() is None
    told(lambda: held(tmp_path, test=1.0), "data.tasks.test=1.0 is of all tasks", "data.tasks.val=0.2; set that to 0")
    curves.take_scaling(Scaling([1.0], [2.0], [3.0], [4.0]))
    first = curves.splits["test"].x[0, :, 0]
    curves.take_scaling(Scaling([1.0], [4.0], [3.0], [4.0]))
    assert torch.equal(curves.splits["test"].x[0, :, 0], first / 2)


def test_names_may_be_numbers(tmp_path):
    rows = [(task, row, row) for task in (1, 2, 3, 10) for row in range(3)]
    curves = curves_of(tmp_path, rows, val=[10], test=[2])
    assert [curves.splits[split].names for split in ("train", "val", "test")] == [["1", "3"], ["10"], ["2"]]


def test_folds_test_every_task_once(tmp_path):
    tests = [held(tmp_path, folds=4, fold=fold)["test"] for fold in range(4)]
    assert sorted(name for names in tests for name in names) == NAMES
    assert sorted(map(len, tests)) == [2, 2, 3, 3]
    for fold in range(4):
        found = held(tmp_path, folds=4, fold=fold, val=0.2)
        assert len(found["val"]) == 2
        assert sorted(name for names in found.values() for name in names) == NAMES
    assert held(tmp_path, folds=4, split_seed=1)["test"] != tests[0]


@pytest.mark.parametrize(("val", "test", "sizes"), [(0, 0, [10, 0, 0]), (0, 0.2, [8, 0, 2]), ([], ["t1"], [9, 0, 1])])
def test_nothing_need_be_held_out(tmp_path, val, test, sizes):
    assert [len(names) for names in held(tmp_path, val=val, test=test).values()] == sizes


def test_names_that_cannot_be_held_out_are_told(tmp_path):
    told(lambda: held(tmp_path, test=["T1 "]), "data.tasks.test: there is no task 'T1'", "did you mean 't1'?")
    told(lambda: held(tmp_path, val=["t1"], test=["t1", "t2"]), "['t1'] would be in val and in test")
    told(lambda: held(tmp_path, test=["t1", "t1"]), "['t1'] stand twice")
    told(lambda: held(tmp_path, test=NAMES), "cannot be split")
    told(lambda: held(tmp_path, test="nowhere.txt"), "data.tasks.test='nowhere.txt'", "there is no such file")
    told(lambda: held(tmp_path, test="t1"), "data.tasks.test='t1'", "give a list: [t1]")
    file = written(tmp_path, "t1\nt22\n")
    told(lambda: held(tmp_path, val=file), f"data.tasks.val={file!r}: there is no task 't22'")


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (4, 4), (4, -1), (0, 0)])
def test_folds_that_are_none_are_told(tmp_path, folds, fold):
    told(lambda: held(tmp_path, folds=folds, fold=fold), f"data.tasks.folds={folds}", f"data.tasks.fold={fold}")


@pytest.mark.parametrize("alone", ["val", "test"])
def test_folds_of_what_is_all_held_out_are_refused(tmp_path, alone):
    told(
        lambda: held(tmp_path, folds=4, **{"val": 0, "test": 0, alone: 1}),
        f"data.tasks.folds=4 tests on a part of the tasks, and data.tasks.{alone}=1 is of all",
        "--data.tasks.folds null",
    )


def data_of(folder, **options):
    curves = curves_of(folder, ragged_rows([5] * 10), **options)
    data = TaskDataModule(curves, Episodes(4, 2), Episodes(200, 2), Episodes("all", 2))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=5, global_step=0, lightning_module=None)
    return data


def test_without_validation_tasks_the_last_checkpoint_counts(tmp_path):
    data = data_of(tmp_path, val=0, test=0)
    with pytest.warns(match="no best checkpoint: the last one"):
        data.setup("fit")
    assert list(data.val_dataloader()) == []
    assert data.trainer.limit_val_batches == 0
    assert len(next(iter(data.train_dataloader())).key) == 4
    told(lambda: data.setup("validate"), "data.tasks.val", "nothing to validate")
    told(lambda: data.setup(TrainerFn.TESTING), "data.tasks.test", "nothing to test")


def test_without_validation_tasks_baselines_are_chosen_on_training_tasks(tmp_path):
    curves = curves_of(tmp_path, ragged_rows([8] * 10), val=0)
    tasks = sampled(curves, "test", 2, 4, None)
    for prediction in curves.baselines(tasks).values():
        assert torch.allclose(prediction, tasks.query.y, atol=1e-5)


@pytest.mark.parametrize("waits", ["scheduler", "callback"])
def test_what_waits_for_a_validation_is_refused_without_one(tmp_path, waits):
    scheduler = partial(ReduceLROnPlateau, monitor="val/loss") if waits == "scheduler" else None
    callbacks = [EarlyStopping("val/loss")] if waits == "callback" else []
    learner = MetaLearner(FewShot(MLP([1, 4, 1])), SGD(0.1), Unrolled(1), eval_steps=1, scheduler=scheduler)
    data = data_of(tmp_path, val=0)
    with pytest.warns(match="no best checkpoint"):
        told(lambda: bare(tmp_path, callbacks=callbacks).fit(learner, data), "val/loss", "validat")
