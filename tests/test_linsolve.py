from itertools import pairwise

import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.linalg import cond, matrix_norm, matrix_power
from torch.testing import assert_close

from metalit.linsolve import CG, Dense, Neumann, NormalCG, Nystrom
from metalit.tree import flatten, unflatten

LIKE = {"b": torch.zeros(2, 2, dtype=torch.float64), "a": {"d": torch.zeros((), dtype=torch.float64), "c": draw(1)}}
sizes = pytest.mark.parametrize("size", [1, 2, 6])
each_solver = pytest.mark.parametrize(
    "solver",
    [CG(40, 1e-14), NormalCG(60, 1e-15), Neumann(600, 0.15), Dense()],
    ids=lambda solver: type(solver).__name__,
)


def definite(size, seed=1, count=None):
    """Symmetric, with eigenvalues in [0.5, 10]."""
    shape = (size, size) if count is None else (count, size, size)
    basis = torch.linalg.qr(draw(*shape, seed=seed)).Q
    values = 0.5 + 9.5 * torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return basis @ torch.diag_embed(values) @ basis.mT


def by(A):
    return lambda v: A @ v


@sizes
@each_solver
def test_the_solution_of_a_definite_system(solver, size):
    A, b = definite(size), draw(size, seed=2)
    found = solver(by(A), b)
    assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-10, atol=1e-12)
    assert found.indefinite.dtype == torch.bool
    assert found.indefinite.shape == ()
    assert not found.indefinite


@each_solver
def test_a_tree_of_several_leaves_is_one_vector(solver):
    A, flat = definite(6), draw(6, seed=2)
    found = solver(lambda v: unflatten(A @ flatten(v), LIKE), unflatten(flat, LIKE))
    assert list(found.x) == ["b", "a"]
    assert found.x["a"]["d"].shape == ()
    assert_close(flatten(found.x), torch.linalg.solve(A, flat), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [CG(5, 1e-14), CG(2), Neumann(3, 0.1), Dense(), NormalCG(3), Nystrom(3, 0.4)])
def test_vmapped_over_systems_is_a_loop(solver):
    A, b = definite(5, count=4), draw(4, 5, seed=2)
    A[1] -= 3 * torch.eye(5)
    b[2] = 0
    each = [solver(by(A[index]), b[index]) for index in range(4)]
    found = vmap(lambda A, b: tuple(solver(by(A), b)), out_dims=(0, None if isinstance(solver, Neumann) else 0))(A, b)
    assert_close(found[0], torch.stack([one.x for one in each]), rtol=1e-11, atol=1e-12)
    assert torch.equal(found[1].expand(4), torch.stack([one.indefinite for one in each]))
    assert each[1].indefinite == isinstance(solver, CG | Dense | Nystrom)


# ---- conjugate gradients


@given(st.integers(1, 8), st.integers(0, 1000))
def test_cg_is_exact_after_as_many_steps_as_unknowns(size, seed):
    A, b = definite(size, seed), draw(size, seed=seed + 1)
    found = CG(size, 0.0)(by(A), b)
    assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)
    assert not found.indefinite


def test_cg_is_exact_after_as_many_steps_as_distinct_eigenvalues():
    basis = torch.linalg.qr(draw(6, 6)).Q
    A = basis @ torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0, 7.0], dtype=torch.float64).diag() @ basis.T
    b = draw(6, seed=2)
    assert_close(CG(3)(by(A), b).x, torch.linalg.solve(A, b), rtol=1e-12, atol=1e-13)
    assert (CG(2)(by(A), b).x - torch.linalg.solve(A, b)).norm() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_each_iterate_is_the_best_of_its_krylov_space(steps):
    # x_k minimises ½xᵀAx − bᵀx over the span of b, Ab, …, Aᵏ⁻¹b
    A, b = definite(6), draw(6, seed=2)
    krylov = torch.stack([matrix_power(A, power) @ b for power in range(steps)], 1)
    best = krylov @ torch.linalg.solve(krylov.T @ A @ krylov, krylov.T @ b)
    assert_close(CG(steps, 0.0)(by(A), b).x, best, rtol=1e-9, atol=1e-10)


