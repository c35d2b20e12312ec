"""Tables in three parts: what is in them, what leaks not, and the streams of draws and of batches."""

from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
from csv_files import concatenated, same_bits, told
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from metalit.data import BatchDataModule, Rows, RowSource, SklearnTable, SplitsDataModule
from metalit.data.base import task_keys
from metalit.data.splits import Partition

SPLITS = ("train", "val", "test")
SIGMAS = 5


def rows_of(count=40, classes=0, change=()):
    """Row i is (i, 3i², 7): the last column is constant; its target is 2i + 1, or i modulo the number of classes."""
    i = torch.arange(count).double()
    x = torch.stack([i, 3 * i**2, torch.full_like(i, 7)], 1)
    for row, value in change:
        x[row] = value
    y = (i.long() % classes) if classes else (2 * i + 1).unsqueeze(-1)
    return Rows(x, y, ["a", "b", "c"], "y", [f"class {number}" for number in range(classes)])


class Source(RowSource):
    def __init__(self, rows):
        self.rows = rows

    def read(self):
        return self.rows


def module_of(kind=SplitsDataModule, rows=None, rank=0, ranks=1, step=0, max_steps=1000, stage="fit", **arguments):
    """A module that is set up, whose trainer is at ``step``."""
    data = kind(Source(rows_of() if rows is None else rows), **arguments)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, max_steps=max_steps, global_step=step, lightning_module=None
    )
    data.setup(stage)
    return data


def steps_of(data, count):
    return list(islice(data.train_dataloader(), count))


def file_rows(data, points):
    """The row of the file that each row of ``points`` is."""
    return data.scaling.restore_x(points.x)[..., 0].round().long()


def parts(splits):
    return [getattr(splits, split) for split in SPLITS]


both = pytest.mark.parametrize("kind", [SplitsDataModule, BatchDataModule])


# --- the three parts ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("split_seed", range(3))
def test_every_row_is_in_exactly_one_split_with_its_target(kind, split_seed):
    data = module_of(kind, split_seed=split_seed)
    rows = [file_rows(data, points) for points in parts(data.splits)]
    assert [len(chosen) for chosen in rows] == [20, 10, 10]
    assert torch.cat(rows).sort().values.tolist() == list(range(40))
    for chosen, points in zip(rows, parts(data.splits), strict=True):
        assert_close(data.scaling.restore_x(points.x), rows_of().x[chosen], rtol=1e-13, atol=1e-10)
        assert_close(data.scaling.restore_y(points.y), rows_of().y[chosen], rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize(("val", "test", "sizes"), [(0.1, 0.5, [16, 4, 20]), (0.33, 0.02, [26, 13, 1])])
def test_fractions_are_rounded(val, test, sizes):
    assert [len(points.x) for points in parts(module_of(val=val, test=test).splits)] == sizes


def test_classes_stay_whole_numbers_and_follow_their_rows():
    data = module_of(rows=rows_of(classes=4))
    for points in parts(data.splits):
        assert (points.y.dtype, points.y.ndim) == (torch.int64, 1)
        assert torch.equal(points.y, file_rows(data, points) % 4)
    assert data.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert torch.equal(data.scaling.restore_y(points.y), points.y.double())


def test_the_split_is_shuffled_by_its_own_seed():
    def tests(**seeds):
        data = module_of(**seeds)
        return file_rows(data, data.splits.test).tolist()

    assert tests(split_seed=3, seed=0) == tests(split_seed=3, seed=9)
    drawn = [tests(split_seed=seed) for seed in range(60)]
    assert len({tuple(sorted(rows)) for rows in drawn}) == 60
    counts = Counter(row for rows in drawn for row in rows)
    assert max(abs(counts[row] - 15) for row in range(40)) < SIGMAS * (60 * 0.25 * 0.75) ** 0.5


def test_targets_do_not_decide_the_split():
    real, classes = module_of(), module_of(rows=rows_of(classes=2), corrupt=0.5)
    assert torch.equal(real.splits.test.x, classes.splits.test.x)


@both
def test_the_names_are_those_of_the_table(kind):
    data = module_of(kind, noise_columns=2)
    assert (data.columns, data.target, data.classes) == (["a", "b", "c", "noise1", "noise2"], "y", [])


# --- normalisation --------------------------------------------------------------------------------------------------


def test_training_rows_have_mean_0_and_deviation_1_and_a_constant_column_is_centred():
    data = module_of(noise_columns=2)
    for values in (data.splits.train.x[:, :2], data.splits.train.y):
        assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-14)
        assert_close(values.std(0, correction=0), torch.ones_like(values[0]), rtol=1e-14, atol=0)
    for points in parts(data.splits):
        assert points.x[:, 2].eq(0).all()
    train = file_rows(data, data.splits.train)
    x, y = rows_of().x[train], rows_of().y[train]
    assert_close(data.scaling.x_mean, [*x.mean(0).tolist(), 0.0, 0.0], rtol=1e-14, atol=0)
    assert_close(data.scaling.x_std, [*x.std(0, correction=0)[:2].tolist(), 1.0, 1.0, 1.0], rtol=1e-14, atol=0)
    assert_close([data.scaling.y_mean[0], data.scaling.y_std[0]], [float(y.mean()), float(y.std(correction=0))])


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_row_that_is_held_out_changes_nothing_of_training(split):
    data = module_of(noise_columns=1)
    row = int(file_rows(data, getattr(data.splits, split))[0])
    rows = rows_of(change=[(row, 1e6)])
    rows.y[row] = -1e6
    other = module_of(rows=rows, noise_columns=1)
    assert other.scaling == data.scaling
    assert same_bits(other.splits.train, data.splits.train)
    assert not torch.equal(getattr(other.splits, split).x, getattr(data.splits, split).x)


