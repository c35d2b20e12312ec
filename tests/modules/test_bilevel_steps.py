"""The steps of the bilevel learner under the Trainer are those of a loop by hand."""

import math

import pytest
import torch
from bilevel_learners import (
    SCHEDULERS,
    TIGHT,
    Mean,
    Offset,
    Renamed,
    cleaning,
    constants,
    keys,
    offset,
    ridge,
    sgd,
    table,
)
from cases import task_at
from fits import bare, blobs, last, parameters, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from metalit.adapt import Iterate, adapt, kept
from metalit.callbacks import ReportWriter
from metalit.data import (
    SklearnTable,
    SplitsDataModule,
)
from metalit.hypergradients import Direct, FirstOrder, Implicit, JTg, Truncated, Unrolled, over_tasks
from metalit.inner import SGD, MetaSGD, Newton
from metalit.linsolve import CG
from metalit.modules import BilevelLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, Ridge, ThetaPhi
from metalit.tree import flatten, leaves, norm, tree_map


def test_the_notebooks_rule_takes_both_products_before_either_variable_moves(tmp_path):
    problem = ThetaPhi([0.7, -0.2, 0.4], [0.5, 0.9, 0.1, 0.6])
    module = BilevelLearner(problem, SGD(0.1), JTg(), warm_start=True, optimizer=sgd(0.05)).double()
    theta, phi = problem.theta.clone(), problem.phi.detach().clone()
    fs, slopes = [], []
    for _ in range(7):
        s = phi @ phi
        g, jtg = 2 * s * theta, 8 * s * (theta @ theta) * phi
        fs.append(float((theta @ theta) * s))
        slopes.append((float(g.norm()), float(jtg.norm())))
        theta, phi = theta - 0.1 * g, phi - 0.05 * jtg
    trainer(tmp_path, steps=7, precision="64-true").fit(module)
    torch.testing.assert_close(module.inner[0], theta, **TIGHT)
    torch.testing.assert_close(problem.phi.detach(), phi, **TIGHT)
    logged = {name: [value for _, value in series] for name, series in scalars(tmp_path).items()}
    assert logged["train/f"] == pytest.approx(fs, rel=1e-6)
    for name, column in (("theta", 0), ("phi", 1)):
        expected = [slope[column] for slope in slopes]
        for kind in ("actual", "expected"):
            assert logged[f"train/{name}_gradient_{kind}"] == pytest.approx(expected, rel=1e-6)
        assert max(logged[f"train/{name}_gradient_difference"]) < 1e-14
    assert logged["train/loss"] == pytest.approx([0.5 * g**2 for g, _ in slopes], rel=1e-6)
    assert len(logged["train/loss"]) == 7


ESTIMATORS = {
    "Unrolled": (SGD(0.2), Unrolled(3)),
    "Truncated": (SGD(0.2), Truncated(4, 2)),
    "FirstOrder": (SGD(0.2), FirstOrder(2)),
    "Implicit": (SGD(0.3), Implicit(30, CG(6))),
    "JTg": (SGD(0.1), JTg()),
    "Direct": (SGD(0.1), Direct()),
    "MetaSGD": (MetaSGD(0.2), Unrolled(2)),
    "momentum": (SGD(0.1, momentum=0.7), Unrolled(3)),
    "momentum, Implicit": (SGD(0.1, momentum=0.7), Implicit(30, CG(6))),
    "momentum, JTg": (SGD(0.1, momentum=0.7), JTg(2)),
}


