"""The formulas of the literature, and the identities between estimators; ``cases.py`` holds every pair."""

import pytest
import torch
from cases import PROBLEMS, Bowl, bowls, draw, linear, matrices, regression_tasks, tables, task_at
from torch import nn
from torch.linalg import inv, matrix_norm, matrix_power, solve
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.hypergradients import Direct, FirstOrder, Implicit, JTg, Reptile, Truncated, Unrolled, over_tasks
from metalit.inner import SGD, MetaSGD, Newton
from metalit.linsolve import CG, Dense, Neumann, NormalCG, Nystrom
from metalit.problem import Problem
from metalit.problems import FewShot, LowRank, Ridge, ThetaPhi
from metalit.tree import dot, flatten, norm, tree_map

SOLVERS = [CG(30, 1e-14), NormalCG(30, 1e-15), Neumann(150, 0.35), Dense()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
dimensions = pytest.mark.parametrize("dimension", [1, 3])


def estimate(hypergradient, problem, optimizer, task, start=None):
    return hypergradient(problem, optimizer, outer_variable(problem, optimizer, task), task, start)


def eye(like):
    return torch.eye(len(like), dtype=like.dtype)


# ---- quadratic tasks


def maml(A, lr, steps):
    M = matrix_power(eye(A) - lr * A, steps)
    return M @ A @ M


def fomaml(A, lr, steps):
    return A @ matrix_power(eye(A) - lr * A, steps)


def reptile(A, lr, steps):
    return eye(A) - matrix_power(eye(A) - lr * A, steps)


def imaml(A, weight):
    return weight**2 * inv(A + weight * eye(A)) @ A @ inv(A + weight * eye(A))


@dimensions
@pytest.mark.parametrize(("steps", "lr"), [(1, 0.3), (4, 0.2)])
def test_the_gradients_of_maml_fomaml_reptile_and_joint_training_are_their_matrices(dimension, steps, lr):
    problem, task = Bowl(draw(dimension, seed=4)), task_at(bowls(dimension), 1)
    A, offset = task.A, problem.theta.detach() - task.c
    for hypergradient, B in (
        (Unrolled(steps), maml(A, lr, steps)),
        (FirstOrder(steps), fomaml(A, lr, steps)),
        (Reptile(steps), reptile(A, lr, steps)),
        (Direct(), A),
    ):
        found = estimate(hypergradient, problem, SGD(lr), task).gradient["problem"]["theta"]
        assert_close(found, B @ offset, rtol=1e-12, atol=1e-13)


@dimensions
@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_of_meta_sgds_rates_is_minus_both_gradients(dimension, first_order):
    problem, task, optimizer = Bowl(draw(dimension, seed=4)), task_at(bowls(dimension), 1), MetaSGD(0.2)
    offset = problem.theta.detach() - task.c
    support = task.A @ offset
    query = task.A @ (offset - 0.2 * support)
    found = estimate(FirstOrder(1) if first_order else Unrolled(1), problem, optimizer, task).gradient
    assert_close(found["optimizer"]["lr"]["theta"], -support * query, rtol=1e-12, atol=1e-13)
    expected = query if first_order else query - 0.2 * task.A @ query
    assert_close(found["problem"]["theta"], expected, rtol=1e-12, atol=1e-13)


@dimensions
@each_solver
def test_imaml_is_the_jacobian_of_the_proximal_point(dimension, solver):
    weight, task = 0.7, task_at(bowls(dimension), 2)
    problem, A = Bowl(draw(dimension, seed=4), weight), task.A
    found = estimate(Implicit(1, solver), problem, Newton(), task)
    phi = problem.theta.detach()
    best = solve(A + weight * eye(A), A @ task.c + weight * phi)
    assert_close(found.inner["theta"], best, rtol=1e-12, atol=1e-13)
    jacobian = weight * inv(A + weight * eye(A))
    assert_close(jacobian @ A @ (best - task.c), imaml(A, weight) @ (phi - task.c), rtol=1e-12, atol=1e-13)
    assert_close(found.gradient["problem"]["theta"], imaml(A, weight) @ (phi - task.c), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("same", [True, False], ids=["support = query", "support and query"])
@each_solver
def test_few_shot_with_a_proximal_term_is_imaml(solver, same):
    weight, task = 0.7, task_at(regression_tasks(2, 1), 1)
    task = task._replace(query=task.support) if same else task
    problem = FewShot(linear(2, 1), proximal=weight)
    support, query = (torch.cat([points.x, torch.ones_like(points.y)], 1) for points in task[:2])
    A, Q = (2 / len(Z) * Z.T @ Z for Z in (support, query))
    pull = 2 / len(support) * support.T @ task.support.y[:, 0]
    phi = flatten(problem.outer()).detach()
    best = solve(A + weight * eye(A), pull + weight * phi)
    found = estimate(Implicit(1, solver), problem, Newton(), task)
    assert_close(flatten(found.inner), best, rtol=1e-11, atol=1e-12)
    slope = Q @ best - 2 / len(query) * query.T @ task.query.y[:, 0]
    right = weight * inv(A + weight * eye(A)) @ slope
    assert_close(flatten(found.gradient["problem"]), right, rtol=1e-9, atol=1e-11)
    if same:
        assert_close(right, imaml(A, weight) @ (phi - solve(A, pull)), rtol=1e-11, atol=1e-12)


LR, STEPS, WEIGHT = 0.25, 2, 3.0
ALGORITHMS = {
    "MAML": (0.0, lambda A: maml(A, LR, STEPS), Unrolled(STEPS), SGD(LR)),
    "FOMAML": (0.0, lambda A: fomaml(A, LR, STEPS), FirstOrder(STEPS), SGD(LR)),
    "Reptile": (0.0, lambda A: reptile(A, LR, STEPS), Reptile(STEPS), SGD(LR)),
    "joint": (0.0, lambda A: A, Direct(), SGD(LR)),
    "iMAML": (WEIGHT, lambda A: imaml(A, WEIGHT), Implicit(1), Newton()),
}


@dimensions
@pytest.mark.parametrize("at", ALGORITHMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_stops_at_its_own_point_alone(algorithm, at, dimension):
    tasks = bowls(dimension, count=4)
    B = torch.stack([ALGORITHMS[at][1](A) for A in tasks.A])
    point = torch.linalg.solve(B.sum(0), (B @ tasks.c[..., None]).sum(0)).squeeze(-1)
    weight, _, hypergradient, optimizer = ALGORITHMS[algorithm]
    problem = Bowl(point, weight)
    outer = outer_variable(problem, optimizer, task_at(tasks, 0))
    size = norm(over_tasks(hypergradient, problem, optimizer, outer, tasks).gradient["problem"])
    assert size < 1e-13 if algorithm == at else size > 1e-2


# ---- θ and φ


@pytest.mark.parametrize(("theta", "phi"), [([1.3], [-0.6]), ([0.7, -1.2, 0.4], [1.1, -0.5, 0.8, 0.3])])
def test_theta_phi_has_the_known_derivatives(theta, phi):
    problem, lr, key = ThetaPhi(theta, phi).double(), 0.07, torch.tensor(0)
    theta, phi = problem.theta, problem.phi.detach()
    s, square = phi @ phi, theta @ theta
    product = 8 * s * square * phi
    found = estimate(JTg(3), problem, SGD(lr), key)
    assert_close(found.loss, 2 * s**2 * square, rtol=1e-13, atol=0)
    assert_close(found.gradient["problem"]["phi"], product, rtol=1e-13, atol=0)
    assert_close(found.inner, (1 - 2 * lr * s) ** 3 * theta, rtol=1e-13, atol=0)
    one, first = (
        estimate(kind(1), problem, SGD(lr), key).gradient["problem"]["phi"] for kind in (Unrolled, FirstOrder)
    )
    assert_close(one - first, -lr * (1 - 2 * lr * s) * product, rtol=1e-12, atol=0)
    for K in (1, 2, 5):
        r = 1 - 2 * lr * s
        jacobian = -4 * lr * K * r ** (K - 1) * theta.outer(phi)
        after = r**K * theta
        expected = jacobian.T @ (2 * s * after) + 2 * phi * after.dot(after)
        unrolled = estimate(Unrolled(K), problem, SGD(lr), key)
        assert_close(unrolled.inner, after, rtol=1e-13, atol=0)
        assert_close(unrolled.gradient["problem"]["phi"], expected, rtol=1e-12, atol=0)


# ---- ridge regression


def ridge(dimension, intercept=False):
    problem = Ridge(dimension, intercept=intercept).double()
    problem.log_penalty.data = draw(dimension, seed=6)
    return problem, task_at(tables(dimension), 1)


def by_hand(problem, task):
    """The weights, q and the penalties, where H = XᵀX/n + diag(λ)."""
    x, val = task.train.x, task.val.x
    penalty = problem.log_penalty.detach().exp()
    if problem.intercept:
        x, val = (torch.cat([part, torch.ones_like(part[:, :1])], 1) for part in (x, val))
        penalty = torch.cat([penalty, torch.zeros(1, dtype=torch.float64)])
    H = x.T @ x / len(x) + penalty.diag()
    w = solve(H, x.T @ task.train.y[:, 0] / len(x))
    return w, solve(H, val.T @ (val @ w - task.val.y[:, 0]) / len(val)), penalty, H


@dimensions
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(
    "hypergradient", [*(Implicit(1, solver) for solver in SOLVERS), Unrolled(1), Unrolled(2), Truncated(3, 1)]
)
def test_the_gradient_of_ridge_penalties_is_minus_penalty_weight_and_q(dimension, intercept, hypergradient):
    problem, task = ridge(dimension, intercept)
    w, q, penalty, _ = by_hand(problem, task)
    found = estimate(hypergradient, problem, Newton(), task)
    assert_close(flatten(found.inner), w, rtol=1e-12, atol=1e-13)
    expected = (-penalty * w * q)[:dimension]
    assert_close(found.gradient["problem"]["log_penalty"], expected, rtol=1e-10, atol=1e-12)


class Weighted(Problem):
    """½ Σ sᵢ(xᵢᵀw − yᵢ)² + ½ wᵀ diag(λ) w, learned through s; ½ ‖X_v w − y_v‖² as outer loss."""

    def __init__(self, weights, penalty):
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.penalty = penalty

    def init(self, outer, task):
        return torch.zeros_like(self.penalty)

    def inner_loss(self, inner, outer, task, step):
        error = task.train.x @ inner - task.train.y[:, 0]
        return 0.5 * (outer["weights"] * error.square()).sum() + 0.5 * (self.penalty * inner.square()).sum()

    def outer_loss(self, inner, outer, task):
        return 0.5 * (task.val.x @ inner - task.val.y[:, 0]).square().sum()


@dimensions
@each_solver
def test_the_gradient_of_sample_weights_is_minus_residual_and_q(dimension, solver):
    task, penalty = task_at(tables(dimension), 1), draw(dimension, seed=5).exp()
    problem = Weighted(draw(6, seed=6).exp(), penalty)
    (x, y), val, s = task.train[:2], task.val, problem.weights.detach()
    H = x.T * s @ x + penalty.diag()
    w = solve(H, x.T @ (s * y[:, 0]))
    q = solve(H, val.x.T @ (val.x @ w - val.y[:, 0]))
    solver = Neumann(300, 1.5 / matrix_norm(H, 2).item()) if isinstance(solver, Neumann) else solver
    found = estimate(Implicit(1, solver), problem, Newton(), task)
    expected = -(x @ w - y[:, 0]) * (x @ q)
    assert_close(found.gradient["problem"]["weights"], expected, rtol=1e-10, atol=1e-12)


def test_without_one_row_its_residual_is_that_of_leaving_one_out():
    task, penalty = task_at(tables(3), 1), draw(3, seed=5).exp()
    (x, y), problem = task.train[:2], Weighted(torch.ones(6, dtype=torch.float64), penalty)
    hat = x @ solve(x.T @ x + penalty.diag(), x.T)
    expected = (hat @ y[:, 0] - y[:, 0]) / (1 - hat.diag())
    for row in range(6):
        outer = {"problem": {"weights": 1 - torch.eye(6, dtype=torch.float64)[row]}, "optimizer": {}}
        w = adapt(problem, Newton(), outer, task, 1)
        assert_close(x[row] @ w - y[row, 0], expected[row], rtol=1e-11, atol=0)


@pytest.mark.parametrize("estimator", [JTg(3), Unrolled(1), Truncated(2, 2)])
def test_penalties_do_not_enter_at_the_zeros_where_ridge_starts(estimator):
    problem, task = ridge(3)
    cold = estimate(estimator, problem, SGD(0.1), task).gradient["problem"]["log_penalty"]
    warm = estimate(estimator, problem, SGD(0.1), task, {"weight": draw(3)}).gradient["problem"]["log_penalty"]
    assert (cold.abs().max() == 0) == (estimator != Truncated(2, 2))
    assert warm.abs().min() > 0


# ---- truncation and the limits of the estimators


@pytest.mark.parametrize("name", ["ThetaPhi", "ANIL", "Ridge, minibatches", "Cleaning", "LowRank, exact"])
@pytest.mark.parametrize("optimizer", [SGD, MetaSGD])
def test_truncation_at_all_steps_is_the_full_unroll(name, optimizer):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    full, kept = (estimate(kind, problem, optimizer(lr), task) for kind in (Unrolled(4), Truncated(4, 4)))
    assert_close(tuple(kept), tuple(full), rtol=1e-14, atol=0)
    fewer = estimate(Truncated(4, 2), problem, optimizer(lr), task)
    assert_close(fewer.loss, full.loss, rtol=0, atol=0)
    assert_close(fewer.inner, full.inner, rtol=0, atol=0)
    assert norm(tree_map(torch.sub, fewer.gradient, full.gradient)) > 1e-6


def test_the_error_of_truncation_stays_below_its_bound():
    steps, (problem, task) = 25, ridge(3)
    _, _, penalty, H = by_hand(problem, task)
    convexity, smoothness = torch.linalg.eigvalsh(H)[[0, -1]]
    lr = 0.9 / smoothness.item()
    outer = outer_variable(problem, SGD(lr), task)
    full = estimate(Unrolled(steps), problem, SGD(lr), task)
    slope = task.val.x.T @ (task.val.x @ full.inner["weight"] - task.val.y[:, 0]) / len(task.val.x)
    path = [adapt(problem, SGD(lr), outer, task, step)["weight"] for step in range(steps)]
    errors = []
    for kept in range(1, steps, 4):
        found = estimate(Truncated(steps, kept), problem, SGD(lr), task)
        errors.append(norm(tree_map(torch.sub, found.gradient, full.gradient)))
        moves = max(matrix_norm((lr * penalty * at).diag(), 2) for at in path[: steps - kept])
        rate = 1 - lr * convexity
        assert errors[-1] <= rate**kept / (lr * convexity) * slope.norm() * moves
        assert errors[-1] <= errors[0] * rate ** (kept - 1)


def test_the_error_of_truncation_in_one_dimension_is_a_geometric_series():
    problem, task = ridge(1)
    w, q, penalty, H = by_hand(problem, task)
    lr, steps = 0.4 / H.item(), 12
    full = estimate(Unrolled(steps), problem, SGD(lr), task, {"weight": w}).gradient["problem"]["log_penalty"]
    for kept in range(1, steps + 1):
        found = estimate(Truncated(steps, kept), problem, SGD(lr), task, {"weight": w}).gradient["problem"]
        # each step is worth lr · (1 − lr H)ᵏ · H of the whole −λwq
        assert_close(full - found["log_penalty"], -penalty * w * q * (0.6**kept - 0.6**steps), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["Ridge", "Logistic", "Cleaning", "ANIL", "LowRank, exact"])
def test_a_neumann_series_of_the_step_size_is_the_unroll_at_the_solution(name):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    lr = 0.5 * lr
    solved = adapt(problem, Newton(), outer_variable(problem, Newton(), task), task, 8)
    series = estimate(Implicit(5, Neumann(5, lr)), problem, SGD(lr), task, solved)
    unroll = estimate(Unrolled(5), problem, SGD(lr), task, solved)
    assert_close(series.inner, solved, rtol=1e-9, atol=1e-9)
    assert_close(series.gradient, unroll.gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["Ridge", "Logistic", "Cleaning", "ANIL", "iMAML in 3-d"])
def test_long_neumann_is_cg_is_dense_is_the_long_unroll(name):
    problem, tasks, lr, _ = PROBLEMS[name]
    task = task_at(tasks, 0)
    solved = adapt(problem, Newton(), outer_variable(problem, Newton(), task), task, 8)
    answers = [
        estimate(Implicit(1, solver), problem, SGD(lr), task, solved).gradient
        for solver in (Dense(), CG(40, 1e-14), Neumann(400, lr), NormalCG(80, 1e-15), Nystrom(40, 1e-6))
    ]
    unroll = estimate(Unrolled(80), problem, SGD(lr), task, solved).gradient
    *exact, damped = answers[1:]
    for found in exact:
        assert_close(found, answers[0], rtol=1e-9, atol=1e-10)
    # by as much as ρ is added
    assert_close(damped, answers[0], rtol=1e-4, atol=1e-5)
    assert_close(unroll, answers[0], rtol=1e-3, atol=1e-4)


# ---- low rank


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    "hypergradient",
    [
        Unrolled(1),
        Unrolled(2, (0.4, 0.6)),
        Truncated(3, 2),
        *(Implicit(1, solver) for solver in (CG(30), Neumann(20, 0.05), Dense())),
    ],
)
def test_the_indirect_term_is_zero_where_the_inner_factor_is_solved_for(missing, rank, hypergradient):
    problem = LowRank(5, 4, rank, exact=True).double()
    problem.u.data, problem.v.data = draw(5, rank, seed=8), draw(4, rank, seed=9)
    task = task_at(matrices(5, 4, missing), 1)
    found = estimate(hypergradient, problem, Newton(), task)
    U, V = problem.u.detach(), found.inner["v"]
    for column in range(4):
        seen = task.observed[:, column]
        best = torch.linalg.lstsq(U[seen], task.values[seen, column]).solution
        assert_close(V[column], best, rtol=1e-11, atol=1e-12)
    error = task.observed * (task.values - U @ V.T)
    assert_close(found.loss, error.square().sum(), rtol=1e-12, atol=0)
    assert_close(found.gradient["problem"]["u"], -2 * error @ V, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("exact", [False, True])
def test_eckart_and_youngs_factors_are_stationary(rank, exact):
    task = task_at(matrices(5, 4), 2)
    left, values, right = torch.linalg.svd(task.values, full_matrices=False)
    problem = LowRank(5, 4, rank, exact=exact).double()
    problem.u.data = left[:, :rank] * values[:rank].sqrt()
    if not exact:
        problem.v.data = right[:rank].T * values[:rank].sqrt()
    found = estimate(Unrolled(1) if exact else Direct(), problem, Newton(), task)
    assert_close(found.loss, values[rank:].square().sum(), rtol=1e-12, atol=0)
    assert norm(found.gradient) < 1e-13
    # any turn of the factors away costs more
    problem.u.data = problem.u.data + 0.01 * draw(5, rank, seed=8)
    assert estimate(Unrolled(1) if exact else Direct(), problem, Newton(), task).loss > found.loss * (1 + 1e-8)


def test_the_shares_of_a_weighted_sum_of_losses_are_the_estimates_themselves():
    problem, tasks, lr, _ = PROBLEMS["ANIL"]
    task = task_at(tasks, 0)
    each = [estimate(Unrolled(step), problem, SGD(lr), task) for step in (1, 2, 3)]
    mixed = estimate(Unrolled(3, (0.2, 0.3, 0.5)), problem, SGD(lr), task)
    shares = (0.2, 0.3, 0.5)
    assert_close(mixed.loss, sum(w * one.loss for w, one in zip(shares, each, strict=True)), rtol=1e-13, atol=0)
    expected = tree_map(lambda *v: sum(w * x for w, x in zip(shares, v, strict=True)), *(e.gradient for e in each))
    assert_close(mixed.gradient, expected, rtol=1e-12, atol=1e-14)
    assert dot(mixed.gradient, mixed.gradient) > 0
