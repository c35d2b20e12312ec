"""Fused steps: several outer steps on each call of the Trainer are the same outer steps, bit for bit."""

import math
import warnings

import pytest
import torch
from fits import Kill, KilledError, bare, last, regression, same, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch.utils.data import DataLoader

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.compiling import program
from metalit.data import Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import Implicit, JTg, Unrolled
from metalit.inner import SGD, Adam, MetaSGD
from metalit.linsolve import CG
from metalit.modules import BilevelLearner, MetaLearner
from metalit.networks import MLP
from metalit.private_torch import tree_leaves
from metalit.problems import FewShot, Ridge, ThetaPhi
from metalit.training import outer_loop

STEPS, FUSED = 20, 5
LONG = pytest.mark.long


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def sine(kind=TaskDataModule):
    return kind(Sine(), Episodes(4, 5, 5), Episodes(6, 5, 10), Episodes(6, 5, 10))


def few_shot(fused, inner=None, **options):
    torch.manual_seed(0)
    network = MLP([1, 8, 1], activation="Tanh", dropout=0.2)
    return MetaLearner(FewShot(network), inner or SGD(0.05), Unrolled(1), eval_steps=2, fused_steps=fused, **options)


def ridge(fused, **options):
    problem = Ridge(3, -1.0, batch=8, outer_batch=5)
    return BilevelLearner(problem, SGD(0.1), Unrolled(2), fused_steps=fused, **options)


def theta_phi(fused, **options):
    problem = ThetaPhi([0.7, -0.2, 0.4], [0.5, 0.9, 0.1, 0.6])
    return BilevelLearner(problem, SGD(0.1), JTg(), warm_start=True, fused_steps=fused, **options)


def momenta(fused, **options):
    return BilevelLearner(Ridge(3), Adam(0.05), Unrolled(2), warm_start=True, fused_steps=fused, **options)


FITS = {
    "MAML, exponential": lambda fused: (few_shot(fused, scheduler=exponential), sine()),
    "MetaSGD, cosine, clipped": lambda fused: (
        few_shot(fused, MetaSGD(0.05), scheduler=cosine, clip_norm=0.1),
        sine(),
    ),
    "MAML, chunks": lambda fused: (few_shot(fused, tasks_per_chunk=3), sine()),
    "ridge, warm": lambda fused: (
        ridge(fused, warm_start=True, scheduler=exponential),
        SplitsDataModule(regression(), draws=2),
    ),
    "ridge, warm, clipped": lambda fused: (
        ridge(fused, warm_start=True, clip_norm=0.01),
        SplitsDataModule(regression(), draws=2),
    ),
    "ridge, warm, momenta": lambda fused: (momenta(fused), SplitsDataModule(regression(), draws=2)),
    "ridge, cold": lambda fused: (ridge(fused), SplitsDataModule(regression(), draws=2)),
    "keys": lambda fused: (theta_phi(fused, draws=2), None),
    "Implicit": lambda fused: (
        BilevelLearner(Ridge(3), SGD(0.1), Implicit(3, CG(3)), warm_start=True, fused_steps=fused),
        SplitsDataModule(regression()),
    ),
}


def fit(root, name, fused, *callbacks, ckpt=None, **options):
    module, data = FITS[name](fused)
    callbacks = [BestCheckpoint(), LastCheckpoint(seconds=0.0), *callbacks]
    run = trainer(root, STEPS, **{"log_every_n_steps": FUSED, "callbacks": callbacks, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint keeps")
        run.fit(module, data, ckpt_path=ckpt)
    assert run.global_step == STEPS
    return module


def saved(root, name):
    checkpoint = torch.load(root / "run/version_0/checkpoints" / name, weights_only=True)
    return {
        part: checkpoint.get(part)
        for part in ("global_step", "optimizer_states", "lr_schedulers", "inner", "inner_state")
    } | {"weights": checkpoint["state_dict"]}


def check_same_runs(first, second, modules):
    assert same(*modules)
    logged, expected = scalars(first), scalars(second)
    assert logged == expected
    for name in ("best.ckpt", "last.ckpt"):
        assert str(saved(first, name)) == str(saved(second, name))
    if isinstance(modules[0], BilevelLearner) and modules[0].warm_start:
        assert same(modules[0].inner, modules[1].inner)
    return logged


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "64-true") for name in FITS),
        *(pytest.param(name, "32-true", marks=LONG) for name in ("MAML, exponential", "ridge, warm, clipped")),
    ],
)
def test_a_fused_run_is_the_plain_run_bit_for_bit(name, precision, tmp_path):
    roots = [tmp_path / "plain", tmp_path / "fused"]
    modules = [fit(root, name, fused, precision=precision) for root, fused in zip(roots, (1, FUSED), strict=True)]
    logged = check_same_runs(*roots, modules)
    assert [step for step, _ in logged["train/loss"]] == [5, 10, 15, 20]
    assert [step for step, _ in logged["val/loss"]] == [10, 20]
    assert len({value for _, value in logged["train/loss"]}) == 4


