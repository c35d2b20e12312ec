from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
from csv_files import concatenated, curves_of, ragged_rows, same_bits
from hypothesis import given
from hypothesis import strategies as st

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.data.base import task_keys
from metalit.data.stream import EvalStream, TrainStream, take
from metalit.problem import Points, Task

TASKS, STEPS = 6, 135  # two borders of blocks of 64 steps


def just_index(index):
    return index


def steps_of(tasks, first=0, rank=0, ranks=1):
    """The indices that a rank draws in each step."""
    return TrainStream(just_index, tasks, 1000, lambda: first, rank, ranks)


def data_of(distribution, rank=0, ranks=1, step=0, seed=0):
    """A data module whose trainer is at ``step``."""
    each = {"shots": 3, "queries": 4}
    data = TaskDataModule(distribution, Episodes(TASKS, **each), Episodes(17, **each), Episodes(9, **each), seed=seed)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, max_steps=1000, global_step=step, lightning_module=None
    )
    return data


@pytest.fixture(scope="module", params=["sine", "curves"])
def distribution(request, tmp_path_factory):
    if request.param == "sine":
        return Sine(frequency=(0.8, 1.2), noise=0.3)
    return curves_of(tmp_path_factory.mktemp("stream"), ragged_rows())


@pytest.fixture(scope="module")
def whole(distribution):
    """What one rank trains on, step by step."""
    return list(islice(data_of(distribution).train_dataloader(), STEPS))


