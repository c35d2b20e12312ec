import pytest
import torch
from cases import PROBLEMS, draw, linear, tables, task_at
from torch.func import vmap
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.errors import InputError
from metalit.hypergradients import Implicit, JTg, Unrolled, over_tasks
from metalit.inner import SGD
from metalit.keys import fold, permutation
from metalit.linsolve import Dense
from metalit.problem import Points
from metalit.problems import Cleaning, Logistic, Ridge
from metalit.tree import tree_map

MAKERS = {
    "Ridge": (lambda **sizes: Ridge(3, **sizes), tables(3)),
    "Logistic": (lambda **sizes: Logistic(2, intercept=False, **sizes), tables(2, classes=2)),
    "Cleaning": (lambda **sizes: Cleaning(linear(2, 3), 6, decay=0.2, **sizes), tables(2, classes=3)),
}
each_problem = pytest.mark.parametrize("name", MAKERS)


def posed(name, **sizes):
    make, tasks = MAKERS[name]
    problem = make(**sizes).double()
    for parameter in problem.outer().values():
        parameter.data = draw(*parameter.shape, seed=6)
    return problem, tasks


def rows_of(task, step, batch, count=6):
    return permutation(fold(task.key, step), count)[:batch]


def cut(points, rows):
    return Points(points.x[rows], points.y[rows])


def warm(problem, task):
    return tree_map(lambda value: draw(*value.shape, seed=9), problem.init(problem.outer(), task))


@each_problem
@pytest.mark.parametrize("step", [0, 1, 5])
def test_an_inner_step_sees_the_rows_of_its_key_and_number(name, step):
    (problem, tasks), (whole, _) = posed(name, batch=4, outer_batch=3), posed(name)
    seen = []
    for index in range(3):
        task = task_at(tasks, index)
        rows, inner, own = rows_of(task, step, 4), warm(problem, task), problem.outer()
        fewer = {"logit": own["logit"][rows]} if name == "Cleaning" else own
        expected = whole.inner_loss(inner, fewer, task._replace(train=cut(task.train, rows)), 0)
        assert_close(problem.inner_loss(inner, own, task, step), expected, rtol=1e-13, atol=0)
        judged = rows_of(task, -1, 3, 5)
        expected = whole.outer_loss(inner, own, task._replace(val=cut(task.val, judged)))
        assert_close(problem.outer_loss(inner, own, task), expected, rtol=1e-13, atol=0)
        assert len(set(rows.tolist())) == 4
        seen.append(tuple(sorted(rows.tolist())))
    assert len(set(seen)) > 1


@each_problem
@pytest.mark.parametrize(("estimator", "step"), [(Unrolled(1), 0), (JTg(1), 0), (Implicit(1, Dense()), 1)])
def test_the_estimate_is_that_on_its_rows_alone(name, estimator, step):
    (problem, tasks), (whole, _) = posed(name, batch=4, outer_batch=3), posed(name)
    task, optimizer = task_at(tasks, 1), SGD(0.1)
    start, outer, rows = warm(problem, task), outer_variable(problem, optimizer, task), rows_of(task, step, 4)
    if step > 0:
        # the point is that of the rows of step 0; Hessian and Jacobian are of the next rows
        start = Unrolled(1)(problem, optimizer, outer, task, start).inner
    own = {"logit": outer["problem"]["logit"][rows]} if name == "Cleaning" else outer["problem"]
    there = task._replace(train=cut(task.train, rows), val=cut(task.val, rows_of(task, -1, 3, 5)))
    still = SGD(1e-300) if step > 0 else optimizer
    expected = estimator(whole, still, {"problem": own, "optimizer": {}}, there, start)
    found = estimator(problem, optimizer, outer, task, warm(problem, task))
    assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert_close(found.inner, expected.inner, rtol=1e-12, atol=1e-13)
    if name == "Cleaning":
        slope = torch.zeros(6, dtype=torch.float64)
        slope[rows] = expected.gradient["problem"]["logit"]
        assert_close(found.gradient["problem"]["logit"], slope, rtol=1e-11, atol=1e-13)
    else:
        assert_close(found.gradient, expected.gradient, rtol=1e-11, atol=1e-13)


@each_problem
def test_minibatches_of_all_rows_are_the_whole(name):
    (problem, tasks), (whole, _) = posed(name, batch=6, outer_batch=5), posed(name)
    outer = outer_variable(whole, SGD(0.1), task_at(tasks, 0))
    found, expected = (over_tasks(Unrolled(3), each, SGD(0.1), outer, tasks) for each in (problem, whole))
    assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert_close(found.gradient, expected.gradient, rtol=1e-11, atol=1e-14)


@each_problem
def test_under_vmap_each_task_draws_its_own_rows(name):
    problem, tasks = posed(name, batch=2, outer_batch=2)
    inner, own = warm(problem, task_at(tasks, 0)), problem.outer()
    for loss in (
        lambda task: problem.inner_loss(inner, own, task, 3),
        lambda task: problem.outer_loss(inner, own, task),
    ):
        one_table = tasks._replace(train=_same(tasks.train), val=_same(tasks.val))
        each = [loss(task_at(one_table, index)) for index in range(3)]
        dims = tasks._replace(train=Points(0, 0, None), val=Points(0, 0, None), test=Points(0, 0, None))
        dims = dims._replace(noise=0, corrupted=0, key=0)
        assert_close(vmap(loss, in_dims=(dims,))(one_table), torch.stack(each), rtol=1e-13, atol=0)
        assert len({value.item() for value in each}) > 1


def _same(points):
    return Points(points.x[:1].expand(3, -1, -1), points.y[:1].expand(3, *[-1] * (points.y.dim() - 1)))


@pytest.mark.parametrize("setting", ["batch", "outer_batch"])
@pytest.mark.parametrize("size", [0, -1, 2.5, "some", None])
@each_problem
def test_a_size_that_is_no_number_of_rows_is_refused(name, setting, size):
    with pytest.raises(InputError) as raised:
        MAKERS[name][0](**{setting: size})
    assert str(raised.value) == f"{name}: {setting}={size!r} must be a positive number of rows, or 'all'"


@pytest.mark.parametrize(("setting", "there"), [("batch", 6), ("outer_batch", 5)])
@each_problem
def test_more_rows_than_there_are_is_refused(name, setting, there):
    for size, fine in ((there, True), (there + 1, False)):
        problem, tasks = posed(name, **{setting: size})
        if fine:
            problem.check(task_at(tasks, 0))
            continue
        with pytest.raises(InputError) as raised:
            problem.check(task_at(tasks, 0))
        told = f"{name}: {setting}={size} is more than the {there} rows that there are; say 'all', or a smaller number"
        assert str(raised.value) == told


def test_the_shipped_problems_take_their_own_tasks():
    for problem, tasks, *_ in PROBLEMS.values():
        problem.check(task_at(tasks, 0))
