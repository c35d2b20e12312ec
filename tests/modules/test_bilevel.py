"""The bilevel learner under the Trainer: its steps, what it logs and warns of, what resumes, and how it is judged."""

import math
import warnings
from functools import partial
from typing import NamedTuple

import pytest
import torch
from cases import draw, task_at
from fits import Kill, KilledError, bare, blobs, last, parameters, regression, same, scalars, told_once, trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.func import grad
from torch.utils.data import DataLoader

from metalit.adapt import adapt
from metalit.callbacks import LastCheckpoint, ScoreTable
from metalit.data import (
    BatchDataModule,
    Episodes,
    MatrixDataModule,
    Sine,
    SklearnTable,
    SplitsDataModule,
    TaskDataModule,
)
from metalit.data.base import task_keys
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import Direct, FirstOrder, Implicit, JTg, Truncated, Unrolled, over_tasks
from metalit.inner import SGD, MetaSGD, Newton
from metalit.keys import normal
from metalit.linsolve import CG, Dense, Neumann
from metalit.modules import BilevelLearner, MetaLearner
from metalit.networks import MLP
from metalit.problem import Problem
from metalit.problems import Cleaning, FewShot, Logistic, LowRank, Ridge, ThetaPhi
from metalit.tree import dot, flatten, leaves, norm, tree_map

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SCHEDULERS = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, threshold=0.9),
}


def sgd(lr=0.1, **options):
    return lambda groups: torch.optim.SGD(groups, lr=lr, **options)