@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_steps_are_those_of_a_bare_loop(name, warm_start, tmp_path):
    inner, hypergradient = ESTIMATORS[name]
    problem = Offset() if name != "MetaSGD" else Ridge(3)
    data = table(draws=2) if name == "MetaSGD" else None
    rates = {"problem.log*": 0.03}
    options = {"lr_by_name": rates, "clip_norm": 0.5, "warm_start": warm_start}
    module = BilevelLearner(
        problem, inner, hypergradient, draws=2, seed=3, scheduler=SCHEDULERS["exponential"],
        optimizer=sgd(0.2, momentum=0.9), **options,
    ).double()  # fmt: skip
    outer, start = constants(module), None
    named = {name: value.requires_grad_() for name, value in leaves(outer)}
    groups = [
        {"params": [value for name, value in named.items() if not name.startswith("problem.log")]},
        {"params": [value for name, value in named.items() if name.startswith("problem.log")], "lr": 0.03},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=0.2, momentum=0.9)
    scheduler = SCHEDULERS["exponential"](optimizer)
    if data is not None:
        data.setup("fit")
    for step in range(4):
        tasks = keys(step, 2, seed=3) if data is None else data.draw("train", torch.arange(2 * step, 2 * step + 2))
        if warm_start and step == 0:
            inits = [problem.init(outer["problem"], task_at(tasks, index)) for index in range(2)]
            start = tree_map(lambda *values: torch.stack(values).detach(), *inits)
            start = Iterate(start, kept(inner.init(start)))
        fixed = {level: tree_map(Tensor.detach, branch) for level, branch in outer.items()}
        estimate = over_tasks(hypergradient, problem, inner, fixed, tasks, start)
        for path, slope in leaves(estimate.gradient):
            named[path].grad = slope
        nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        optimizer.step()
        scheduler.step()
        start = Iterate(estimate.inner, estimate.state) if warm_start else None
    run = bare(tmp_path, precision="64-true")
    run.fit(module, data)
    assert run.global_step == 4
    for path, value in parameters(module).items():
        torch.testing.assert_close(value, named[path].detach(), **TIGHT)
    if warm_start:
        torch.testing.assert_close(flatten(module.inner), flatten(start.inner), **TIGHT)
    else:
        assert module.inner is None


def test_a_warm_start_begins_at_init_and_then_goes_on(tmp_path):
    found = []
    for steps in (1, 2):
        module = offset(hypergradient=Implicit(2), warm_start=True, optimizer=sgd(0.0)).double()
        bare(tmp_path, steps, precision="64-true").fit(module)
        found.append(module.inner)
    outer = constants(module)
    once = adapt(module.problem, module.inner_optimizer, outer, keys(0)[0], 2)
    torch.testing.assert_close(flatten(task_at(found[0], 0)), flatten(once), **TIGHT)
    twice = adapt(module.problem, module.inner_optimizer, outer, keys(1)[0], 2, once)
    torch.testing.assert_close(flatten(task_at(found[1], 0)), flatten(twice), **TIGHT)


def test_a_problem_of_ones_own_needs_no_data_module(tmp_path):
    module = BilevelLearner(Mean(), Newton(), Unrolled(1), optimizer=sgd(1.0))
    run = bare(tmp_path, steps=40, val_check_interval=1.0, log_every_n_steps=1000)
    run.fit(module)
    y = module.problem.y
    # the best shrinkage makes mean/(1 + λ) that of the other half
    lam = float(y[:20].mean() / y[20:].mean() - 1)
    expected = math.exp(float(module.problem.shrink))
    inner = float(y[:20].mean() / (1 + expected))
    assert float(module.solve(torch.tensor(0))) == pytest.approx(inner, rel=1e-5)
    assert run.callback_metrics["val/loss"] < (y[20:] - y[:20].mean() / 2).square().mean()
    assert lam < expected < 1.0
    run.test(module, verbose=False)
    assert set(module.scores) == {"learned"}


def test_keys_without_a_data_module(tmp_path):
    seen = []

    class Watch(Offset):
        def check(self, task):
            seen.append(task)

    class Tasks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch)

    module = BilevelLearner(Watch(), SGD(0.2), Unrolled(1), draws=3, seed=5)
    bare(tmp_path, steps=2, callbacks=[Tasks()]).fit(module)
    first, *steps = seen
    assert torch.equal(first, keys(0, seed=5, split="val")[0])
    assert [step.tolist() for step in steps] == [keys(step, 3, seed=5).tolist() for step in range(2)]
    assert len({key for step in steps for key in step.tolist()}) == 6


def test_learned_step_sizes_of_a_nested_inner_variable(tmp_path):
    class Fixed(Offset):
        def init(self, outer, task):
            return {"deep": {"w": outer["start"]}, "b": 0.0 * outer["log_weight"]}

    module = BilevelLearner(Fixed(), MetaSGD(0.2), Unrolled(2))
    before = parameters(module)
    assert {"optimizer.lr.deep.w", "optimizer.lr.b"} <= before.keys()
    trainer(tmp_path).fit(module)
    for name, value in parameters(module).items():
        assert not torch.equal(value, before[name]), name
    saved = torch.load(last(tmp_path), weights_only=True)["state_dict"]
    assert torch.equal(saved["learned.lr.deep.w"], parameters(module)["optimizer.lr.deep.w"])
    # the norm of all that is learned, before the first step
    logged = scalars(tmp_path)["train/outer_norm"][0]
    assert logged == (1, pytest.approx(float(norm(before)), rel=1e-6))


