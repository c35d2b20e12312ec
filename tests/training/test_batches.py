"""Chunks of tasks: the mean is that of all at once, and what does not fit into memory is halved until it does."""

from typing import NamedTuple

import pytest
import torch
from cases import draw
from torch import Tensor, nn
from torch.testing import assert_close

from metalit.training.batches import Batches, StepResult
from metalit.training.outer_gradient import OuterGradient

COUNT = 7


class Batch(NamedTuple):
    x: Tensor
    mask: Tensor | None
    number: float


class Fit:
    """The mean of ½‖w − x‖² over tasks x, of which at most ``most`` fit into memory."""

    def __init__(self, most=COUNT):
        self.most = most
        self.sizes = []

    def __call__(self, outer, items):
        tasks, start = items
        if len(tasks.x) > self.most:
            raise torch.OutOfMemoryError(f"{len(tasks.x)} tasks")
        self.sizes.append(len(tasks.x))
        error = outer["w"] - tasks.x
        loss = 0.5 * error.square().sum(1)
        inner = {"b": {"deep": tasks.number * tasks.x}, "a": start["a"] + loss}
        metrics = {"x": tasks.x.mean(), "loss": loss.mean()}
        return StepResult(OuterGradient.of(loss.mean(), {"w": error.mean(0)}), metrics, inner)


OUTER = {"w": draw(3, seed=1)}
TASKS = Batch(draw(COUNT, 3, seed=2), None, 2.0)
START = {"a": draw(COUNT, seed=3)}


def estimates(fn, tasks_per_chunk=None):
    told = []
    return Batches(fn, nn.Module(), False, tasks_per_chunk, "the outer step", told.append), told


def check_is_whole(found):
    error = OUTER["w"] - TASKS.x
    loss = 0.5 * error.square().sum(1)
    expected = torch.cat([loss.mean().reshape(1), error.mean(0), torch.zeros(1, dtype=torch.float64)])
    assert_close(found.gradient.vector, expected, rtol=1e-14, atol=1e-14)
    assert found.gradient.vector[-1] == 0
    assert torch.equal(found.per_item["b"]["deep"], 2 * TASKS.x)
    assert_close(found.per_item["a"], START["a"] + loss, rtol=1e-14, atol=0)
    assert_close(found.metrics, {"x": TASKS.x.mean(), "loss": loss.mean()}, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("chunk", "sizes"),
    [(1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 2, 2]), (6, [4, 3]), (7, [7]), (100, [7]), (None, [7])],
)
def test_chunks_give_the_mean_of_all_and_the_inner_variables_in_order(chunk, sizes):
    fn = Fit()
    each, told = estimates(fn, chunk)
    check_is_whole(each(OUTER, (TASKS, START)))
    assert fn.sizes == sizes
    assert told == []


def test_what_is_bound_sees_an_outer_variable_that_changes_in_place():
    outer = {"w": OUTER["w"] + 1}
    bound = estimates(Fit(), 3)[0].bind(outer, (TASKS, START))
    outer["w"].sub_(1)
    values = [TASKS.x, None, TASKS.number, START["a"]]
    check_is_whole(bound(values).joined())


def test_a_task_without_inner_variable_has_means_alone():
    def fn(outer, items):
        tasks, _ = items
        return StepResult(OuterGradient.of(tasks.x.mean(), outer), {"x": tasks.x.mean()}, {})

    found = estimates(fn, 3)[0](OUTER, (TASKS, None))
    assert found.per_item == {}
    assert_close(found.gradient.vector[0], TASKS.x.mean(), rtol=1e-14, atol=1e-15)
    assert_close(found.gradient.vector[1:4], OUTER["w"], rtol=1e-14, atol=0)
    assert_close(found.metrics["x"], TASKS.x.mean(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("broken", [0, 3, 6])
def test_a_chunk_that_is_not_finite_is_flagged(broken):
    x = TASKS.x.clone()
    x[broken, 1] = torch.inf
    found = estimates(Fit(), 2)[0](OUTER, (TASKS._replace(x=x), START))
    assert found.gradient.vector[-1] != 0


def line(size, half):
    return (
        f"{size} tasks at once do not fit into memory: going on with chunks of {half}; "
        f"model.tasks_per_chunk={half} begins with them"
    )


@pytest.mark.parametrize(
    ("most", "begins", "told", "sizes"),
    [
        (6, None, [line(7, 4)], [4, 3]),
        (3, None, [line(7, 4), line(4, 2)], [2, 2, 2, 1]),
        (1, None, [line(7, 4), line(4, 2), line(2, 1)], [1] * 7),
        (2, 3, [line(3, 2)], [2, 2, 2, 1]),
        (2, 50, [line(7, 4), line(4, 2)], [2, 2, 2, 1]),
    ],
)
def test_what_does_not_fit_is_halved_and_stays_so(most, begins, told, sizes):
    fn = Fit(most)
    each, said = estimates(fn, begins)
    check_is_whole(each(OUTER, (TASKS, START)))
    assert said == told
    assert fn.sizes[-len(sizes) :] == sizes
    fn.sizes.clear()
    check_is_whole(each(OUTER, (TASKS, START)))
    assert said == told
    assert fn.sizes == sizes


def test_what_is_told_is_what_was_tried():
    fn = Fit(3)
    each, told = estimates(fn, 6)
    check_is_whole(each(OUTER, (TASKS, START)))
    assert told == [line(4, 2)]  # 7 tasks in chunks of 6 are 4 and 3


@pytest.mark.parametrize("begins", [None, 1])
def test_a_single_task_that_does_not_fit_raises(begins):
    each, told = estimates(Fit(0), begins)
    with pytest.raises(torch.OutOfMemoryError, match=r"^1 tasks"):
        each(OUTER, (TASKS, START))
    assert told == ([] if begins else [line(7, 4), line(4, 2), line(2, 1)])


def test_the_patience_with_the_compiler_can_change():
    each = Batches(Fit(), nn.Module(), True, None, "the outer step", print)
    each.wait_at_most(7.0)
    assert each.compiled.seconds == each.alike(Fit(), "another").compiled.seconds == 7.0


def test_another_function_takes_chunks_as_large():
    fn = Fit()
    check_is_whole(estimates(Fit(), 3)[0].alike(fn, "another")(OUTER, (TASKS, START)))
    assert fn.sizes == [3, 2, 2]