@pytest.mark.parametrize(
    ("interval", "steps"), [(5, [5, 10, 15, 20]), (15, [15]), (20, [20]), (0.25, [5, 10, 15, 20]), (1.0, [20])]
)
def test_validations_come_after_as_many_outer_steps(interval, steps, tmp_path):
    roots = [tmp_path / "plain", tmp_path / "fused"]
    modules = [
        fit(root, "ridge, warm", fused, val_check_interval=interval)
        for root, fused in zip(roots, (1, FUSED), strict=True)
    ]
    logged = check_same_runs(*roots, modules)
    assert [step for step, _ in logged["val/loss"]] == steps


def test_a_share_of_the_steps_is_rounded_down_to_whole_calls(tmp_path):
    for share, steps in ((0.3, [5, 10, 15, 20]), (0.5, [10, 20]), (0.01, [5, 10, 15, 20])):
        root = tmp_path / str(share)
        fit(root, "ridge, warm", FUSED, val_check_interval=share)
        assert [step for step, _ in scalars(root)["val/loss"]] == steps


def test_logs_come_at_multiples_of_both(tmp_path):
    fit(tmp_path, "ridge, cold", FUSED, log_every_n_steps=10)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [10, 20]


def test_more_steps_than_are_kept_unseen(tmp_path):
    found = []
    for fused in (1, 70):
        module, data = FITS["ridge, warm"](fused)
        bare(tmp_path, 140, log_every_n_steps=70).fit(module, data)
        found.append(module)
    assert same(*found)


class Heard(Callback):
    """A hook of its class."""

    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1


@pytest.mark.parametrize("fused", [1, FUSED])
@pytest.mark.parametrize("of_object", [True, False])
def test_callbacks_hear_of_every_outer_step(fused, of_object, tmp_path):
    heard = Heard()
    lent = LambdaCallback(on_before_optimizer_step=heard.on_before_optimizer_step)
    module, data = FITS["ridge, cold"](fused)
    callbacks = [lent if of_object else heard]
    bare(tmp_path, STEPS, log_every_n_steps=FUSED, callbacks=callbacks).fit(module, data)
    assert heard.steps == STEPS


# ---- resuming


@pytest.mark.parametrize("name", ["MAML, exponential", "ridge, warm"])
@pytest.mark.parametrize("stop", [pytest.param(5, marks=LONG), 10, pytest.param(15, marks=LONG)])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(name, stop, tmp_path):
    roots = [tmp_path / "plain", tmp_path / "fused"]
    whole = fit(roots[0], name, 1)
    with pytest.raises(KilledError):
        fit(roots[1], name, FUSED, Kill(stop))
    assert saved(roots[1], "last.ckpt")["global_step"] == stop
    resumed = fit(roots[1], name, FUSED, ckpt=last(roots[1]))
    assert same(whole, resumed)
    for file in ("best.ckpt", "last.ckpt"):
        assert str(saved(roots[0], file)) == str(saved(roots[1], file))