def test_from_the_step_within_tolerance_on_nothing_changes():
    A, b = definite(6), draw(6, seed=2)
    iterates = [CG(steps, 0.0)(by(A), b).x for steps in range(1, 6)]
    left = [((b - A @ x).norm() / b.norm()).item() for x in iterates]
    assert all(after < before for before, after in pairwise(left))
    for index, x in enumerate(iterates):
        # it is this iterate that is returned, not the one before
        found = CG(50, left[index] * 1.0001)(by(A), b)
        assert_close(found.x, x, rtol=0, atol=0)
        assert not found.indefinite
        assert_close(CG(index + 1, left[index] * 0.9999)(by(A), b).x, x, rtol=0, atol=0)


def test_steps_far_beyond_the_solution_are_harmless():
    for tolerance in (0.0, 1e-10):
        A, b = definite(4), draw(4, seed=2)
        found = CG(500, tolerance)(by(A), b)
        assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-10)
        assert not found.indefinite


@each_solver
def test_a_right_hand_side_of_zero_has_the_solution_zero(solver):
    for A in (
        definite(3),
        torch.zeros(3, 3, dtype=torch.float64) if isinstance(solver, CG | NormalCG) else definite(3, 7),
    ):
        found = solver(by(A), torch.zeros(3, dtype=torch.float64))
        assert found.x.tolist() == [0, 0, 0]
        assert not found.indefinite


def test_cg_stays_where_it_was_when_it_meets_no_or_negative_curvature():
    A = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64).diag()
    for b, iterate in (
        ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0]),
        # along b the curvature is 2 + 1 − 1 = 2 of 3, so one step of 3/2 is taken
        ([1.0, 1.0, 1.0], [1.5, 1.5, 1.5]),
    ):
        for steps in (2, 3, 50):
            found = CG(steps)(by(A), torch.tensor(b, dtype=torch.float64))
            assert found.indefinite
            assert_close(found.x, torch.tensor(iterate, dtype=torch.float64), rtol=1e-14, atol=0)
    singular = torch.tensor([1.0, 0.0], dtype=torch.float64).diag()
    found = CG()(by(singular), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert found.indefinite
    assert found.x.tolist() == [0, 0]


def test_cg_sees_no_flaw_that_the_right_hand_side_does_not_meet():
    singular = torch.tensor([4.0, 0.0, -1.0], dtype=torch.float64).diag()
    found = CG()(by(singular), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert_close(found.x, torch.tensor([0.5, 0, 0], dtype=torch.float64), rtol=1e-15, atol=0)
    assert not found.indefinite


def test_a_curvature_that_is_no_number_is_flagged():
    nan = torch.full((2, 2), torch.nan, dtype=torch.float64)
    assert CG()(by(nan), draw(2)).indefinite
    assert Dense()(by(nan), draw(2)).indefinite
    # no flag is claimed of a right-hand side that is none; x tells
    assert CG()(by(definite(2)), torch.full((2,), torch.nan, dtype=torch.float64)).x.isnan().all()


@pytest.mark.parametrize("tolerance", [0.0, 1e-10])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float32, [1e-18, 1e-15, 1e-12, 1e-6, 1.0, 1e12]), (torch.float64, [1e-150, 1e-60, 1e-12, 1.0, 1e60])],
)
def test_cg_knows_no_unit_and_takes_no_underflow_for_a_lack_of_curvature(dtype, sizes, tolerance):
    for size in sizes:
        for seed in range(10):
            A, b = 1e-3 * definite(4, seed), draw(4, seed=seed + 1)
            found = CG(40, tolerance)(by(A.to(dtype)), (size * b).to(dtype))
            assert_close(found.x.double() / size, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-2)
            assert not found.indefinite


# ---- the Neumann series


