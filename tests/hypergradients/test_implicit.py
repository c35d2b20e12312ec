import pytest
import torch
from cases import PROBLEMS, Bowl, BowlTask, bowls, draw, task_at
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.hypergradients import Direct, Implicit, JTg, Unrolled, over_tasks
from metalit.inner import SGD, Newton
from metalit.linsolve import CG, Dense, Neumann, NormalCG, Nystrom

EXACT = Newton()
FINE = {"inner_grad_ratio": 0.01, "inner_grad_norm": 0.2, "indefinite": 0.0, "solver_residual": 0.1}


def estimate(hypergradient, problem, task, optimizer=EXACT):
    return hypergradient(problem, optimizer, outer_variable(problem, optimizer, task), task)


def test_nothing_is_said_at_the_thresholds():
    assert Implicit().warnings(FINE) == {}
    assert Implicit(stationary=0.5).warnings(FINE | {"inner_grad_ratio": 0.5}) == {}
    assert Direct().warnings({}) == Unrolled().warnings({}) == JTg().warnings({}) == {}


@pytest.mark.parametrize(
    ("estimator", "metrics", "kind", "told"),
    [
        (
            Implicit(),
            {"inner_grad_ratio": 0.010001, "inner_grad_norm": 0.0456789},
            "not stationary",
            "Implicit needs a stationary inner point, but the norm of the inner gradient is 0.0457, 1 % of that at "
            "init; take more inner steps (hypergradient.steps), a larger inner lr or a warm start, or use Unrolled",
        ),
        (
            Implicit(stationary=0.2),
            {"inner_grad_ratio": 0.2345, "inner_grad_norm": 12.0},
            "not stationary",
            "Implicit needs a stationary inner point, but the norm of the inner gradient is 12, 23.4 % of that at "
            "init; take more inner steps (hypergradient.steps), a larger inner lr or a warm start, or use Unrolled",
        ),
        (
            Implicit(),
            {"inner_grad_ratio": float("nan"), "inner_grad_norm": float("nan")},
            "not stationary",
            "Implicit needs a stationary inner point, but the norm of the inner gradient is nan, nan % of that at "
            "init; take more inner steps (hypergradient.steps), a larger inner lr or a warm start, or use Unrolled",
        ),
        (
            Implicit(),
            {"indefinite": 0.25, "solver_residual": 0.9},
            "indefinite",
            "Implicit: the Hessian of the inner loss is not positive definite at the inner point (25 % of the tasks); "
            "raise hypergradient.damping, regularise the inner loss, or use Unrolled",
        ),
        (
            Implicit(solver=Neumann()),
            {"solver_residual": 0.12345},
            "not solved",
            "Implicit: Neumann left 12.3 % of its right-hand side; give it more iterations (Neumann: a scale below "
            "2/‖H‖), or raise hypergradient.damping",
        ),
        (
            Implicit(solver=Nystrom()),
            {"solver_residual": 0.12345},
            "not solved",
            "Implicit: Nystrom left 12.3 % of its right-hand side; give it a higher rank, or a smaller rho",
        ),
        (
            Implicit(),
            {"solver_residual": float("nan")},
            "not solved",
            "Implicit: CG left nan % of its right-hand side; give it more iterations (Neumann: a scale below 2/‖H‖), "
            "or raise hypergradient.damping",
        ),
    ],
)
def test_what_tells_against_the_estimate_is_said_with_its_numbers_and_the_way_out(estimator, metrics, kind, told):
    assert estimator.warnings(FINE | metrics) == {kind: told}