@pytest.mark.parametrize(("first", "second"), [(1, FUSED), (FUSED, 1), (FUSED, 10)])
def test_a_run_goes_on_with_the_number_that_it_began_with(first, second, tmp_path):
    """Lightning counts calls: with another number it would validate at other steps than an uninterrupted run."""
    with pytest.raises(KilledError):
        fit(tmp_path, "ridge, warm", first, Kill(10))
    told = rf"model\.fused_steps={second}: the checkpoint is of a run with {first}, .* with model\.fused_steps: {first}"
    with pytest.raises(InputError, match=told):
        fit(tmp_path, "ridge, warm", second, ckpt=last(tmp_path), log_every_n_steps=10)
    module, data = FITS["ridge, warm"](second)
    run = bare(tmp_path, STEPS, log_every_n_steps=10)
    for stage in (run.validate, run.test):
        stage(module, data, ckpt_path=last(tmp_path), verbose=False)
    assert module.outer_step == 10


def test_a_checkpoint_of_before_there_were_fused_steps_is_a_plain_one(tmp_path):
    with pytest.raises(KilledError):
        fit(tmp_path, "ridge, warm", 1, Kill(10))
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert checkpoint.pop("fused_steps") == 1
    torch.save(checkpoint, last(tmp_path))
    fit(tmp_path, "ridge, warm", 1, ckpt=last(tmp_path))


# ---- what is not finite


class Broken(TaskDataModule):
    """The tasks of one outer step are not numbers."""

    step = 8

    def draw(self, split, index):
        tasks = super().draw(split, index)
        if split == "train":
            bad = (index // 4 + 1 == self.step)[:, None, None]
            tasks = tasks._replace(query=tasks.query._replace(y=torch.where(bad, math.nan, tasks.query.y)))
        return tasks


@pytest.mark.parametrize("fused", [1, 2, 5, 20])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_what_is_not_finite_is_reported_with_its_very_step(fused, clip_norm, tmp_path):
    run = trainer(tmp_path, STEPS, val_check_interval=1.0, log_every_n_steps=20)
    with pytest.raises(NonFiniteError, match=r"at outer step 8\. No checkpoint had been saved"):
        run.fit(few_shot(fused, clip_norm=clip_norm), sine(Broken))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("fused", [1, 2])
def test_a_log_that_is_due_stops_the_run(fused, tmp_path):
    run = bare(tmp_path, STEPS, log_every_n_steps=10, limit_val_batches=0)
    with pytest.raises(NonFiniteError, match=r"at outer step 8\."):
        run.fit(few_shot(fused), sine(Broken))
    assert run.global_step == 10


@pytest.mark.parametrize("step", [3, 64, 65, 69, 70])
def test_a_long_block_is_watched_to_its_end(step, tmp_path):
    data = sine(Broken)
    data.step = step
    with pytest.raises(NonFiniteError, match=rf"at outer step {step}\."):
        bare(tmp_path, 70, log_every_n_steps=70).fit(few_shot(70), data)


def test_the_last_good_checkpoint_is_that_of_the_last_good_block(tmp_path):
    run = trainer(tmp_path, STEPS, val_check_interval=5, log_every_n_steps=20)
    with pytest.raises(NonFiniteError, match=r"at outer step 8\. The last good checkpoint is .*\.ckpt"):
        run.fit(few_shot(FUSED), sine(Broken))
    assert saved(tmp_path, "last.ckpt")["global_step"] == 5


# ---- the Trainer


@pytest.mark.parametrize("interval", [10, 0.5, 1.0, 20])
def test_the_trainer_keeps_what_it_was_told(interval, tmp_path):
    module, data = FITS["ridge, cold"](FUSED)
    run = bare(tmp_path, STEPS, val_check_interval=interval, log_every_n_steps=FUSED)
    run.fit(module, data)
    assert run.val_check_interval == interval
    assert type(run.val_check_interval) is type(interval)
    for stage in (run.validate, run.test):
        stage(module, data, verbose=False)
        assert run.val_check_interval == interval


def test_the_trainer_keeps_what_it_was_told_where_a_fit_fails(tmp_path):
    run = bare(tmp_path, STEPS, val_check_interval=10, log_every_n_steps=20)
    with pytest.raises(NonFiniteError):
        run.fit(few_shot(FUSED), sine(Broken))
    assert run.val_check_interval == 10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 22}, r"trainer\.max_steps=22 must be a multiple of model\.fused_steps=5"),
        ({"log_every_n_steps": 1}, r"trainer\.log_every_n_steps=1 must be a multiple of model\.fused_steps=5"),
        ({"log_every_n_steps": 12}, r"trainer\.log_every_n_steps=12 must"),
        ({"val_check_interval": 4}, r"trainer\.val_check_interval=4 must be a multiple of model\.fused_steps=5"),
        (
            {"limit_train_batches": 10},
            r"trainer\.limit_train_batches=10 \(or overfit_batches\) counts calls of model\.",
        ),
        ({"limit_train_batches": 1}, r"trainer\.limit_train_batches=1 \(or"),
        ({"limit_train_batches": 0.5}, r"trainer\.limit_train_batches=0\.5 \(or"),
        ({"overfit_batches": 5}, r"trainer\.limit_train_batches=5 \(or overfit_batches\)"),
        ({"fast_dev_run": True}, r"trainer\.max_steps=1 must .* model\.fused_steps: 1 leaves it free"),
    ],
)
def test_numbers_that_are_no_multiples_are_named(options, told, tmp_path):
    module, data = FITS["ridge, cold"](FUSED)
    with pytest.raises(InputError, match=told):
        bare(tmp_path, **{"steps": STEPS, "log_every_n_steps": FUSED, **options}).fit(module, data)