class Offset(Problem):
    """A user's own problem: the inner variable follows a target of its task's, half-way from where φ lets it start."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, size))
        self.log_weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("target", torch.linspace(1, 2, size))

    def init(self, outer, task):
        start = outer["start"] + 0.1 * normal(task, 3).to(outer["start"])
        return {"deep": {"w": start}, "b": 0.0 * outer["log_weight"]}

    def inner_loss(self, inner, outer, task, step):
        error = inner["deep"]["w"] + inner["b"] - self.target
        return 0.5 * dot(error, error) + 0.5 * outer["log_weight"].exp() * dot(inner, inner)

    def outer_loss(self, inner, outer, task):
        error = inner["deep"]["w"] - 0.9 * self.target
        return 0.5 * dot(error, error) + 0.01 * outer["log_weight"].square()


def offset(inner=None, hypergradient=None, **options):
    return BilevelLearner(Offset(), inner or SGD(0.2), hypergradient or Unrolled(3), **options)


def ridge(inner=None, hypergradient=None, features=3, log_penalty=-1.0, batch="all", outer_batch="all", **options):
    problem = Ridge(features, log_penalty, batch=batch, outer_batch=outer_batch)
    return BilevelLearner(problem, inner or Newton(), hypergradient or Implicit(1, Dense()), **options)


def table(**options):
    return SplitsDataModule(regression(), **options)


def cleaning(examples=60, classes=3, batch="all", outer_batch="all", steps=5, **options):
    torch.manual_seed(0)
    problem = Cleaning(MLP([4, classes]), examples, batch=batch, outer_batch=outer_batch)
    return BilevelLearner(problem, SGD(0.5), Implicit(steps, CG(5)), **options)


def keys(step, count=1, seed=0, split="train"):
    return task_keys(seed, split, torch.arange(step * count, (step + 1) * count))


def constants(module):
    return {level: tree_map(lambda value: value.detach().clone(), branch) for level, branch in module.outer().items()}


# ---- one step


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
        fixed = {level: tree_map(Tensor.detach, branch) for level, branch in outer.items()}
        estimate = over_tasks(hypergradient, problem, inner, fixed, tasks, start)
        for path, slope in leaves(estimate.gradient):
            named[path].grad = slope
        nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        optimizer.step()
        scheduler.step()
        start = estimate.inner if warm_start else None
    run = bare(tmp_path, precision="64-true")
    run.fit(module, data)
    assert run.global_step == 4
    for path, value in parameters(module).items():
        torch.testing.assert_close(value, named[path].detach(), **TIGHT)
    if warm_start:
        torch.testing.assert_close(flatten(module.inner), flatten(start), **TIGHT)
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


# ---- resuming


RESUMED = {
    "ridge, minibatches": lambda: (
        ridge(
            SGD(0.1), Unrolled(3), batch=8, outer_batch=5, warm_start=True, optimizer=sgd(0.5, momentum=0.9),
            scheduler=SCHEDULERS["plateau"],
        ),
        table(draws=2),
    ),
    "cleaning, minibatches": lambda: (
        cleaning(batch=10, outer_batch=7, warm_start=True, scheduler=SCHEDULERS["exponential"]),
        SplitsDataModule(blobs(), corrupt=0.5),
    ),
    "keys": lambda: (
        offset(hypergradient=Implicit(2), warm_start=True, draws=2, scheduler=SCHEDULERS["plateau"]), None,
    ),
    "cold": lambda: (ridge(SGD(0.1), Unrolled(2), batch=8, scheduler=SCHEDULERS["exponential"]), table()),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(name, tmp_path):
    def fit(root, *callbacks, ckpt=None):
        module, data = RESUMED[name]()
        run = trainer(root, steps=6, callbacks=[LastCheckpoint(seconds=0.0), *callbacks])
        run.fit(module, data, ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    for stop in (1, 3, 4):
        root = tmp_path / str(stop)
        with pytest.raises(KilledError):
            fit(root, Kill(stop))
        checkpoint = torch.load(last(root), weights_only=True)
        assert checkpoint["global_step"] == stop
        assert (checkpoint["inner"] is not None) == whole.warm_start
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the checkpoint keeps")
            resumed = fit(root, ckpt=last(root))
        assert resumed.global_step == 6
        assert same(whole, resumed)
        if whole.warm_start:
            assert same(whole.inner, resumed.inner)
        assert whole.scores == resumed.scores
        states = [torch.load(last(path), weights_only=True)["optimizer_states"] for path in (tmp_path / "whole", root)]
        assert str(states[0]) == str(states[1])


def test_a_checkpoint_of_another_number_of_draws_is_refused(tmp_path):
    module = partial(offset, hypergradient=Implicit(2), warm_start=True)
    trainer(tmp_path).fit(module(draws=2))
    with pytest.raises(InputError, match=r"inner variables of 2 tasks.* 3; use the number"):
        trainer(tmp_path, steps=6).fit(module(draws=3), ckpt_path=last(tmp_path))


def test_a_checkpoint_of_another_learner_is_refused(tmp_path):
    def few_shot(kind, **options):
        return kind(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), **options)

    data = TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3)
    bare(tmp_path).fit(few_shot(BilevelLearner), data)
    trainer(tmp_path / "meta").fit(few_shot(MetaLearner, eval_steps=1), data)
    with pytest.raises(InputError, match="another kind of learner: it holds no inner variable"):
        trainer(tmp_path).fit(few_shot(BilevelLearner), data, ckpt_path=last(tmp_path / "meta"))
    with pytest.raises(InputError, match=r"of another network: 'problem\.log_penalty'"):
        trainer(tmp_path).fit(ridge(), table(), ckpt_path=last(tmp_path / "meta"))


# ---- users' own problems and data


class Mean(Problem):
    """About as small as a problem gets: its data is its own, and φ shrinks the mean of the training half."""

    def __init__(self):
        super().__init__()
        self.shrink = nn.Parameter(torch.zeros(()))
        self.register_buffer("y", 1.0 + draw(40, seed=1).float())

    def init(self, outer, task):
        return torch.zeros(())

    def inner_loss(self, inner, outer, task, step):
        return (self.y[:20] - inner).square().mean() + outer["shrink"].exp() * inner.square()

    def outer_loss(self, inner, outer, task):
        return (self.y[20:] - inner).square().mean()


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


def test_learned_step_sizes_need_a_shape_before_there_is_a_task():
    with pytest.raises(InputError, match=r"MetaSGD.*Offset\.init.*task"):
        offset(inner=MetaSGD(0.1))


class Drawn(NamedTuple):
    c: Tensor
    label: str


class Own(LightningDataModule):
    """Batches of two tasks that hold something else than tensors too."""

    def __init__(self, tasks=2):
        super().__init__()
        self.tasks = tasks

    def train_dataloader(self):
        return DataLoader([Drawn(draw(2, 3, seed=step).float(), "train") for step in range(8)], batch_size=None)

    def val_dataloader(self):
        batches = [Drawn(draw(self.tasks, 3, seed=20 + number).float(), "val") for number in range(2)]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader


class Centre(Problem):
    """½‖θ − c − φ‖² inside, ½‖θ‖² outside."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3))

    def init(self, outer, task):
        return 0.0 * task.c

    def inner_loss(self, inner, outer, task, step):
        return 0.5 * (inner - task.c - outer["shift"]).square().sum()

    def outer_loss(self, inner, outer, task):
        return 0.5 * inner.square().sum()

    def watch(self, start, inner, outer, gradient, task):
        return {"positive": inner > 0, "size": inner}

    def scores(self, inner, outer, task, split):
        return {"loss": self.outer_loss(inner, outer, task), "is_val": torch.tensor(task.label == "val")}