@sizes
@pytest.mark.parametrize("terms", [1, 2, 3, 9])
def test_neumann_is_its_partial_sum(size, terms):
    A, b, eta = definite(size), draw(size, seed=2), 0.13
    powers = [matrix_power(torch.eye(size, dtype=torch.float64) - eta * A, power) for power in range(terms)]
    assert_close(Neumann(terms, eta)(by(A), b).x, eta * sum(powers) @ b, rtol=1e-12, atol=1e-14)


def test_neumann_converges_below_two_over_the_norm_alone():
    A, b = definite(5), draw(5, seed=2)
    edge, right = 2 / matrix_norm(A, 2).item(), torch.linalg.solve(A, b)
    assert_close(Neumann(3000, 0.95 * edge)(by(A), b).x, right, rtol=1e-9, atol=1e-10)
    near, far = (((Neumann(terms, 1.05 * edge)(by(A), b).x) - right).norm() for terms in (50, 150))
    assert far > 1e3 * near > right.norm()
    assert not Neumann(150, 1.05 * edge)(by(-A), b).indefinite


def test_long_neumann_is_cg_is_dense():
    for size in (1, 3, 7):
        A, b = definite(size), draw(size, seed=2)
        neumann, cg, dense = (solver(by(A), b).x for solver in (Neumann(600, 0.15), CG(60, 1e-14), Dense()))
        assert_close(neumann, dense, rtol=1e-11, atol=1e-12)
        assert_close(cg, dense, rtol=1e-11, atol=1e-12)


# ---- elimination


def test_dense_solves_what_is_indefinite_and_says_so():
    basis = torch.linalg.qr(draw(3, 3)).Q
    A, b = basis @ torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64).diag() @ basis.T, draw(3, seed=2)
    found = Dense()(by(A), b)
    assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-11, atol=1e-12)
    assert found.indefinite


def test_dense_takes_columns_for_columns():
    A, b = draw(3, 3) + 4 * torch.eye(3), draw(3, seed=2)
    assert_close(Dense()(by(A), b).x, torch.linalg.solve(A, b), rtol=1e-12, atol=1e-13)


def test_dense_flags_a_singular_matrix():
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    assert Dense()(by(singular), draw(2)).indefinite
    assert Dense()(by(torch.zeros(1, 1, dtype=torch.float64)), draw(1)).indefinite


def test_dense_is_as_right_as_the_condition_allows():
    hilbert = 1 / (torch.arange(6)[:, None] + torch.arange(6) + 1).double()
    x = draw(6)
    found = Dense()(by(hilbert), hilbert @ x)
    assert not found.indefinite
    assert (found.x - x).norm() / x.norm() < 1e-15 * cond(hilbert)


@pytest.mark.parametrize("solver", [CG(3), NormalCG(3), Neumann(3, 0.1), Dense(), Nystrom(2)])
def test_the_right_hand_side_is_left_as_it_was(solver):
    A, b = definite(3), {"x": draw(3, seed=2)}
    solver(lambda v: {"x": A @ v["x"]}, b)
    assert torch.equal(b["x"], draw(3, seed=2))


def test_cg_in_single_precision_stops_at_rounding_and_calls_no_consistent_system_indefinite():
    basis = torch.linalg.qr(draw(20, 20, seed=3)).Q[:, :10]
    A = (basis * torch.linspace(1, 100, 10, dtype=torch.float64)) @ basis.T
    b = A @ draw(20, seed=4)
    found = CG(200)(lambda v: A.float() @ v, b.float())
    assert not found.indefinite
    assert (A @ found.x.double() - b).norm() < 1e-5 * b.norm()


def test_cg_takes_a_right_hand_side_whose_squares_underflow():
    b = torch.tensor([1e-25, 2e-25])
    assert_close(CG(5)(lambda v: 2 * v, b).x, b / 2, rtol=1e-6, atol=0)