def test_saves_that_would_never_come_are_named(tmp_path):
    module, data = FITS["ridge, cold"](FUSED)
    told = r"ModelCheckpoint\.every_n_train_steps=7 must be a multiple of model\.fused_steps=5"
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=7)
    with pytest.raises(InputError, match=told):
        trainer(tmp_path, STEPS, log_every_n_steps=FUSED, callbacks=[saver]).fit(module, data)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer(tmp_path, STEPS, log_every_n_steps=FUSED, callbacks=[saver]).fit(module, data)
    assert {"step=10.ckpt", "step=20.ckpt"} <= {path.name for path in tmp_path.glob("*.ckpt")}


@pytest.mark.parametrize("name", ["fused_steps", "tasks_per_chunk"])
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("learner", [few_shot, ridge])
def test_numbers_that_are_not_positive_are_named(learner, name, number):
    with pytest.raises(InputError, match=rf"^model\.{name}={number} must be at least 1$"):
        learner(**{"fused": 1, **{name if name == "tasks_per_chunk" else "fused": number}})


def test_a_loader_of_ones_own_gives_the_tasks_of_one_step(tmp_path):
    data = sine()
    tasks = [data.draw("train", torch.arange(4 * step, 4 * step + 4)) for step in range(STEPS)]
    loader = DataLoader(tasks, batch_size=None)
    told = r"model\.fused_steps=5: the data gives the tasks of 1 step\(s\) at once; leave it out with a DataLoader"
    with pytest.raises(InputError, match=told):
        bare(tmp_path, STEPS, log_every_n_steps=FUSED).fit(few_shot(FUSED), loader)
    plain, given = few_shot(1), few_shot(1)
    bare(tmp_path, STEPS).fit(plain, data)
    bare(tmp_path, STEPS).fit(given, loader)
    assert same(plain, given)


@pytest.mark.parametrize("options", [{"clip_norm": 0.1}, {"tasks_per_chunk": 3}], ids=["clipped", "chunks"])
def test_steps_between_which_something_happens_are_no_program(options, monkeypatch, tmp_path):
    monkeypatch.setattr(outer_loop, "FusedLoop", None)
    monkeypatch.setattr(program, "compile_graph", lambda graph, _: lambda tensors: graph(*tensors))
    module = few_shot(2, compile=True, **options)
    trainer(tmp_path, 2, log_every_n_steps=0, limit_val_batches=0).fit(module, sine())
    assert module.is_compiled


def test_a_program_of_steps_hands_on_the_inner_optimisers_state(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "compile_graph", lambda graph, _: lambda tensors: graph(*tensors))
    modules = []
    for fused, compiled in ((1, False), (FUSED, True)):
        module = momenta(fused, compile=compiled)
        run = bare(tmp_path, 2 * FUSED, log_every_n_steps=FUSED, limit_val_batches=0, precision="64-true")
        run.fit(module, SplitsDataModule(regression(), draws=2))
        assert module.is_compiled == compiled
        modules.append(module)
    for one, other in zip(*(tree_leaves(module._warm.of_all(module.trainer)) for module in modules), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
