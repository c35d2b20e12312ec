"""Parameters of which each inner step has its own: which row is used where, learned, saved and compiled."""

import warnings

import pytest
import torch
from cases import draw, linear, regression_tasks, task_at
from fits import last, parameters, same, trainer
from ranks import per_step as fitted
from torch import nn
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.hypergradients import Direct, FirstOrder, Recomputed, Truncated, Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot
from metalit.scaled import Scaled
from metalit.tree import leaves, tree_map

TASK, LR = task_at(regression_tasks(2, 2), 0), 0.4


def shifted(steps=3):
    """A linear layer whose bias each step has its own of, the rows unequal."""
    problem = FewShot(linear(2, 2), per_step=["bias"])
    problem.trained_for(steps)
    problem.outer()["bias"].data = draw(steps, 2, seed=5)
    return problem


def normalised(steps=3):
    torch.manual_seed(0)
    problem = FewShot(MLP([2, 4, 2], "Tanh", norm="LayerNorm").double(), per_step=["norm*"])
    problem.trained_for(steps)
    for name in problem.copies.names:
        row = problem.outer()[name]
        row.data = row + 0.3 * draw(*row.shape, seed=6)
    return problem


def by_hand(problem, points, row):
    weight, bias = problem.network.weight, problem.outer()["bias"][row]
    return (points.x @ weight.T + bias - points.y).square().mean()


@pytest.mark.parametrize(("step", "row"), [(0, 0), (1, 1), (2, 2), (3, 2), (9, 2)])
def test_an_inner_step_has_its_own_row_and_past_the_last_that_one(step, row):
    problem = shifted()
    found = problem.inner_loss({}, problem.outer(), TASK, step)
    assert_close(found, by_hand(problem, TASK.support, row), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("steps", "row"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (10, 2)])
def test_what_was_adapted_is_judged_and_predicts_with_the_row_of_its_last_step(steps, row):
    problem, scale = shifted(), torch.tensor(8.0)
    outer, after = problem.outer(), problem.after(steps)
    loss = by_hand(problem, TASK.query, row)
    assert_close(after.outer_loss({}, outer, TASK), loss, rtol=1e-13, atol=0)
    assert_close(after.judge(after.predict({}, outer, TASK.query.x), TASK.query), loss, rtol=1e-13, atol=0)
    assert_close(Scaled(problem, scale).after(steps).outer_loss({}, outer, TASK), 8 * loss, rtol=1e-13, atol=0)
    assert problem.steps_taken == 0


def test_without_such_parameters_a_problem_stays_itself():
    problem = FewShot(linear(2, 1))
    problem.trained_for(3)
    assert problem.after(2) is problem
    assert [name for name, _ in problem.named_parameters()] == ["network.weight", "network.bias"]


def test_rows_begin_as_the_network_does_and_are_neither_adapted_nor_handed_over():
    network = linear(2, 2)
    problem = FewShot(network, per_step="bias")
    problem.trained_for(3)
    assert list(problem.outer()) == ["weight", "bias"]
    assert torch.equal(problem.outer()["bias"], network.bias.expand(3, 2))
    assert problem.adapted == list(problem.init(problem.outer())) == ["weight"]


def test_rows_stay_where_their_number_does_and_the_last_is_repeated():
    problem = shifted()
    rows = problem.outer()["bias"]
    problem.trained_for(3)
    assert problem.outer()["bias"] is rows
    problem.trained_for(5)
    assert torch.equal(problem.outer()["bias"], rows[[0, 1, 2, 2, 2]])
    problem.trained_for(0)
    assert torch.equal(problem.outer()["bias"], rows[:1])


def test_frozen_rows_count_and_do_not_learn():
    problem = shifted()
    expected = problem.inner_loss({}, problem.outer(), TASK, 1)
    problem.network.bias.requires_grad_(False)
    assert list(problem.outer()) == ["weight"]
    assert_close(problem.inner_loss({}, problem.outer(), TASK, 1), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"per_step": ["norm*"]}, "per_step: the pattern 'norm*' matches no parameter; there are ['weight', 'bias']"),
        (
            {"per_step": ["bias"], "reset": ["bias"]},
            "reset: the pattern 'bias' matches no adapted parameter; there are ['weight']",
        ),
        (
            {"per_step": ["bias"], "adapt": ["bias"]},
            "adapt: the pattern 'bias' matches no trainable parameter beside per_step=['bias']; there are ['weight']",
        ),
        (
            {"per_step": ["*"]},
            "adapt: the pattern '*' matches no trainable parameter beside per_step=['weight', 'bias']; there are []",
        ),
    ],
)
def test_patterns_that_cannot_be_are_told(options, told):
    with pytest.raises(InputError) as raised:
        FewShot(nn.Linear(2, 1), **options)
    assert str(raised.value) == told


def test_a_number_of_steps_that_nobody_said_is_asked_for():
    problem = FewShot(nn.Linear(2, 1), per_step=["bias"])
    for ask in (problem.outer, lambda: problem.inner_loss({}, {}, TASK, 0)):
        with pytest.raises(
            InputError, match=r"^per_step=\['bias'\]: each inner step has its own.*trained_for\(steps\)"
        ):
            ask()


