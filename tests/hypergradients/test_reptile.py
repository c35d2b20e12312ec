"""Reptile: which rows its inner steps take, and where it is valid."""

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, regression_tasks, task_at
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.errors import InputError
from metalit.hypergradients import Reptile
from metalit.inner import SGD
from metalit.problem import Points, Task
from metalit.problems import FewShot

RAGGED = regression_tasks(2, 1, ragged=True)
FULL = regression_tasks(2, 1)


def estimate(hypergradient, task, lr=0.1):
    problem = PROBLEMS["MAML, ragged"].problem
    return hypergradient(problem, SGD(lr), outer_variable(problem, SGD(lr)), task)


class Noting(FewShot):
    """Notes the rows and masks of which inner gradients are taken."""

    def inner_grad(self, inner, outer, task, step):
        self.seen.append(task.support)
        return super().inner_grad(inner, outer, task, step)


def rows_of(task, batch, steps):
    problem = Noting(torch.nn.Linear(2, 1).double())
    problem.seen = []
    Reptile(steps, batch)(problem, SGD(0.1), outer_variable(problem, SGD(0.1)), task)
    return problem.seen


def real_rows(points):
    mask = torch.ones(len(points.x), dtype=torch.bool) if points.mask is None else points.mask
    return torch.cat([points.x, points.y], 1)[mask].tolist()


@pytest.mark.parametrize(("tasks", "index", "batch", "steps"), [(FULL, 0, 4, 3), (RAGGED, 0, 2, 3), (RAGGED, 2, 5, 2)])
def test_minibatches_take_every_real_row_of_support_and_query_once_before_any_again(tasks, index, batch, steps):
    task = task_at(tasks, index)
    joined = real_rows(task.support) + real_rows(task.query)
    assert len(joined) == batch * steps
    seen = rows_of(task, batch, steps + 1)
    taken = [row for points in seen[:-1] for row in real_rows(points)]
    assert sorted(taken) == sorted(joined)
    assert taken != joined
    assert real_rows(seen[-1]) == real_rows(seen[0])  # and over again
    other = rows_of(task._replace(key=task.key + 1), batch, steps)
    assert [row for points in other for row in real_rows(points)] != taken


@pytest.mark.parametrize("batch", [12, 100])
@pytest.mark.parametrize("tasks", [FULL, RAGGED], ids=["full", "ragged"])
def test_a_minibatch_of_all_rows_is_the_joined_set(tasks, batch):
    task = task_at(tasks, 0)
    x, y = (torch.cat([real_part(task.support)[part], real_part(task.query)[part]]) for part in (0, 1))
    found = estimate(Reptile(3, batch), task)
    right = estimate(Reptile(3), Task(Points(x, y), task.query, task.key))
    assert_close(tuple(found), tuple(right), rtol=1e-12, atol=1e-13)


def real_part(points):
    mask = slice(None) if points.mask is None else points.mask
    return points.x[mask], points.y[mask]


def test_one_set_may_have_a_mask_alone():
    task = task_at(RAGGED, 1)
    mixed = Task(task_at(FULL, 1).support, task.query, task.key)
    taken = [row for points in rows_of(mixed, 5, 2) for row in real_rows(points)]
    assert sorted(taken) == sorted(real_rows(mixed.support) + real_rows(mixed.query))


def check(hypergradient, problem, task):
    hypergradient.check(problem, SGD(0.1), outer_variable(problem, SGD(0.1), task), task)


@pytest.mark.filterwarnings("error")  # the error says it all
def test_an_init_that_hands_over_a_part_is_refused():
    problem, tasks, *_ = PROBLEMS["ANIL"]
    with pytest.raises(InputError) as raised:
        check(Reptile(2), problem, task_at(tasks, 0))
    assert str(raised.value) == (
        "hypergradient Reptile moves the outer variable towards the inner one, so FewShot.init must hand it over as it "
        "is, and weight it does not; adapt all parameters, or use FirstOrder or Unrolled"
    )


def test_an_init_that_changes_what_it_hands_over_is_refused():
    class Doubled(Bowl):
        def init(self, outer, task):
            return {"theta": 2 * outer["theta"]}

    with pytest.raises(InputError, match=r"so Doubled.init must hand it over as it is, and theta it does not; adapt"):
        check(Reptile(2), Doubled(draw(3)), task_at(bowls(3), 0))


def test_minibatches_need_support_and_query():
    check(Reptile(2), Bowl(draw(3)), task_at(bowls(3), 0))
    with pytest.raises(InputError) as raised:
        check(Reptile(2, batch=3), Bowl(draw(3)), task_at(bowls(3), 0))
    assert str(raised.value) == (
        "hypergradient Reptile: batch=3 takes rows of support and query together, which a BowlTask has not; leave it "
        "out"
    )
