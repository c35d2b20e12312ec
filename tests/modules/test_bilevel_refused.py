"""What a bilevel learner cannot train is refused in one line, before its first step, or stops it where it is found."""

from functools import partial

import pytest
import torch
from bilevel_learners import Centre, Mean, Own, Renamed, cleaning, offset, ridge, sgd, table
from fits import bare, blobs, last, parameters, regression, same, trainer

from metalit.callbacks import LastCheckpoint, ReportWriter
from metalit.data import (
    BatchDataModule,
    MatrixDataModule,
    SplitsDataModule,
)
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import Direct, FirstOrder, Implicit, Unrolled
from metalit.inner import SGD, MetaSGD, Newton
from metalit.modules import BilevelLearner
from metalit.problems import Logistic, LowRank, Ridge


def test_learned_step_sizes_need_a_shape_before_there_is_a_task():
    with pytest.raises(InputError, match=r"MetaSGD.*Offset\.init.*task"):
        offset(inner=MetaSGD(0.1))


def test_without_an_inner_variable_there_is_no_warm_start(tmp_path):
    module = BilevelLearner(LowRank(2, 5), SGD(), Direct(), warm_start=True)
    with pytest.raises(InputError, match=r"model.warm_start: LowRank has no inner variable"):
        bare(tmp_path).fit(module, MatrixDataModule())


@pytest.mark.parametrize(
    ("problem", "data", "told"),
    [
        (lambda: Ridge(3), lambda: BatchDataModule(regression()), "Ridge is posed on Splits, not on Points"),
        (lambda: LowRank(2, 5), lambda: SplitsDataModule(regression()), "LowRank is posed on Matrix, not on Splits"),
    ],
)
def test_data_of_another_kind_is_refused(problem, data, told, tmp_path):
    with pytest.raises(InputError, match=told):
        bare(tmp_path).fit(BilevelLearner(problem(), SGD(), Unrolled(1)), data())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((Ridge, SGD(), Unrolled(1)), "problem=.*Ridge.* derives from Problem"),
        ((Renamed(), SGD, Unrolled(1)), "inner_optimizer=.* derives from InnerOptimizer"),
        ((Renamed(), SGD(), "Unrolled"), "hypergradient='Unrolled' .* derives from Hypergradient"),
    ],
)
def test_arguments_of_another_kind_are_told(arguments, told):
    with pytest.raises(InputError, match=told):
        BilevelLearner(*arguments)


class Empty(Renamed):
    def __init__(self):
        super().__init__()
        self.phi.requires_grad_(False)


def test_a_learner_without_a_parameter_is_told(tmp_path):
    with pytest.raises(InputError, match="no trainable parameter to learn"):
        bare(tmp_path).fit(BilevelLearner(Empty(), SGD(0.1), Unrolled(1)))


class Spoiled(Centre):
    """One method at a time is replaced."""

    def __init__(self, **methods):
        super().__init__()
        for name, method in methods.items():
            setattr(self, name, method)


REFUSED = {
    "nothing to learn": (
        lambda: BilevelLearner(Spoiled(inner_loss=lambda inner, outer, task, step: inner.sum()), SGD(0.1), Unrolled(1)),
        "neither loss depends on the outer variable",
    ),
    "a vector outside": (
        lambda: BilevelLearner(Spoiled(outer_loss=lambda inner, outer, task: inner), SGD(0.1), Unrolled(1)),
        r"Spoiled\.outer_loss returned shape \(3,\)",
    ),
    "a vector inside": (
        lambda: BilevelLearner(Spoiled(inner_loss=lambda inner, outer, task, step: inner), SGD(0.1), Unrolled(1)),
        r"Spoiled\.inner_loss returned shape \(3,\)",
    ),
    "no loss": (
        lambda: BilevelLearner(Spoiled(scores=lambda *_: {"f1": torch.ones(())}), SGD(), Unrolled(1)),
        "'loss' must be among them",
    ),
    "first order": (lambda: BilevelLearner(Centre(), SGD(0.1), FirstOrder(1)), "its gradient would be zero"),
    "Newton and first order": (lambda: offset(Newton(), FirstOrder(1)), "Newton differentiates"),
    "MetaSGD and implicit": (lambda: BilevelLearner(Mean(), MetaSGD(0.1), Implicit(1)), "would never learn"),
}  # fmt: skip


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name, sanity, tmp_path):
    make, told = REFUSED[name]
    module = make()
    data = Own() if isinstance(module.problem, Centre) else None
    run = bare(tmp_path, num_sanity_val_steps=sanity)
    before = parameters(module)
    with pytest.raises(InputError, match=told):
        run.fit(module, data)
    assert sanity == 0 or run.global_step == 0
    assert name == "no loss" or (run.global_step == 0 and same(module.outer(), before))