def test_several_warnings_are_all_said():
    metrics = {"inner_grad_ratio": 0.5, "inner_grad_norm": 1.0, "indefinite": 1.0, "solver_residual": 1.0}
    assert list(Implicit().warnings(metrics)) == ["not stationary", "indefinite"]
    assert list(Implicit().warnings(metrics | {"indefinite": 0.0})) == ["not stationary", "not solved"]


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_the_residual_of_a_neumann_series_is_its_next_power(damping):
    problem, task = Bowl(draw(3, seed=4), 0.7), task_at(bowls(3), 0)
    found = estimate(Implicit(1, Neumann(4, 0.3), damping), problem, task)
    K = task.A + (0.7 + damping) * torch.eye(3, dtype=torch.float64)
    b = task.A @ (found.inner["theta"] - task.c)
    left = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 0.3 * K, 4) @ b
    assert_close(found.metrics["solver_residual"], left.norm() / b.norm(), rtol=1e-11, atol=0)
    assert found.metrics["indefinite"] == 0


@pytest.mark.parametrize("solver", [CG(30), Dense()])
def test_a_solver_that_is_exact_leaves_nothing(solver):
    found = estimate(Implicit(1, solver, 0.2), Bowl(draw(3, seed=4), 0.7), task_at(bowls(3), 0))
    assert found.metrics["solver_residual"] < 1e-9
    assert found.metrics["indefinite"] == 0


@pytest.mark.parametrize("solver", [CG(30), Dense()])
@pytest.mark.parametrize(("damping", "indefinite"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_hessian_that_is_not_positive_definite_is_flagged_unless_damped(solver, damping, indefinite):
    A = torch.tensor([[1.0, 0.0], [0.0, -1.2]], dtype=torch.float64)
    task = BowlTask(A, torch.tensor([0.3, 0.4], dtype=torch.float64))
    found = estimate(Implicit(1, solver, damping), Bowl(draw(2, seed=4), 0.5), task)
    assert found.metrics["indefinite"] == indefinite
    assert found.gradient["problem"]["theta"].isfinite().all()


def test_flags_and_residuals_are_means_over_tasks():
    A = torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.5, 2.0], [3.0, -1.0]], dtype=torch.float64))
    tasks, problem = BowlTask(A, draw(4, 2, seed=3)), Bowl(draw(2, seed=4), 0.5)
    outer = outer_variable(problem, Newton(), task_at(tasks, 0))
    found = over_tasks(Implicit(1, Dense()), problem, Newton(), outer, tasks)
    assert found.metrics["indefinite"] == 0.5
    one_step = over_tasks(Implicit(1, CG(1)), problem, Newton(), outer, tasks)
    each = [Implicit(1, CG(1))(problem, Newton(), outer, task_at(tasks, index)).metrics for index in range(4)]
    for name, value in one_step.metrics.items():
        assert_close(value, torch.stack([metrics[name] for metrics in each]).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [CG(30), NormalCG(), Neumann(), Dense()])
def test_where_the_outer_loss_has_no_slope_the_direct_term_is_left_and_nothing_complains(solver):
    # at θ = 0 the outer loss (θᵀθ)(φᵀφ) has none
    found = estimate(Implicit(1, solver), PROBLEMS["ThetaPhi"].problem, torch.tensor(0))
    assert found.inner.abs().max() == 0
    assert found.gradient["problem"]["phi"].abs().max() == 0
    assert found.metrics == {"solver_residual": 0, "indefinite": 0}


def test_the_inner_loss_after_the_last_step_gives_hessian_and_jacobian():
    problem, tasks, lr, hand = PROBLEMS["Ridge, minibatches"]
    task = task_at(tasks, 0)
    for steps in (1, 2):
        found = estimate(Implicit(steps, Dense()), problem, task, SGD(lr))
        by_hand, phi = hand(problem, task), problem.log_penalty.detach()
        theta = torch.cat([found.inner["weight"], found.inner["bias"].reshape(1)])
        q = torch.linalg.solve(by_hand.H(theta, phi, steps), by_hand.outer(theta, phi)[1])
        expected = -by_hand.J(theta, phi, steps).T @ q
        assert_close(found.gradient["problem"]["log_penalty"], expected, rtol=1e-11, atol=1e-13)