# ---- hypergradients


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]], ids=["last", "each"])
@pytest.mark.parametrize("rows", [2, 3], ids=["past the last row", "a row each"])
def test_the_gradient_of_every_row_is_that_of_central_differences(rows, weights):
    problem, inner_optimizer = normalised(rows), SGD(LR)
    outer = tree_map(torch.Tensor.detach, outer_variable(problem, inner_optimizer))

    def loss(outer):
        counted = {3: 1.0} if weights is None else dict(enumerate(weights, 1))
        each = {k: adapt(problem, inner_optimizer, outer, TASK, k) for k in counted}
        return sum(w * problem.after(k).outer_loss(each[k], outer["problem"], TASK) for k, w in counted.items())

    found, again = (
        kind(3, weights)(problem, inner_optimizer, outer, TASK).gradient["problem"] for kind in (Unrolled, Recomputed)
    )
    assert_close(again, found, rtol=1e-12, atol=1e-13)
    for name in ("norm1.weight", "norm1.bias"):
        assert found[name].shape == (rows, 4)
        assert found[name].abs().amax(1).min() > 1e-4
    for name, slope in found.items():
        for index in range(slope.numel()):
            step = torch.zeros_like(slope).view(-1)
            step[index] = 1e-5
            above, below = (
                loss(
                    {
                        **outer,
                        "problem": {**outer["problem"], name: outer["problem"][name] + sign * step.view_as(slope)},
                    }
                )
                for sign in (1, -1)
            )
            assert_close(slope.view(-1)[index], (above - below) / 2e-5, rtol=0, atol=1e-8)


def test_steps_that_are_dropped_or_not_taken_teach_their_rows_nothing():
    problem, inner_optimizer = shifted(), SGD(LR)
    outer = outer_variable(problem, inner_optimizer)
    cut, direct = (
        kind(problem, inner_optimizer, outer, TASK).gradient["problem"]["bias"].abs().amax(1)
        for kind in (Truncated(3, 1), Direct())
    )
    assert cut[:2].max() == 0 < cut[2]
    assert direct[1:].max() == 0 < direct[0]


# ---- learners


def learner(steps=2, **options):
    return MetaLearner(fitted(), SGD(0.05), Unrolled(steps, **options.pop("counted", {})), eval_steps=4, **options)


def sine():
    return TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(4, 5, 5), Episodes(4, 5, 5))


def fit(root, module, **options):
    trainer(root, 4, precision="64-true", log_every_n_steps=2, **options).fit(module, sine())
    return module


def test_a_learner_makes_a_row_for_each_step_and_trains_saves_and_uses_them(tmp_path):
    module, data = fit(tmp_path, learner()), sine()
    rows = module.problem.outer()["norm1.bias"]
    assert rows.shape == (2, 8)
    assert not torch.equal(rows[0], rows[1])
    assert "context" not in module.problem.outer()
    saved = torch.load(last(tmp_path), weights_only=True)["state_dict"]
    assert torch.equal(saved["problem.copies.rows.norm1.bias"], rows)

    tasks = module.cast(data.draw("test", torch.arange(4)))
    module.evaluation.start()
    outer = module.constants()
    trainer(tmp_path / "test", precision="64-true").test(module, data, verbose=False)
    for index, losses in enumerate(module.task_losses):
        task = task_at(tasks, index)
        for steps, loss in enumerate(losses):
            inner = adapt(module.problem, SGD(0.05), outer, task, steps)
            at = module.problem.after(steps)
            assert_close(loss, at.outer_loss(inner, outer["problem"], task), rtol=1e-12, atol=0, check_dtype=False)
            adapted = module.adapt(task.support.x, task.support.y, steps)
            assert_close(adapted(task.query.x), at.predict(inner, outer["problem"], task.query.x), rtol=1e-12, atol=0)

    with pytest.raises(InputError, match=r"^ckpt_path: the checkpoint is of another network: 'problem\.copies\.rows\."):
        trainer(tmp_path / "more", 8, precision="64-true").fit(learner(3), sine(), ckpt_path=last(tmp_path))


def test_a_compiled_step_is_the_plain_one(tmp_path):
    counted = {"weights": [0.3, 0.7]}
    plain, compiled = (
        fit(tmp_path / name, learner(counted=counted, **options))
        for name, options in (("plain", {}), ("compiled", {"compile": True, "fused_steps": 2}))
    )
    assert compiled.is_compiled
    assert not same(plain, learner(counted=counted).double())
    for (name, value), (_, other) in zip(leaves(parameters(plain)), leaves(parameters(compiled)), strict=True):
        assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    ("hypergradient", "still"), [(FirstOrder(3), "0, 1"), (Truncated(3, kept=2), "0"), (Unrolled(3), "")]
)
def test_rows_that_would_not_move_are_told(hypergradient, still, tmp_path):
    learner = MetaLearner(FewShot(MLP([1, 6, 1], norm="LayerNorm"), per_step=["norm*"]), SGD(0.05), hypergradient)
    data = TaskDataModule(Sine(), *[Episodes(2, 4, 5)] * 3)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer(tmp_path, 1, limit_val_batches=0, logger=False, callbacks=None).fit(learner, data)
    told = [str(each.message) for each in heard if "they will not move" in str(each.message)]
    assert [text.split("to the rows ")[1].split(" of norm")[0] for text in told] == ([still] if still else [])
