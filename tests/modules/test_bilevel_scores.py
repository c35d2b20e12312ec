"""How the bilevel learner is judged: its scores are those of the inner loop, cold and from a warm start."""

import pytest
import torch
from bilevel_learners import Centre, Own, Renamed, constants, ridge, table
from cases import task_at
from fits import bare, last, same, scalars, trainer
from torch.utils.data import DataLoader, IterableDataset

from metalit.adapt import adapt
from metalit.callbacks import LastCheckpoint, ReportWriter
from metalit.errors import InputError
from metalit.evaluation.scores import as_numbers
from metalit.hypergradients import Implicit, Unrolled, over_tasks
from metalit.inner import SGD
from metalit.modules import BilevelLearner
from metalit.problems import Ridge


def test_scores_are_means_over_tasks_and_batches(tmp_path, capsys):
    module, data = BilevelLearner(Centre(), SGD(0.5), Unrolled(2), eval_steps=3), Own()
    run = trainer(tmp_path, callbacks=[ReportWriter()])
    run.fit(module, data)
    tasks = [task_at(batch, index) for batch in data.val_dataloader() for index in range(2)]
    answers = [adapt(module.problem, module.inner_optimizer, constants(module), task, 3) for task in tasks]
    expected = sum(float(0.5 * inner.square().sum()) for inner in answers) / 4
    # at the end of the fit, and in its last validation
    assert module.scores["learned"] == pytest.approx({"loss": expected, "is_val": 1.0})
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected)
    logged = scalars(tmp_path)
    assert logged["val/loss"][-1][1] == pytest.approx(expected)
    assert 0 <= logged["train/positive"][0][1] <= 1
    run.validate(module, data, verbose=False)
    assert module.scores["learned"]["loss"] == pytest.approx(expected)


class Lengthless(Own):
    """Batches that do not tell how many there are."""

    def val_dataloader(self):
        class Each(IterableDataset):
            def __iter__(each):
                return iter(super(Lengthless, self).val_dataloader())

        return DataLoader(Each(), batch_size=None)


@pytest.mark.parametrize(("data", "limit"), [(Own, 1), (Lengthless, 1.0)], ids=["limited", "of no length"])
def test_the_last_table_is_of_as_many_batches_as_a_validation(data, limit, tmp_path):
    module = BilevelLearner(Centre(), SGD(0.5), Unrolled(2))
    run = trainer(tmp_path, limit_val_batches=limit, callbacks=[ReportWriter()])
    run.fit(module, data())
    assert module.scores["learned"]["loss"] == pytest.approx(float(run.callback_metrics["val/loss"]), rel=1e-6)


def test_a_warm_start_of_fewer_tasks_than_are_judged_is_refused(tmp_path):
    module = BilevelLearner(Centre(), SGD(0.5), Implicit(2), warm_start=True)
    with pytest.raises(InputError, match=r"model\.eval_steps"):
        bare(tmp_path).fit(module, Own(tasks=3))
    module = BilevelLearner(Centre(), SGD(0.5), Implicit(2), warm_start=True, eval_steps=2)
    bare(tmp_path).fit(module, Own(tasks=3))


class Deciding(Renamed):
    def outer_loss(self, theta, phi, draw):
        return theta.sum() if draw > 0 else -theta.sum()


class Listing(Renamed):
    def scores(self, theta, phi, draw, split):
        return {"loss": self.outer_loss(theta, phi, draw), "each": theta}


def test_a_loss_that_decides_by_a_value_is_evaluated_draw_by_draw(tmp_path):
    module = BilevelLearner(Deciding(), SGD(0.1), Unrolled(1), draws=3)
    with pytest.warns(UserWarning, match=r"^tasks are evaluated one after the other.*data-dependent control flow"):
        bare(tmp_path).fit(module)
    draws = module.train_dataloader().draw(torch.arange(3))
    tasks, outer = draws, {level: dict(tree) for level, tree in module.constants().items()}
    each = [Unrolled(1)(module.problem, SGD(0.1), outer, key).loss for key in tasks]
    torch.testing.assert_close(over_tasks(Unrolled(1), module.problem, SGD(0.1), outer, tasks).loss, sum(each) / 3)


