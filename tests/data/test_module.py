from types import SimpleNamespace

import pytest
import torch
from csv_files import GAPMINDER, concatenated, curves_of, ragged_rows, same_bits, told, write_csv
from torch.testing import assert_close

from metalit.data import Curves, Episodes, Sine, TaskDataModule
from metalit.data.module import UserTasks
from metalit.data.table import Columns, read_asked

SPLITS = ("train", "val", "test")
SOME = Episodes(tasks=6, shots=3, queries=4)


def data_of(tasks=None, trainer=None, **arguments):
    data = TaskDataModule(tasks or Sine(), **(dict.fromkeys(SPLITS, SOME) | arguments))
    if trainer is not None:
        data.trainer = SimpleNamespace(
            **(
                {"global_rank": 0, "world_size": 1, "max_steps": 10, "global_step": 0, "lightning_module": None}
                | trainer
            )
        )
    return data


def gapminder():
    return Curves(str(GAPMINDER), "country", ["year"], ["lifeExp"])


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["tasks", "shots", "queries"])
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_below_one_are_told(split, name, value):
    episodes = Episodes(**({"tasks": 6, "shots": 3, "queries": 4} | {name: value}))
    told(lambda: data_of(**{split: episodes}), f"data.{split}.{name}={value}", "at least 1")


@pytest.mark.parametrize("name", ["tasks", "shots", "queries"])
def test_one_is_enough(name):
    one = Episodes(**({"tasks": 6, "shots": 3, "queries": 4} | {name: 1}))
    data = data_of(train=one, val=one, test=one, trainer={})
    data.setup("fit")
    for batch in (next(iter(data.train_dataloader())), concatenated(data.val_dataloader())):
        assert batch.support.x.shape == (one.tasks, one.shots, 1)
        assert batch.query.x.shape == (one.tasks, one.queries, 1)


def test_training_without_a_number_of_tasks_is_told():
    told(lambda: data_of(train=Episodes(tasks="all", queries=4)), "data.train.tasks", "give the number of tasks")


each_stage = pytest.mark.parametrize("stage", ["fit", "validate", "test"])


@each_stage
@pytest.mark.parametrize("split", SPLITS)
def test_queries_are_needed_where_a_task_has_no_last_row(stage, split):
    data = data_of(**{split: Episodes(tasks=6, queries="all")})
    told(lambda: data.setup(stage), f"data.{split}.queries", "Sine has no last row", "give a number")


@each_stage
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_number_of_tasks_is_needed_where_there_is_no_last_one(stage, split):
    data = data_of(**{split: Episodes(tasks="all", queries=4)})
    told(lambda: data.setup(stage), f"data.{split}.tasks", "Sine has no last task", "give a number")


@each_stage
@pytest.mark.parametrize("split", SPLITS)
def test_shots_beyond_the_rows_of_a_curve_are_told(stage, split):
    data = data_of(gapminder(), **{split: Episodes(tasks=6, shots=12)})
    told(
        lambda: data.setup(stage), f"data.{split}.shots=12", repr(str(GAPMINDER)), "has only 12 row(s)", "13 are needed"
    )


@each_stage
def test_the_table_is_read_before_anything_is_drawn(tmp_path, stage):
    data = data_of(Curves(str(tmp_path / "nowhere.csv"), "task", ["x"], ["y"]))
    told(lambda: data.setup(stage), "data.tasks.file=", "there is no such file")


def test_prediction_without_a_file_is_told():
    told(lambda: data_of().setup("predict"), "data.predict_file", "needs a CSV file", "--data.predict_file FILE")


def test_prediction_does_not_read_the_table_of_the_training(tmp_path):
    file = write_csv(tmp_path / "asked.csv", ["task", "x", "y"], [("a", 1, 2), ("a", 2, "")])
    data = data_of(Curves(str(tmp_path / "nowhere.csv"), "task", ["x"], ["y"]), predict_file=file)
    data.setup("predict")
    assert [task.name for task in data.predict_dataloader()] == ["a"]


@pytest.mark.parametrize("steps", [-1, 0])
def test_training_without_an_end_is_told(steps):
    data = data_of(trainer={"max_steps": steps})
    told(data.train_dataloader, f"trainer.max_steps={steps}", "the number of outer steps")


@pytest.mark.parametrize(("tasks", "ranks"), [(6, 4), (25, 2), (1, 2)])
def test_ranks_that_do_not_divide_the_tasks_are_told(tasks, ranks):
    data = data_of(train=Episodes(tasks, queries=4), trainer={"world_size": ranks})
    told(lambda: data.setup("fit"), f"data.train.tasks={tasks} ", f"{ranks} processes", f"a multiple of {ranks}")
    data.setup("test")


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_that_divide_the_tasks_are_taken(ranks):
    data = data_of(trainer={"world_size": ranks, "global_rank": ranks - 1})
    data.setup("fit")
    assert len(next(iter(data.train_dataloader())).key) == 6 // ranks


# --- loaders --------------------------------------------------------------------------------------------------------


def test_each_split_has_its_own_numbers():
    data = data_of(train=Episodes(4, 2, 3), val=Episodes(7, 5, 6), test=Episodes(8, 1, 9), trainer={})
    for stream, rows, tasks in [
        ([next(iter(data.train_dataloader()))], (2, 3), 4),
        (data.val_dataloader(), (5, 6), 7),
        (data.test_dataloader(), (1, 9), 8),
    ]:
        batch = concatenated(stream)
        assert (batch.support.x.shape, batch.query.x.shape) == ((tasks, rows[0], 1), (tasks, rows[1], 1))


def test_the_length_of_training_is_the_number_of_steps():
    assert len(data_of(trainer={"max_steps": 123}).train_dataloader()) == 123