def test_a_learner_that_was_judged_is_tried_anew(tmp_path):
    module = BilevelLearner(Centre(), SGD(0.1), FirstOrder(1))
    bare(tmp_path).validate(module, Own(), verbose=False)
    with pytest.raises(InputError, match="its gradient would be zero"):
        bare(tmp_path).fit(module, Own())


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_warm_start_leaves_nothing_to_learn_where_init_alone_knows_the_outer_variable(sanity, tmp_path):
    class Maml(Centre):
        def init(self, outer, task):
            return outer["shift"] + 0.0 * task.c

        def inner_loss(self, inner, outer, task, step):
            return 0.5 * (inner - task.c).square().sum()

    run = bare(tmp_path, num_sanity_val_steps=sanity)
    with pytest.raises(InputError, match="with a warm start, its init does not count"):
        run.fit(BilevelLearner(Maml(), SGD(0.1), Unrolled(1), warm_start=True), Own())
    assert run.global_step == 0
    bare(tmp_path).fit(BilevelLearner(Maml(), SGD(0.1), Unrolled(1)), Own())


WRONG_DATA = {
    "features": (lambda: ridge(features=4), table, "features=4, but the data has 3"),
    "rows": (lambda: cleaning(61), partial(SplitsDataModule, blobs()), "examples=61, but the data has 60"),
    "batch": (lambda: ridge(batch=100), table, "batch=100 is more than the 30 rows"),
    "classes": (lambda: cleaning(60, classes=2), partial(SplitsDataModule, blobs()), "at least 3 classes"),
    "kind": (lambda: BilevelLearner(Logistic(3), SGD(), Unrolled(1)), table, "must be the classes 0 and 1"),
    "matrix": (lambda: BilevelLearner(LowRank(3, 5), SGD(), Direct()), MatrixDataModule, "rows=3, but the data has 2"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_of_another_size_is_refused_before_training(name, tmp_path):
    make, data, told = WRONG_DATA[name]
    run = bare(tmp_path)
    with pytest.raises(InputError, match=told):
        run.fit(make(), data())
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [({"draws": 0}, "draws=0"), ({"eval_steps": -1}, "eval_steps=-1"), ({"clip_norm": 0.0}, "clip_norm=0.0")],
)
def test_bad_settings(options, told):
    with pytest.raises(InputError, match=told):
        offset(**options)


def test_keys_need_a_last_step(tmp_path):
    with pytest.raises(InputError, match=r"trainer\.max_steps=-1"):
        bare(tmp_path, steps=-1).fit(offset())


def test_what_is_not_finite_stops_with_its_step_and_the_last_good_checkpoint(tmp_path):
    class Late(Centre):
        def outer_loss(self, inner, outer, task):
            return super().outer_loss(inner, outer, task) / (outer["shift"].sum() > 2.75)

    # each step takes 0.1 from a sum of 3, so that the loss of the fourth is infinite
    module = BilevelLearner(Late(), SGD(1.0), Unrolled(1), optimizer=Even)
    callbacks = [LastCheckpoint(seconds=0.0)]
    run = trainer(tmp_path, steps=8, log_every_n_steps=100, val_check_interval=1.0, callbacks=callbacks)
    with pytest.raises(NonFiniteError, match=r"at outer step 4\. .*last\.ckpt"):
        run.fit(module, Own())
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3


class Even(torch.optim.Optimizer):
    """Takes 0.1 from the sum of a parameter, whatever the gradient."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            for value in group["params"]:
                value.data.sub_(group["lr"] / value.numel())


def test_an_outer_variable_that_is_not_finite_is_neither_judged_nor_drawn(tmp_path):
    module = BilevelLearner(Centre(), SGD(2.0), Unrolled(1), optimizer=sgd(3e38))
    run = trainer(tmp_path, steps=2, val_check_interval=1, callbacks=[ReportWriter(), LastCheckpoint()])
    with pytest.raises(NonFiniteError, match=r"at outer step 1\. No checkpoint"):
        run.fit(module, Own())
    assert not list(tmp_path.rglob("*.ckpt"))
    # nor does a fit without validations or checkpoints end well
    with pytest.raises(NonFiniteError, match="at outer step 1"):
        bare(tmp_path, steps=1, limit_val_batches=0, log_every_n_steps=100).fit(module, Own())
    # and none is saved between validations
    module.problem.shift.data.fill_(1.0)
    run = trainer(tmp_path, limit_val_batches=0, log_every_n_steps=100, callbacks=[LastCheckpoint(seconds=0.0)])
    with pytest.raises(NonFiniteError, match="at outer step 1"):
        run.fit(module, Own())
    assert not list(tmp_path.rglob("*.ckpt"))
    # what was found is forgotten in a new fit
    module.problem.shift.data.fill_(1.0)
    module.make_optimizer = sgd(0.1)
    bare(tmp_path).fit(module, Own())
