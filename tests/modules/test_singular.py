"""A matrix that is inverted and has no inverse is told as such, with the damping that helps."""

import pytest
import torch
from fits import bare
from torch import nn

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import Direct, Implicit, Unrolled
from metalit.inner import SGD, Newton
from metalit.linsolve import CG, Dense
from metalit.modules import BilevelLearner, MetaLearner
from metalit.problem import Problem
from metalit.problems import BayesianHead


class Valley(Problem):
    """½ Σ (φ cᵢ xᵢᵀθ − 1)² in two directions, or in one alone, judged by θ's distance from 1."""

    def __init__(self, second, start=1.0):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor(start))
        self.register_buffer("x", torch.tensor([[1.0, 1.0], [1.0, second]]))

    def init(self, outer, task):
        return {"w": torch.zeros(2)}

    def inner_loss(self, inner, outer, task, step):
        return 0.5 * (outer["phi"] * self.x @ inner["w"] - 1).square().sum()

    def outer_loss(self, inner, outer, task):
        return (inner["w"] - 1).square().sum() + outer["phi"]


def learner(problem, inner, hypergradient, lr=0.01):
    return BilevelLearner(problem, inner, hypergradient, optimizer=lambda groups: torch.optim.SGD(groups, lr))


@pytest.mark.parametrize("second", [1.0, 1.0 + 1e-7])
@pytest.mark.parametrize("steps", [1, 3])
def test_newton_refuses_a_singular_hessian_and_takes_it_damped(second, steps, tmp_path):
    with pytest.raises(InputError) as raised:
        bare(tmp_path).fit(learner(Valley(second), Newton(), Unrolled(steps)))
    assert str(raised.value) == (
        "inner_optimizer Newton: the Hessian of the inner loss is singular, of rank 1 with 2 entries of the inner "
        "variable and damping=0.0; give it a positive damping=, such as 1e-3, or regularise the inner loss"
    )
    bare(tmp_path).fit(learner(Valley(second), Newton(1e-2), Unrolled(steps)))
    bare(tmp_path).fit(learner(Valley(-1.0), Newton(), Unrolled(steps)))
    bare(tmp_path).fit(learner(Valley(second), Newton(), Direct()))  # never steps


def test_a_dense_solve_of_a_singular_hessian_is_told_before_training(tmp_path):
    told = r"^model: .* not finite from the start\. The Hessian .* raise hypergradient\.damping"
    with pytest.raises(InputError, match=told):
        bare(tmp_path).fit(learner(Valley(1.0), SGD(0.2), Implicit(200, Dense())))
    bare(tmp_path).fit(learner(Valley(1.0), SGD(0.2), Implicit(200, Dense(), damping=1e-2)))
    bare(tmp_path).fit(learner(Valley(1.0), SGD(0.2), Implicit(200, CG())))


def test_what_the_inner_loss_does_not_see_needs_damping(tmp_path):
    """The posterior's spread is adapted in init, and no inner loss has it."""

    def fit(solver, damping):
        torch.manual_seed(0)
        module = MetaLearner(BayesianHead(1, 1), SGD(0.1), Implicit(2, solver, damping=damping))
        bare(tmp_path, 2).fit(module, TaskDataModule(Sine(), *[Episodes(4, 5, 6)] * 3))

    for solver in (CG(), Dense()):
        with pytest.raises(InputError, match=r"^model: .* not finite from the start\..* raise hypergradient\.damping"):
            fit(solver, 0.0)
        fit(solver, 1e-2)


@pytest.mark.parametrize(
    ("inner", "hypergradient", "kind", "told"),
    [
        (Newton(), Unrolled(1), InputError, r"^problem: a matrix that is inverted became singular.*positive damping="),
        (
            SGD(0.01),
            Implicit(200, Dense()),
            NonFiniteError,
            r"be singular: raise hypergradient\.damping.* Otherwise",
        ),
        (SGD(0.01), Unrolled(200), None, ""),
    ],
    ids=["Newton", "Dense", "neither"],
)
def test_a_hessian_that_becomes_singular_is_named(inner, hypergradient, kind, told, tmp_path):
    """The first outer step takes φ to 0, to the last digit."""
    problem = Valley(-1.0, start=0.5)

    class Jump(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            with torch.no_grad():
                problem.phi.zero_()

    module = BilevelLearner(problem, inner, hypergradient, optimizer=lambda groups: Jump(groups, 0.1))
    if kind is None:
        bare(tmp_path).fit(module)
        return
    with pytest.raises(kind, match=told):
        bare(tmp_path).fit(module)