# ---- conjugate gradients on the normal equation


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_each_iterate_on_the_normal_equation_has_the_least_residual_of_its_krylov_space(steps):
    # x_k minimises ‖b − Ax‖ over the span of Ab, A³b, …, A²ᵏ⁻¹b
    A, b = definite(5) - 4 * torch.eye(5, dtype=torch.float64), draw(5, seed=2)
    krylov = torch.stack([matrix_power(A, 2 * power + 1) @ b for power in range(steps)], 1)
    best = krylov @ torch.linalg.lstsq(A @ krylov, b).solution
    assert_close(NormalCG(steps, 0.0)(by(A), b).x, best, rtol=1e-8, atol=1e-9)


def test_the_normal_equation_is_solved_where_the_matrix_has_both_signs():
    A, b = definite(6) - 4 * torch.eye(6, dtype=torch.float64), draw(6, seed=2)
    assert CG(60)(by(A), b).indefinite
    found = NormalCG(60, 1e-15)(by(A), b)
    assert_close(found.x, Dense()(by(A), b).x, rtol=1e-9, atol=1e-10)
    assert not found.indefinite


def test_the_normal_equation_has_the_solution_of_least_norm_where_the_matrix_is_singular():
    A = torch.tensor([4.0, 0.0, -1.0], dtype=torch.float64).diag()
    found = NormalCG()(by(A), torch.tensor([2.0, 5.0, 3.0], dtype=torch.float64))
    assert_close(found.x, torch.tensor([0.5, 0.0, -3.0], dtype=torch.float64), rtol=1e-14, atol=0)
    assert not found.indefinite


# ---- Nyström


def of_rank(size, rank):
    basis = torch.linalg.qr(draw(size, size, seed=3)).Q[:, :rank]
    return (basis * torch.linspace(0.5, 4, rank, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(("size", "rank", "columns"), [(1, 1, 1), (5, 5, 5), (5, 5, 50), (7, 2, 2), (7, 2, 5)])
def test_nystrom_is_the_dense_solve_with_rho_once_it_has_as_many_columns_as_there_is_rank(size, rank, columns):
    A, b, rho = of_rank(size, rank), draw(size, seed=2), 0.3
    found = Nystrom(columns, rho)(by(A), b)
    right = Dense()(by(A + rho * torch.eye(size, dtype=torch.float64)), b)
    assert not found.indefinite
    # columns that depend on each other cost half of the digits
    tolerance = 1e-11 if columns == rank else 1e-6
    assert_close(found.x, right.x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 3])
def test_nystrom_inverts_the_approximation_by_its_columns(rank):
    A, b, rho = definite(6), draw(6, seed=2), 0.7
    found = Nystrom(rank, rho)(by(A), b)
    # the columns are those whose removal from the identity's leaves x as b / rho
    inverse = torch.stack([Nystrom(rank, rho)(by(A), column).x for column in torch.eye(6, dtype=torch.float64)], 1)
    approximation = torch.linalg.inv(inverse) - rho * torch.eye(6, dtype=torch.float64)
    exact = (approximation - A).abs().amax(0) < 1e-10
    assert exact.sum() == rank
    C = A[:, exact]
    assert_close(approximation, C @ torch.linalg.solve(C[exact], C.T), rtol=1e-9, atol=1e-10)
    assert_close(found.x, inverse @ b, rtol=1e-11, atol=1e-12)
    assert torch.equal(Nystrom(rank, rho)(by(A), b).x, found.x)
    assert not found.indefinite


def test_nystrom_is_finite_and_flags_where_the_matrix_is_not_definite():
    b = draw(4, seed=2)
    zero = Nystrom(2, 0.5)(by(torch.zeros(4, 4, dtype=torch.float64)), b)
    assert_close(zero.x, 2 * b, rtol=1e-15, atol=0)
    assert not zero.indefinite
    assert Nystrom(4)(by(-definite(4)), b).indefinite
    assert Nystrom(4)(by(torch.full((4, 4), torch.nan, dtype=torch.float64)), b).indefinite