def test_a_training_row_changes_the_scaling():
    data = module_of()
    row = int(file_rows(data, data.splits.train)[0])
    assert module_of(rows=rows_of(change=[(row, 1e6)])).scaling != data.scaling


def test_a_column_that_is_constant_in_training_alone_stays_finite():
    data = module_of()
    row = int(file_rows(data, data.splits.val)[0])
    other = module_of(rows=rows_of(change=[(row, torch.tensor([row, 3 * row**2, 9.0]))]))
    assert other.splits.val.x[0, 2] == 2


# --- what is spoiled on purpose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3])
def test_noise_is_standard_normal_in_every_split_and_known_by_its_mask(columns):
    data, clean = module_of(rows=rows_of(4000), noise_columns=columns), module_of(rows=rows_of(4000))
    assert data.splits.noise.tolist() == [False] * 3 + [True] * columns
    assert clean.splits.noise.tolist() == [False] * 3
    for points, other in zip(parts(data.splits), parts(clean.splits), strict=True):
        assert torch.equal(points.x[:, :3], other.x)
        noise = points.x[:, 3:]
        assert noise.mean(0).abs().max() < SIGMAS / len(noise) ** 0.5
        assert (noise.square().mean(0) - 1).abs().max() < SIGMAS * (2 / len(noise)) ** 0.5
    everything = torch.cat([points.x for points in parts(data.splits)])[:, [0, *range(3, 3 + columns)]]
    correlation = torch.corrcoef(everything.T)[~torch.eye(1 + columns, dtype=torch.bool)]
    assert correlation.abs().max() < SIGMAS / 4000**0.5


def test_a_row_keeps_its_noise_when_the_fractions_change():
    def noise(**fractions):
        data = module_of(noise_columns=2, **fractions)
        points = [(file_rows(data, points), points.x[:, 3:]) for points in parts(data.splits)]
        return torch.cat([x for _, x in points])[torch.cat([rows for rows, _ in points]).argsort()]

    assert torch.equal(noise(), noise(val=0.1, test=0.4))
    assert not torch.equal(noise(), noise(split_seed=1))


@both
@pytest.mark.parametrize(("corrupt", "count"), [(0.0, 0), (0.1, 2), (0.37, 7), (0.5, 10), (0.99, 20)])
@pytest.mark.parametrize("classes", [2, 5])
def test_exactly_so_many_training_labels_are_wrong(kind, corrupt, count, classes):
    data = module_of(kind, rows_of(classes=classes), corrupt=corrupt)
    wrong = data.splits.train.y != file_rows(data, data.splits.train) % classes
    assert torch.equal(data.splits.corrupted, wrong)
    assert (wrong.sum(), wrong.shape, wrong.dtype) == (count, (20,), torch.bool)
    assert data.splits.train.y.min() >= 0
    assert data.splits.train.y.max() < classes
    for points in (data.splits.val, data.splits.test):
        assert torch.equal(points.y, file_rows(data, points) % classes)