def test_validation_comes_in_batches_of_the_size_of_training():
    stream = data_of(val=Episodes(20, 3, 4)).val_dataloader()
    assert [len(batch.key) for batch in stream] == [6, 6, 6, 2]
    assert len(stream) == 4


def test_all_stands_for_every_task_once_and_every_other_row():
    curves = gapminder()
    data = data_of(curves, val=Episodes("all"), test=Episodes("all"))
    for split, stream in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        tasks = concatenated(stream)
        values = torch.cat([tasks.support.y, tasks.query.y], dim=1).sum((1, 2))
        held = curves.splits[split]
        assert len(values) == len(held.names) == 28
        assert_close(values.sort().values, held.y.sum((1, 2)).sort().values, rtol=0, atol=1e-12)


def test_the_seed_of_the_module_is_the_seed_of_the_tasks():
    index = torch.arange(5)
    zero, same, other = (data_of(seed=seed).draw("val", index) for seed in (0, 0, 1))
    assert same_bits(zero, same)
    assert not same_bits(zero, other)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_pictured_tasks_are_the_first_ones_with_many_queries(split):
    data = data_of(Sine(noise=0.1))
    tasks, drawn = data.pictured(split, 3), data.draw(split, torch.arange(3))
    assert tasks.query.x.shape == tasks.query.y.shape == (3, 200, 1)
    assert torch.equal(tasks.key, drawn.key)
    assert same_bits(tasks.support, drawn.support)


def test_pictured_queries_lie_on_the_curve_of_the_task():
    tasks = data_of(Sine()).pictured("val", 8)
    features = [torch.cat([x.sin(), x.cos()], dim=-1) for x in (tasks.support.x, tasks.query.x)]
    curve = features[1] @ torch.linalg.lstsq(features[0], tasks.support.y).solution
    assert_close(curve, tasks.query.y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("lengths", [(4, 6, 9, 5, 7, 8, 4, 6, 9, 5), [230] * 10])
def test_pictured_curves_show_all_their_other_rows(tmp_path, split, lengths):
    curves = curves_of(tmp_path, ragged_rows(lengths))
    data = data_of(curves, **{split: Episodes(tasks=6, shots=3, queries=1)})
    tasks, drawn = data.pictured(split, 2), data.draw(split, torch.arange(2))
    assert same_bits(tasks.support, drawn.support)
    rows = torch.full((2,), tasks.query.x.shape[1]) if tasks.query.mask is None else tasks.query.mask.sum(1)
    assert torch.equal(rows + 3, curves.splits[split].length)


# --- the user's tasks -----------------------------------------------------------------------------------------------


def user_tasks(folder, rows, x=("x",)):
    file = write_csv(folder / "asked.csv", ["task", *x, "y"], rows)
    return list(UserTasks(read_asked(file, Columns("task", list(x), ["y"]))))


def test_the_users_tasks_have_their_support_first(tmp_path):
    second, first = user_tasks(
        tmp_path, [("b", 7, ""), ("a", 1, 10), ("b", 3, 30), ("a", 5, ""), ("b", 4, 40), ("a", 0, "")]
    )
    assert (second.name, first.name) == ("b", "a")
    assert second.support_x.tolist() == [[3], [4]]
    assert second.support_y.tolist() == [[30], [40]]
    assert second.x.tolist() == [[3], [4], [7]]
    assert (first.support_x.tolist(), first.support_y.tolist()) == ([[1]], [[10]])
    assert first.x.tolist() == [[1], [5], [0]]
    assert {leaf.dtype for leaf in second[1:]} == {torch.float64}


def test_the_grid_spans_the_inputs_of_its_own_task(tmp_path):
    tasks = user_tasks(tmp_path, [("a", 3, 1), ("a", -2, ""), ("b", 8, 1), ("b", 9, "")])
    for task, (low, high) in zip(tasks, [(-2, 3), (8, 9)], strict=True):
        assert task.grid.shape == (200, 1)
        assert_close(task.grid[:, 0], low + (high - low) * torch.arange(200).double() / 199, rtol=0, atol=1e-14)


def test_there_is_no_grid_for_several_inputs(tmp_path):
    (task,) = user_tasks(tmp_path, [("a", 1, 5, 2), ("a", 3, 6, "")], x=("x", "z"))
    assert task.x.tolist() == [[1, 5], [3, 6]]
    assert task.grid.shape == (0, 2)


def test_every_rank_predicts_all_of_the_users_tasks(tmp_path):
    file = write_csv(tmp_path / "asked.csv", ["task", "x", "y"], [(name, x, "1" * x) for name in "abc" for x in (0, 1)])
    data = data_of(predict_file=file, trainer={"world_size": 2, "global_rank": 1})
    data.setup("predict")
    tasks = data.predict_dataloader()
    assert len(tasks) == 3
    assert [task.name for task in tasks] == [task.name for task in tasks] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("episodes", "told_of"),
    [
        (Episodes(5, "all", 5), "data.val.shots='all'"),
        (Episodes(5, 2.5, 5), "data.val.shots=2.5"),
        (Episodes(None, 2, 5), "data.val.tasks=None"),
    ],
)
def test_counts_that_are_no_whole_numbers_are_refused(episodes, told_of):
    told(lambda: TaskDataModule(Sine(), Episodes(4, 5, 5), episodes, Episodes(4, 5, 5)), told_of)


def test_fewer_tasks_than_processes_are_refused():
    data = TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(3, 5, 5), Episodes(4, 5, 5))
    data.trainer = SimpleNamespace(global_rank=0, world_size=4, max_steps=5, global_step=0, lightning_module=None)
    told(lambda: data.setup("fit"), "data.val.tasks=3 leaves some of 4 processes")
