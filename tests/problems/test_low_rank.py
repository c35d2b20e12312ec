import pytest
import torch
from cases import draw, matrices, task_at
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.inner import Newton
from metalit.problem import Matrix
from metalit.problems import LowRank

FULL, MISSING = task_at(matrices(5, 4), 0), task_at(matrices(5, 4, missing=True), 0)


def low_rank(rank=2, exact=False):
    problem = LowRank(5, 4, rank, exact).double()
    problem.u.data, problem.v.data = draw(5, rank, seed=1), draw(4, rank, seed=2)
    return problem


@pytest.mark.parametrize("exact", [False, True])
def test_the_factors_are_outer_or_inner(exact):
    problem = low_rank(exact=exact)
    assert problem.outer().keys() == ({"u"} if exact else {"u", "v"})
    start = problem.init(problem.outer(), FULL)
    assert start.keys() == ({"v"} if exact else set())
    assert not any(value.requires_grad for value in start.values())


@pytest.mark.parametrize("task", [FULL, MISSING])
@pytest.mark.parametrize("exact", [False, True])
def test_both_losses_are_the_squared_error_of_what_was_observed(task, exact):
    problem = low_rank(exact=exact)
    inner, own = ({"v": draw(4, 2, seed=5)} if exact else {}), problem.outer()
    V = inner["v"] if exact else problem.v
    expected = sum(
        (task.values[i, j] - problem.u[i] @ V[j]) ** 2 for i in range(5) for j in range(4) if task.observed[i, j]
    )
    assert_close(problem.outer_loss(inner, own, task), expected, rtol=1e-13, atol=0)
    assert_close(problem.inner_loss(inner, own, task, 3), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_scores_stand_beside_eckart_and_youngs_optimum(rank):
    problem = low_rank(rank)
    found = problem.scores({}, problem.outer(), FULL, "test")
    total, values = FULL.values.square().sum(), torch.linalg.svdvals(FULL.values)
    loss = (FULL.values - problem.u @ problem.v.T).square().sum()
    rest = values[rank:].square().sum() / total
    assert_close(found["loss"], loss, rtol=1e-13, atol=0)
    assert_close(found["relative_error"], loss / total, rtol=1e-13, atol=0)
    assert_close(found["eckart_young"], rest, rtol=1e-12, atol=1e-15)
    assert_close(found["excess"], loss / total - rest, rtol=1e-12, atol=1e-15)
    left, values, right = torch.linalg.svd(FULL.values, full_matrices=False)
    best = {"u": left[:, :rank] * values[:rank], "v": right[:rank].T}
    assert problem.scores({}, best, FULL, "test")["excess"].abs() < 1e-14


def test_with_missing_entries_the_optimum_is_unknown():
    problem = low_rank()
    found = problem.scores({}, problem.outer(), MISSING, "val")
    assert found.keys() == {"loss", "relative_error"}
    total = MISSING.values[MISSING.observed].square().sum()
    assert_close(found["relative_error"], problem.outer_loss({}, problem.outer(), MISSING) / total, rtol=1e-13, atol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_the_results_are_both_factors(exact):
    problem = low_rank(exact=exact)
    inner = adapt(problem, Newton(), outer_variable(problem, Newton(), FULL), FULL, 1)
    found = problem.results(inner, problem.outer(), FULL)
    assert_close(found["u"]["u"], problem.u, rtol=0, atol=0)
    assert_close(found["v"]["v"], inner["v"] if exact else problem.v, rtol=0, atol=0)
    assert problem.baselines(problem.outer(), FULL) == {}


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 4, 5), (2, 7, 3), (5, 4, 0), (0, 4, 1), (3, -1, 1)])
def test_a_rank_that_no_such_matrix_has_is_refused(rows, columns, rank):
    with pytest.raises(InputError) as raised:
        LowRank(rows, columns, rank)
    told = f"LowRank: rank={rank} must be between 1 and the smaller of rows={rows}, columns={columns}"
    assert str(raised.value) == told


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (LowRank(6, 4), "LowRank: rows=6, but the data has 5 rows; set rows to 5"),
        (LowRank(5, 3), "LowRank: columns=3, but the data has 4 columns; set columns to 4"),
    ],
)
def test_a_matrix_of_another_shape_is_refused(problem, told):
    with pytest.raises(InputError) as raised:
        problem.check(FULL)
    assert str(raised.value) == told


def test_a_column_that_does_not_determine_its_factors_is_refused():
    observed = FULL.observed.clone()
    observed[:3, 2] = False
    task = Matrix(FULL.values * observed, observed, FULL.key)
    LowRank(5, 4, rank=2, exact=True).check(task)
    LowRank(5, 4, rank=3).check(task)
    with pytest.raises(InputError) as raised:
        LowRank(5, 4, rank=3, exact=True).check(task)
    assert str(raised.value) == (
        "LowRank: a column has 2 observed entries, too few to solve for its 3 factors; set exact=false, or rank=2 at "
        "most"
    )