def test_wrong_labels_are_uniform_among_the_others_and_rows_among_all():
    data = module_of(rows=rows_of(8000, classes=4), corrupt=0.75)
    right = file_rows(data, data.splits.train) % 4
    shift = ((data.splits.train.y - right) % 4)[data.splits.corrupted]
    assert len(shift) == 3000
    for by in (1, 2, 3):
        assert abs(int((shift == by).sum()) - 1000) < SIGMAS * (3000 * 2 / 9) ** 0.5
    for number in range(4):
        share = data.splits.corrupted[right == number].double().mean()
        assert abs(float(share) - 0.75) < SIGMAS * (0.1875 / 1000) ** 0.5


def test_what_is_spoiled_is_a_function_of_the_seed_of_the_split():
    same = [module_of(rows=rows_of(classes=3), corrupt=0.5, noise_columns=1, seed=seed).splits for seed in (0, 1)]
    assert same_bits(*same)
    other = module_of(rows=rows_of(classes=3), corrupt=0.5, noise_columns=1, split_seed=1)
    assert not torch.equal(other.splits.corrupted, same[0].corrupted)


def test_real_targets_have_no_wrong_row():
    assert module_of().splits.corrupted.tolist() == [False] * 20


# --- draws of the whole table ---------------------------------------------------------------------------------------


def test_a_draw_is_the_table_with_a_key_of_its_own():
    data = module_of(rows=rows_of(classes=3), draws=4, corrupt=0.2, noise_columns=1, seed=5)
    for step, batch in enumerate(steps_of(data, 70)):
        index = torch.arange(4 * step, 4 * step + 4)
        assert torch.equal(batch.key, task_keys(5, "train", index))
        assert same_bits(batch, data.draw("train", index))
    for draw in range(4):
        for points, own in zip(parts(batch), parts(data.splits), strict=True):
            assert same_bits((points.x[draw], points.y[draw]), (own.x, own.y))
        assert torch.equal(batch.noise[draw], data.splits.noise)
        assert torch.equal(batch.corrupted[draw], data.splits.corrupted)


def test_the_table_is_never_copied():
    data = module_of(draws=6, ranks=2)
    for batch in [*steps_of(data, 66)[::33], *data.val_dataloader(), *data.test_dataloader()]:
        own = [leaf for leaf in tree_leaves(data.splits._replace(key=None)) if leaf is not None]
        found = [leaf for leaf in tree_leaves(batch._replace(key=None)) if leaf is not None]
        assert [leaf.untyped_storage().data_ptr() for leaf in found] == [
            leaf.untyped_storage().data_ptr() for leaf in own
        ]
        assert len(found) == 8
        assert all(len(leaf) == 1 or leaf.stride(0) == 0 for leaf in found)


def test_another_device_gets_one_copy_of_the_table():
    batch = next(iter(module_of(draws=6).train_dataloader()))
    moved = module_of().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {leaf.device.type for leaf in tree_leaves(moved) if leaf is not None} == {"meta"}
    assert moved.train.x.shape == batch.train.x.shape
    assert moved.train.x.untyped_storage().nbytes() == 20 * 3 * 8
    assert moved.key.stride() == (1,)
    assert same_bits(module_of().transfer_batch_to_device(batch, torch.device("cpu"), 0), batch)


def test_batches_move_whole():
    batch = next(iter(module_of(BatchDataModule).train_dataloader()))
    moved = module_of().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert (moved.x.shape, moved.x.stride(), moved.mask) == (batch.x.shape, batch.x.stride(), None)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("step", [0, 1, 63, 64, 65])