def test_scores_are_means_over_tasks_and_batches(tmp_path, capsys):
    module, data = BilevelLearner(Centre(), SGD(0.5), Unrolled(2), eval_steps=3), Own()
    run = trainer(tmp_path, callbacks=[ScoreTable()])
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


def test_a_warm_start_of_fewer_tasks_than_are_judged_is_refused(tmp_path):
    module = BilevelLearner(Centre(), SGD(0.5), Implicit(2), warm_start=True)
    with pytest.raises(InputError, match=r"model\.eval_steps"):
        bare(tmp_path).fit(module, Own(tasks=3))
    module = BilevelLearner(Centre(), SGD(0.5), Implicit(2), warm_start=True, eval_steps=2)
    bare(tmp_path).fit(module, Own(tasks=3))


# ---- what is logged, and warned of


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


class Curved(Problem):
    """½ h θ² − θ inside, with the curvature ``h``."""

    def __init__(self, curvature):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2))
        self.register_buffer("h", torch.tensor(curvature))

    def init(self, outer, task):
        return torch.zeros_like(outer["phi"])

    def inner_loss(self, inner, outer, task, step):
        return (0.5 * self.h * inner.square() - outer["phi"] * inner).sum()

    def outer_loss(self, inner, outer, task):
        return (inner - 0.5).square().sum()


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


class Renamed(Problem):
    """With the names of the seed's variables instead of ours."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2))

    def init(self, phi, draw):
        return torch.zeros(2)

    def inner_loss(self, theta, phi, draw, number):
        return (theta - phi["phi"]).square().sum()

    def outer_loss(self, theta, phi, draw):
        return (theta - 3).square().sum()


@pytest.mark.parametrize("hypergradient", [Unrolled(2), Truncated(2, 1), Implicit(2), JTg()])
def test_arguments_go_by_their_places(hypergradient, tmp_path):
    module = BilevelLearner(Renamed(), SGD(0.1), hypergradient, warm_start=True)
    bare(tmp_path, log_every_n_steps=1).fit(module)
    assert not torch.equal(module.problem.phi.detach(), torch.ones(2))


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


def test_the_rule_writes_the_pair_that_it_reached(tmp_path):
    module = BilevelLearner(ThetaPhi([0.7, 0.2], [0.5, 0.9]), SGD(0.1), JTg(), warm_start=True, optimizer=sgd(0.05))
    bare(tmp_path, 5, callbacks=[ScoreTable()]).fit(module)
    theta, phi = module.results(torch.zeros(1, dtype=torch.int64))["theta"]["theta"], module.problem.phi.detach()
    assert torch.equal(theta, module.inner[0])
    assert module.scores["learned"]["loss"] == pytest.approx(float(theta @ theta * (phi @ phi)), rel=1e-6)


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


# ---- errors before anything is trained


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
    run = trainer(tmp_path, steps=2, val_check_interval=1, callbacks=[ScoreTable(), LastCheckpoint()])
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


# ---- evaluation


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
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[ScoreTable(), LastCheckpoint()])
    run.fit(module, table())
    assert run.global_step == 4
    assert module.scores == {}
    assert not (tmp_path / "run/version_0/results").exists()


def test_fast_dev_run(tmp_path):
    run = bare(tmp_path, fast_dev_run=True, callbacks=[ScoreTable()])
    run.fit(ridge(warm_start=True), table(draws=2))
    assert run.global_step == 1


def test_a_fit_leaves_the_modes_of_modules_as_they_were(tmp_path):
    module = cleaning()
    module.problem.network.out.eval()
    modes = [part.training for part in module.modules()]
    run = bare(tmp_path, callbacks=[ScoreTable()])
    run.fit(module, SplitsDataModule(blobs()))
    assert [part.training for part in module.modules()] == modes


# ---- precision, clipping, schedulers


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


# ---- what the problems are for


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