@pytest.mark.parametrize("hypergradient", [Unrolled(2), Truncated(2, 1), Implicit(2), JTg()])
def test_arguments_go_by_their_places(hypergradient, tmp_path):
    module = BilevelLearner(Renamed(), SGD(0.1), hypergradient, warm_start=True)
    bare(tmp_path, log_every_n_steps=1).fit(module)
    assert not torch.equal(module.problem.phi.detach(), torch.ones(2))


def test_the_rule_writes_the_pair_that_it_reached(tmp_path):
    module = BilevelLearner(ThetaPhi([0.7, 0.2], [0.5, 0.9]), SGD(0.1), JTg(), warm_start=True, optimizer=sgd(0.05))
    bare(tmp_path, 5, callbacks=[ReportWriter()]).fit(module)
    theta, phi = module.results(torch.zeros(1, dtype=torch.int64))["theta"]["theta"], module.problem.phi.detach()
    assert torch.equal(theta, module.inner[0])
    assert module.scores["learned"]["loss"] == pytest.approx(float(theta @ theta * (phi @ phi)), rel=1e-6)


def test_fast_dev_run(tmp_path):
    run = bare(tmp_path, fast_dev_run=True, callbacks=[ReportWriter()])
    run.fit(ridge(warm_start=True), table(draws=2))
    assert run.global_step == 1


def test_a_fit_leaves_the_modes_of_modules_as_they_were(tmp_path):
    module = cleaning()
    module.problem.network.out.eval()
    modes = [part.training for part in module.modules()]
    run = bare(tmp_path, callbacks=[ReportWriter()])
    run.fit(module, SplitsDataModule(blobs()))
    assert [part.training for part in module.modules()] == modes


def test_autocast_keeps_both_variables_in_float32(tmp_path):
    module, seen = cleaning(warm_start=True, steps=20), []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.extend(parameter.grad.dtype for _, parameter in leaves(module.outer()))

    bare(tmp_path, precision="bf16-mixed", callbacks=[Watch()]).fit(module, SplitsDataModule(blobs(), corrupt=0.5))
    assert seen == [torch.float32] * 4
    assert {value.dtype for _, value in leaves(module.inner)} == {torch.float32}
    assert not torch.equal(module.problem.logit, torch.zeros(60))


def test_clips_the_true_gradient(tmp_path):
    module = ridge(clip_norm=1e-3, optimizer=sgd(1.0))
    before = parameters(module)
    trainer(tmp_path, steps=1, val_check_interval=1.0).fit(module, table())
    moved = parameters(module)["problem.log_penalty"] - before["problem.log_penalty"]
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert scalars(tmp_path)["train/grad_norm"][0][1] > 5e-3


def test_a_plateau_scheduler_steps_once_for_each_validation(tmp_path):
    make = lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/r2", patience=0, threshold=1e9)  # noqa: E731
    module = ridge(scheduler=make)
    trainer(tmp_path).fit(module, table())
    assert [value for _, value in scalars(tmp_path)["train/lr"]] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert float(module.optimizers().param_groups[0]["lr"]) == pytest.approx(1e-5)


def test_cleaning_finds_corrupted_labels(tmp_path):
    data = SplitsDataModule(blobs(200, spread=0.5), corrupt=0.5)
    torch.manual_seed(0)
    problem = Cleaning(MLP([4, 3]), 100)
    adam = lambda groups: torch.optim.Adam(groups, lr=0.2)  # noqa: E731
    module = BilevelLearner(problem, SGD(0.5), Implicit(5, CG(5)), warm_start=True, optimizer=adam)
    bare(tmp_path, steps=40, val_check_interval=1.0, log_every_n_steps=1000).fit(module, data)
    # guessing all rows corrupted has an F1 of 2/3, guessing at random one of 1/2
    assert module.scores["learned"]["f1"] > 0.9
    weights = torch.sigmoid(problem.logit.detach())
    assert float(weights[data.splits.corrupted].mean()) < float(weights[~data.splits.corrupted].mean()) - 0.4


def test_ridge_penalises_noise(tmp_path):
    data = SplitsDataModule(SklearnTable("diabetes"), noise_columns=10)
    adam = lambda groups: torch.optim.Adam(groups, lr=0.1)  # noqa: E731
    module = ridge(features=20, log_penalty=-3.0, optimizer=adam).double()
    run = bare(tmp_path, steps=60, precision="64-true", val_check_interval=1.0, log_every_n_steps=1000)
    run.fit(module, data)
    scores = module.scores["learned"]
    assert scores["log_penalty_noise"] > scores["log_penalty_real"] + 0.5
    run.validate(module, data, verbose=False)
    assert scores["loss"] < min(values["loss"] for values in module.scores.values() if values != scores)
