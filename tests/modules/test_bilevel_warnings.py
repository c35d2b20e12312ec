"""What the bilevel learner logs of its inner problem, and what it warns of, once."""

import warnings
from functools import partial

import pytest
import torch
from bilevel_learners import Centre, Curved, Own, constants, ridge, sgd, table
from cases import task_at
from fits import bare, regression, scalars, told_once, trainer
from lightning.pytorch import Callback
from torch.func import grad

from metalit.data import (
    SplitsDataModule,
)
from metalit.hypergradients import Implicit, JTg, Unrolled, over_tasks
from metalit.inner import SGD, Newton
from metalit.linsolve import CG, Neumann
from metalit.modules import BilevelLearner
from metalit.problems import Ridge
from metalit.tree import norm


def test_logs_what_the_inner_level_did_when_due(tmp_path):
    data = table(draws=2)
    module = ridge(SGD(0.1), Implicit(4, CG(2)), batch=10, draws=2, warm_start=True, optimizer=sgd(0.3)).double()
    states = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            states[trainer.global_step] = [constants(module), module.inner]

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            states[trainer.global_step - 1].append(module.inner)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, log_every_n_steps=2, precision="64-true", callbacks=[Watch()]).fit(module, data)
    logged = scalars(tmp_path)
    problem, names = module.problem, ("inner_grad_norm", "inner_grad_ratio", "inner_norm", "outer_norm", "grad_norm")
    for name in (*names, "solver_residual", "loss", "indefinite", "lr"):
        assert [step for step, _ in logged[f"train/{name}"]] == [2, 4], name
    for position, step in enumerate((1, 3)):
        outer, start, inner = states[step]
        tasks = data.draw("train", torch.arange(2 * step, 2 * step + 2))
        estimate = over_tasks(module.hypergradient, problem, module.inner_optimizer, outer, tasks, start)
        slopes = []
        for at in (inner, None):
            for index in range(2):
                task = task_at(tasks, index)
                point = problem.init(outer["problem"], task) if at is None else task_at(at, index)
                loss = partial(problem.inner_loss, outer=outer["problem"], task=task, step=4)
                slopes.append(float(norm(grad(loss)(point))))
        expected = {
            "loss": estimate.loss,
            "grad_norm": norm(estimate.gradient),
            "outer_norm": norm(outer),
            "inner_norm": sum(norm(task_at(inner, index)) for index in range(2)) / 2,
            "inner_grad_norm": sum(slopes[:2]) / 2,
            "inner_grad_ratio": (slopes[0] / slopes[2] + slopes[1] / slopes[3]) / 2,
            "solver_residual": estimate.metrics["solver_residual"],
            "indefinite": 0.0,
            "lr": 0.3,
        }
        for name, value in expected.items():
            assert logged[f"train/{name}"][position][1] == pytest.approx(float(value), rel=1e-5), name


def test_warns_once_of_an_inner_problem_that_is_not_solved(tmp_path):
    module = BilevelLearner(Curved([1.0, 1.0]), SGD(0.1), Implicit(2), optimizer=sgd(0.01))
    found = told_once(lambda: bare(tmp_path, log_every_n_steps=2).fit(module), "stationary inner point")
    # (1 − 0.1)² of the gradient is left
    assert found.startswith("outer step 2: ")
    assert "81 % of that at init" in found
    assert "inner gradient is 1.15" in found
    # a new fit tells anew
    assert told_once(lambda: bare(tmp_path, 6).fit(module), "stationary inner point").startswith("outer step ")


def test_warns_once_of_an_indefinite_hessian(tmp_path):
    module = BilevelLearner(Curved([1.0, -1.0]), Newton(), Implicit(1, CG(5)), optimizer=sgd(0.01))
    found = told_once(lambda: bare(tmp_path, log_every_n_steps=2).fit(module), "positive definite")
    assert found.startswith("outer step 2: ")
    assert "(100 % of the tasks)" in found


def test_warns_once_of_a_system_that_is_not_solved(tmp_path):
    # one term of a Neumann series leaves 1 − 0.1 of the right-hand side
    module = BilevelLearner(Curved([1.0, 1.0]), Newton(), Implicit(1, Neumann(1, 0.1)), optimizer=sgd(0.01))
    found = told_once(lambda: bare(tmp_path, log_every_n_steps=3).fit(module), "right-hand side")
    assert found.startswith("outer step 3: ")
    assert "Neumann left 90 %" in found


def test_warns_once_of_a_gradient_that_is_exactly_zero(tmp_path):
    # the penalty of weights that are 0 is 0, whatever it is
    data = SplitsDataModule(regression())
    module = BilevelLearner(Ridge(3), SGD(0.1), JTg())
    found = told_once(lambda: bare(tmp_path, log_every_n_steps=2).fit(module, data), "exactly 0")
    assert found.startswith("outer step 2: ")
    assert "set model.warm_start" in found
    assert torch.equal(module.problem.log_penalty.detach(), torch.zeros(3))


def test_is_silent_about_what_is_solved(tmp_path):
    module = BilevelLearner(Curved([1.0, 2.0]), Newton(), Implicit(1, CG(2)), optimizer=sgd(0.01))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="outer step")
        bare(tmp_path).fit(module)


def test_an_inner_problem_that_is_solved_at_init_has_no_gradient_left(tmp_path):
    class Solved(Centre):
        def init(self, outer, task):
            return task.c + outer["shift"]

        def inner_loss(self, inner, outer, task, step):
            return 0.5 * (inner - (task.c + outer["shift"])).square().sum()

    trainer(tmp_path).fit(BilevelLearner(Solved(), SGD(0.5), Unrolled(1)), Own())
    assert [value for _, value in scalars(tmp_path)["train/inner_grad_ratio"]] == [0.0] * 4