def test_a_score_that_is_no_scalar_is_told(tmp_path):
    with pytest.raises(InputError, match=r"Listing.scores: 'each' has shape \(2,\)"):
        bare(tmp_path).fit(BilevelLearner(Listing(), SGD(0.1), Unrolled(1)))
    with pytest.raises(InputError, match=r"Listing.scores: 'each' has shape \(0,\)"):
        as_numbers({"loss": 1.0, "each": torch.zeros(0)}, "Listing.scores")


def direct(module, data, split, steps, start=None, own=None):
    """The scores by hand."""
    outer = constants(module)
    outer["problem"] |= own or {}
    task = task_at(data.draw(split, torch.arange(1)), 0)
    inner = adapt(module.problem, module.inner_optimizer, outer, task, steps, start)
    scores = module.problem.scores(inner, outer["problem"], task, split)
    return {name: float(value) for name, value in scores.items()}


@pytest.mark.parametrize("eval_steps", [None, 0, 7])
def test_scores_are_those_of_the_inner_loop(eval_steps, tmp_path):
    data = table(noise_columns=2)
    module = ridge(SGD(0.1), Unrolled(3), features=5, eval_steps=eval_steps, draws=2).double()
    run = bare(tmp_path, precision="64-true", inference_mode=True)
    run.fit(module, data)
    steps = 3 if eval_steps is None else eval_steps
    for split, judge in (("val", run.validate), ("test", run.test)):
        judge(module, data, verbose=False)
        assert module.scores["learned"] == pytest.approx(direct(module, data, split, steps), rel=1e-12)
        assert {"loss", "r2", "log_penalty_noise"} <= module.scores["learned"].keys()
        assert float(run.callback_metrics[f"{split}/loss"]) == pytest.approx(module.scores["learned"]["loss"], rel=1e-6)
        names = [f"{value:.3g} for all" for value in torch.tensor([-6.0, -4.0, -2.0, 0.0]).exp().tolist()]
        assert list(module.scores) == ["learned", *names]
        for name, value in zip(names, (-6.0, -4.0, -2.0, 0.0), strict=True):
            own = {"log_penalty": torch.full((5,), value).double()}
            assert module.scores[name] == pytest.approx(direct(module, data, split, steps, own=own), rel=1e-12)


def test_a_warm_start_is_judged_from_where_it_is(tmp_path):
    data = table(draws=2)
    module = BilevelLearner(Ridge(3), SGD(0.05), Implicit(2, stationary=10.0), warm_start=True).double()
    run = trainer(tmp_path, precision="64-true", callbacks=[LastCheckpoint()])
    run.fit(module, data)
    inner = module.inner
    assert len(inner["weight"]) == 2
    run.validate(module, data, verbose=False)
    expected = direct(module, data, "val", 0, start=task_at(inner, 0))
    assert module.scores["learned"] == pytest.approx(expected, rel=1e-12)
    assert scalars(tmp_path)["val/loss"][-1][1] == pytest.approx(expected["loss"], rel=1e-6)
    # baselines would have seen fewer steps, and nothing of the training is changed by looking
    assert list(module.scores) == ["learned"]
    assert same(module.inner, inner)
    # a checkpoint is judged alike
    other = BilevelLearner(Ridge(3), SGD(0.05), Implicit(2, stationary=10.0), warm_start=True).double()
    run = bare(tmp_path, precision="64-true")
    run.validate(other, data, ckpt_path=last(tmp_path), verbose=False)
    assert other.scores == module.scores


def test_validations_of_a_fit_leave_baselines_out(tmp_path):
    module = ridge()
    bare(tmp_path).fit(module, table())
    assert list(module.scores) == ["learned"]


def test_runs_without_validation(tmp_path):
    module = ridge()
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[ReportWriter(), LastCheckpoint()])
    run.fit(module, table())
    assert run.global_step == 4
    assert module.scores == {}
    assert not (tmp_path / "run/version_0/results").exists()