def test_the_ranks_share_the_draws_of_one_from_any_step(ranks, step):
    whole = steps_of(module_of(draws=6), 70)[step:]
    streams = [steps_of(module_of(draws=6, rank=rank, ranks=ranks, step=step), 70 - step) for rank in range(ranks)]
    for batch, *shares in zip(whole, *streams, strict=True):
        assert {len(share.key) for share in shares} == {6 // ranks}
        assert same_bits(concatenated(shares), batch)


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_evaluation_is_one_draw_the_same_on_every_rank_and_at_every_step(loader):
    first, *others = (
        list(getattr(module_of(rank=rank, ranks=3, draws=3, step=step), loader)())
        for rank in range(3)
        for step in (0, 9)
    )
    assert [len(batch.key) for batch in first] == [1]
    assert all(same_bits(other, first) for other in others)
    assert len(getattr(module_of(), loader)()) == 1
    assert first[0].key == task_keys(0, loader.removesuffix("_dataloader"), torch.tensor([0]))


def test_keys_differ_by_seed_split_and_index():
    data = [module_of(seed=seed) for seed in (0, 1)]
    keys = [module.draw(split, torch.arange(50)).key for module in data for split in SPLITS]
    assert torch.cat(keys).unique().numel() == 300


# --- batches of rows ------------------------------------------------------------------------------------------------


def batch_rows(batch_size, steps, **arguments):
    """The rows of the file that each step takes."""
    data = module_of(BatchDataModule, batch_size=batch_size, **arguments)
    return [file_rows(data, batch).tolist() for batch in steps_of(data, steps)]


@given(st.integers(1, 50), st.integers(0, 3))
def test_every_row_comes_once_in_an_epoch(batch_size, seed):
    data = module_of(BatchDataModule)
    train = file_rows(data, data.splits.train).sort().values.tolist()
    drawn = [row for rows in batch_rows(batch_size, 70, seed=seed) for row in rows]
    epochs = [drawn[start : start + 20] for start in range(0, len(drawn) - 19, 20)]
    assert all(sorted(epoch) == train for epoch in epochs)
    assert len(epochs) == len({tuple(epoch) for epoch in epochs})


def test_the_order_of_rows_is_a_function_of_the_row_number_alone():
    small, large = (list(chain(*batch_rows(size, 420 // size))) for size in (6, 42))
    assert small == large
    data = module_of(BatchDataModule, batch_size=6)
    assert file_rows(data, data.draw("train", torch.arange(420))).tolist() == small
    assert file_rows(data, data.draw("train", torch.tensor([333, 5]))).tolist() == [small[333], small[5]]
    assert list(chain(*batch_rows(6, 70, seed=1))) != small


def test_batches_hold_inputs_with_their_own_targets():
    data = module_of(BatchDataModule, rows=rows_of(classes=3), batch_size=7, corrupt=0.4, noise_columns=2)
    own = {tuple(x.tolist()): int(y) for x, y in zip(*data.splits.train[:2], strict=True)}
    for batch in steps_of(data, 5):
        assert (batch.x.shape, batch.y.shape, batch.mask) == ((7, 5), (7,), None)
        assert [own[tuple(x.tolist())] for x in batch.x] == batch.y.tolist()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("step", [0, 1, 63, 64, 65])
def test_the_ranks_take_slices_of_the_batch_of_one_from_any_step(ranks, step):
    whole = steps_of(module_of(BatchDataModule, batch_size=12), 70)[step:]
    streams = [
        steps_of(module_of(BatchDataModule, batch_size=12, rank=rank, ranks=ranks, step=step), 70 - step)
        for rank in range(ranks)
    ]
    for batch, *shares in zip(whole, *streams, strict=True):
        assert {len(share.x) for share in shares} == {12 // ranks}
        assert same_bits(concatenated(shares), batch)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (1, 32), (2, 4), (3, 3), (10, 10)])
def test_evaluation_takes_every_row_once_over_the_ranks(split, ranks, batch_size):
    rows = []
    for rank in range(ranks):
        data = module_of(BatchDataModule, batch_size=batch_size, rank=rank, ranks=ranks, step=7)
        batches = list(getattr(data, f"{split}_dataloader")())
        assert len(batches) == len(getattr(data, f"{split}_dataloader")())
        assert all(0 < len(batch.x) <= batch_size for batch in batches)
        rows += [row for batch in batches for row in file_rows(data, batch).tolist()]
    assert sorted(rows) == sorted(file_rows(data, getattr(data.splits, split)).tolist())


# --- training's length and its tables -------------------------------------------------------------------------------


@both
def test_the_length_of_training_is_the_number_of_steps(kind):
    assert len(module_of(kind, max_steps=123).train_dataloader()) == 123


@both
def test_the_step_is_asked_for_when_iteration_starts(kind):
    data = module_of(kind)
    stream, whole = data.train_dataloader(), steps_of(data, 68)
    data.trainer.global_step = 67
    assert same_bits(next(iter(stream)), whole[67])


@both
def test_no_global_generator_is_read(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = module_of(kind, rows=rows_of(classes=2), noise_columns=1, corrupt=0.3)
    steps_of(data, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_real_tables_are_split():
    data = SplitsDataModule(SklearnTable("diabetes"), noise_columns=10)
    data.setup("fit")
    assert [len(points.x) for points in parts(data.splits)] == [222, 110, 110]
    data = BatchDataModule(SklearnTable("digits"), corrupt=0.3)
    data.setup("test")
    assert (len(data.splits.train.x), int(data.splits.corrupted.sum())) == (899, 270)
    assert all(bool(points.x.isfinite().all()) for points in parts(data.splits))


# --- what is told ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fractions_beyond_their_range_are_told(kind, name, fraction):
    told(lambda: module_of(kind, **{name: fraction}), f"data.{name}={fraction}", "between 0 and 1")


@pytest.mark.parametrize(
    ("rows", "val", "test"),
    [(40, 0.5, 0.5), (5, 0.5, 0.5), (40, 0.7, 0.5), (40, 0.01, 0.2), (40, 0.2, 0.01), (2, 0.4, 0.4), (10, 0.49, 0.49)],
)
def test_fractions_that_leave_a_split_without_a_row_are_told(rows, val, test):
    told(
        lambda: module_of(rows=rows_of(rows), val=val, test=test),
        f"{rows} row(s)",
        f"data.val={val} and data.test={test}",
        "change the fractions or add rows",
    )


@pytest.mark.parametrize("number", [-1, 1.5])
def test_a_bad_number_of_noise_columns_is_told(number):
    told(lambda: module_of(noise_columns=number), f"data.noise_columns={number}", "at least 0")


def test_columns_that_are_called_like_noise_are_told():
    rows = rows_of()._replace(columns=["a", "noise2", "c"])
    told(lambda: module_of(rows=rows, noise_columns=2), "data.noise_columns=2", "['noise2']", "rename")
    assert module_of(rows=rows, noise_columns=1).columns == ["a", "noise2", "c", "noise1"]


@pytest.mark.parametrize("corrupt", [-0.1, 1.0, 2.0, float("nan")])
def test_a_corruption_beyond_its_range_is_told(corrupt):
    told(lambda: module_of(rows=rows_of(classes=2), corrupt=corrupt), f"data.corrupt={corrupt}", "below 1")


@pytest.mark.parametrize("classes", [0, 1])
def test_a_corruption_without_other_classes_is_told(classes):
    told(lambda: module_of(rows=rows_of(classes=classes), corrupt=0.1), "data.corrupt=0.1", "'y'", "several classes")


@both
@pytest.mark.parametrize("number", [0, -2, 1.5, None])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_bad_numbers_of_draws_and_rows_are_told(kind, number, stage):
    name = "draws" if kind is SplitsDataModule else "batch_size"
    told(lambda: module_of(kind, stage=stage, **{name: number}), f"data.{name}={number}", "at least 1")


@both
def test_ranks_that_do_not_divide_the_number_are_told(kind):
    name = "draws" if kind is SplitsDataModule else "batch_size"
    told(lambda: module_of(kind, ranks=4, **{name: 6}), f"data.{name}=6 ", "shared by 4 processes", "a multiple of 4")
    module_of(kind, ranks=4, stage="test", **{name: 6})


def test_fewer_rows_than_processes_are_told():
    told(lambda: module_of(BatchDataModule, val=0.1, ranks=5, batch_size=10), "data.val=0.1", "5 processes", "hold out")
    module_of(SplitsDataModule, val=0.1, ranks=5, draws=5)


@both
@pytest.mark.parametrize("steps", [-1, 0])
def test_training_without_an_end_is_told(kind, steps):
    data = module_of(kind, max_steps=steps)
    told(data.train_dataloader, f"trainer.max_steps={steps}", "the number of outer steps")


@both
def test_prediction_is_told(kind):
    data = module_of(kind)
    told(data.predict_dataloader, "predict answers for few-shot learners", kind.__name__, "use validate or test")
    told(lambda: data.setup("predict"), "predict answers for few-shot learners")


def test_a_partition_keeps_the_users_rows_as_they_were():
    rows, before = rows_of(classes=2), rows_of(classes=2)
    Partition(corrupt=0.5, noise_columns=1).of(rows)
    assert same_bits(rows[:2], before[:2])