def test_step_s_is_the_draw_of_its_own_indices(distribution, whole):
    data = data_of(distribution)
    for step, batch in enumerate(whole):
        assert same_bits(batch, data.draw("train", torch.arange(step * TASKS, (step + 1) * TASKS)))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_does_not_depend_on_what_else_is_drawn(distribution, split):
    data, order = data_of(distribution), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    together = data.draw(split, torch.arange(50))
    assert same_bits(take(together, order), data.draw(split, order))
    for index in range(0, 50, 7):
        assert same_bits(take(together, slice(index, index + 1)), data.draw(split, torch.tensor([index])))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_the_ranks_are_bit_for_bit_the_tasks_of_one_rank(distribution, whole, ranks):
    streams = [data_of(distribution, rank, ranks).train_dataloader() for rank in range(ranks)]
    for batch, *shares in zip(whole, *(islice(stream, STEPS) for stream in streams), strict=True):
        assert {len(share.key) for share in shares} == {TASKS // ranks}
        assert same_bits(concatenated(shares), batch)


@pytest.mark.parametrize("step", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_bit_for_bit(distribution, whole, step, ranks):
    streams = [data_of(distribution, rank, ranks, step).train_dataloader() for rank in range(ranks)]
    resumed = list(islice(zip(*streams, strict=True), STEPS - step))
    for batch, shares in zip(whole[step:], resumed, strict=True):
        assert same_bits(concatenated(shares), batch)


@given(st.integers(0, 300), st.integers(1, 4), st.integers(1, 3))
def test_every_rank_starts_at_any_step_with_its_share_of_the_indices(first, share, ranks):
    tasks = share * ranks
    streams = [steps_of(tasks, first, rank, ranks) for rank in range(ranks)]
    for step, shares in enumerate(islice(zip(*streams, strict=True), 70), first):
        assert torch.cat(shares).tolist() == list(range(step * tasks, (step + 1) * tasks))
        assert {len(indices) for indices in shares} == {share}


def test_the_step_is_asked_for_when_iteration_starts(distribution, whole):
    data = data_of(distribution)
    stream = data.train_dataloader()
    data.trainer.global_step = 67
    assert same_bits(next(iter(stream)), whole[67])


def test_the_stream_does_not_end_within_its_length():
    stream = TrainStream(just_index, 2, 150, lambda: 0)
    assert len(stream) == 150
    assert [batch.tolist() for batch in islice(stream, 150)] == [[2 * step, 2 * step + 1] for step in range(150)]


def test_steps_far_beyond_32_bits_keep_their_indices():
    assert next(iter(steps_of(1000, 10**10))).tolist() == list(range(10**13, 10**13 + 1000))


def test_steps_differ(whole):
    keys = torch.cat([batch.key for batch in whole])
    assert keys.unique().numel() == STEPS * TASKS
    assert all(not torch.equal(one.support.y, other.support.y) for one, other in pairwise(whole))


def test_seeds_and_splits_differ():
    draws = {
        (seed, split): data_of(Sine(), seed=seed).draw(split, torch.arange(100))
        for seed in (0, 1, -1, 2**40)
        for split in ("train", "val", "test")
    }
    assert torch.cat([tasks.support.y.flatten() for tasks in draws.values()]).unique().numel() == 12 * 300
    assert torch.cat([tasks.key for tasks in draws.values()]).unique().numel() == 12 * 100


def test_the_seed_draws_other_rows_of_the_same_curves(tmp_path):
    curves = curves_of(tmp_path, ragged_rows())
    drawn = [data_of(curves, seed=seed).draw("val", torch.arange(20)).support.x for seed in (0, 1)]
    one, other = (curves.scaling().restore_x(x).round().long() for x in drawn)
    assert torch.equal(one // 100, other // 100)
    assert not torch.equal(one, other)


def test_the_key_of_a_task_is_a_function_of_seed_split_and_index():
    index = torch.tensor([5, 0, 2**40])
    assert torch.equal(task_keys(3, "val", index)[1:], task_keys(3, "val", index[1:]))
    found = [task_keys(seed, split, index) for seed in (3, 4) for split in ("train", "val", "test")]
    assert torch.cat(found).unique().numel() == 18


def test_the_key_that_a_task_carries_is_not_the_one_that_it_was_drawn_from(distribution):
    index = torch.arange(50)
    tasks = data_of(distribution).draw("train", index)
    assert tasks.key.unique().numel() == 50
    assert not set(tasks.key.tolist()) & set(task_keys(0, "train", index).tolist())


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_evaluation_covers_every_index_exactly_once_over_the_ranks(tasks, batch, ranks):
    ranks = min(ranks, tasks)
    streams = [EvalStream(just_index, tasks, batch, rank, ranks) for rank in range(ranks)]
    batches = [[chunk.tolist() for chunk in stream] for stream in streams]
    assert sorted(index for chunks in batches for chunk in chunks for index in chunk) == list(range(tasks))
    assert [len(chunks) for chunks in batches] == [len(stream) for stream in streams]
    assert all(len(chunk) == batch for chunks in batches for chunk in chunks[:-1])
    assert all(0 < len(chunks[-1]) <= batch for chunks in batches)
    assert [[chunk.tolist() for chunk in stream] for stream in streams] == batches


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
def test_evaluation_draws_the_same_tasks_every_time_and_on_any_number_of_ranks(distribution, loader):
    split, tasks = {"val_dataloader": ("val", 17), "test_dataloader": ("test", 9)}[loader]
    stream = getattr(data_of(distribution), loader)()
    expected = data_of(distribution).draw(split, torch.arange(tasks))
    assert same_bits(concatenated(stream), expected)
    assert same_bits(concatenated(stream), expected)
    shares = concatenated([concatenated(getattr(data_of(distribution, rank, 2), loader)()) for rank in range(2)])
    assert same_bits(take(shares, shares.key.argsort()), take(expected, expected.key.argsort()))


def test_evaluation_does_not_depend_on_the_step(distribution):
    early, late = (concatenated(data_of(distribution, step=step).val_dataloader()) for step in (0, 99))
    assert same_bits(early, late)


def test_take_chooses_tasks_and_leaves_a_mask_that_is_none():
    rows = torch.arange(12).reshape(3, 4)
    task = Task(Points(rows, rows + 1), Points(rows, rows, rows > 4), torch.arange(3))
    chosen = take(task, slice(1, 3))
    assert chosen.support.mask is None
    assert [leaf.tolist() for leaf in (chosen.support.y, chosen.query.mask, chosen.key)] == [
        (rows + 1)[1:].tolist(),
        (rows > 4)[1:].tolist(),
        [1, 2],
    ]
    assert take(task, torch.tensor([2, 0])).key.tolist() == [2, 0]


def calls_of(draw, steps, first=0):
    """The numbers of indices of each call, and the stream's batches."""
    calls = []
    stream = TrainStream(lambda index: calls.append(len(index)) or draw(index), 3, 1000, lambda: first)
    return calls, list(islice(stream, steps))


def test_a_block_of_small_tasks_is_drawn_in_one_call():
    calls, _ = calls_of(just_index, 64)
    assert calls == [2 * 3, 64 * 3]  # the first tells how large they are


@pytest.mark.parametrize(("size", "steps"), [(2**20, 5), (2**23, 1)])  # of one task, in bytes
def test_large_tasks_are_drawn_when_they_are_due(size, steps):
    def draw(index):
        return index.to(torch.uint8).unsqueeze(-1).repeat(1, size)

    first = 7
    calls, batches = calls_of(draw, 6, first)
    assert calls == [2 * 3] + [steps * 3] * len(range(first // steps, (first + 5) // steps + 1))
    assert [batch[:, -1].tolist() for batch in batches] == [[3 * s, 3 * s + 1, 3 * s + 2] for s in range(7, 13)]


def test_a_resumed_run_makes_the_very_same_calls():
    calls = []
    stream = TrainStream(lambda index: calls.append(index.tolist()) or index, 3, 1000, lambda: 67)
    list(islice(stream, 70))
    assert calls[1:] == [list(range(3 * first, 3 * first + 3 * 64)) for first in (64, 128)]


@pytest.mark.parametrize(("fused", "size"), [(3, 1), (3, 2**20), (10, 2**20)])  # of one task, in bytes
def test_a_block_holds_the_tasks_of_whole_calls(fused, size):
    def draw(index):
        return index.to(torch.uint8).unsqueeze(-1).repeat(1, size)

    stream = TrainStream(draw, 2, 300, lambda: 0, fused=fused)
    for call, (tasks, steps) in enumerate(islice(stream, 70 // fused)):
        assert steps == fused
        assert tasks[:, 0].tolist() == list(range(2 * fused * call, 2 * fused * (call + 1)))


def test_what_is_expanded_is_drawn_in_blocks_however_large_it_is():
    table = torch.zeros(2**25, dtype=torch.uint8)
    calls, _ = calls_of(lambda index: (table.expand(len(index), -1), index), 2)
    assert calls == [2 * 3, 64 * 3]
