"""Where tasks or rows do not fit into a GPU's memory, chunks are halved, and what is learned stays the same."""

from contextlib import contextmanager

import pytest
import torch
from fits import blobs
from on_device import STEP, apart, fitted, network

from metalit.data import BatchDataModule, Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner, SupervisedLearner
from metalit.problems import FewShot

pytestmark = pytest.mark.gpu


@contextmanager
def at_most(device, size):
    """Let this process have so many bytes of the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def peak(device, fit):
    """What a fit gives, and the most memory that it took."""
    if device == "cpu":
        return fit(), 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return fit(), torch.cuda.max_memory_allocated()


def tasks(device, **options):
    """Enough tasks that a half of them takes much less memory than all."""
    width, count = (256, 512) if device == "cuda" else (8, 8)
    learner = MetaLearner(FewShot(network(1, width, width, 1)), SGD(0.05), Unrolled(1), optimizer=STEP, **options)
    few = Episodes(2, 5, 5)
    return learner, TaskDataModule(Sine(), Episodes(count, 5, 5), few, few), count


def rows(device, **options):
    """Enough rows, likewise."""
    width, count = (1024, 60000) if device == "cuda" else (8, 60)
    learner = SupervisedLearner(network(4, width, width, 3), optimizer=STEP, **options)
    data = BatchDataModule(blobs(count * 5 // 3), batch_size=count)
    return learner, data, count


@pytest.mark.parametrize(
    ("make", "options"),
    [(tasks, {}), (tasks, {"compile": True}), (rows, {})],
    ids=["tasks", "tasks, compiled", "rows"],
)
def test_chunks_are_halved_on_the_way(tmp_path, capfd, device, record_property, make, options):
    what = make.__name__
    _, _, count = make(device)

    def fit(**more):
        learner, data, _ = make(device, **options, **more)
        return fitted(tmp_path, device, learner, data, steps=2, limit_val_batches=0)

    chunked, least = peak(device, lambda: fit(**{f"{what}_per_chunk": count // 2}))
    whole, most = peak(device, fit)
    start = make(device)[0]
    assert apart(chunked, whole, start) < 1e-3
    del whole
    capfd.readouterr()
    with at_most(device, (least + most) / 2):
        found = fit()
    told = [line for line in capfd.readouterr().out.splitlines() if "do not fit into memory" in line]
    error = apart(found, chunked, start)
    record_property("error", error)
    record_property("told", told)
    record_property("peak MiB: halves, all", [least >> 20, most >> 20])
    assert error < 1e-3
    if device == "cuda":
        assert least < most
        assert f"{count} {what} at once do not fit into memory" in told[0]
    else:
        assert not told
