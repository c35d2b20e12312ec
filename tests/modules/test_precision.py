"""Mixed precision: gradients are scaled and unscaled once, small ones are kept, and a skipped step is none.

The Trainer takes 16-mixed on the CPU for bf16-mixed; a plugin around torch's own scaler for the CPU does it here.
"""

from functools import partial

import pytest
import torch
from cases import PROBLEMS, task_at
from fits import Given, Kill, KilledError, bare, blobs, last, parameters, regression, same, trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.func import vjp
from torch.utils._pytree import tree_map as pytree_map

from metalit.autodiff import SAM, Perturbation, WeightNoise
from metalit.callbacks import LastCheckpoint
from metalit.data import BatchDataModule, Episodes, Sine, SplitsDataModule, TaskDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import (
    F2SA,
    FiniteDifference,
    FirstOrder,
    Implicit,
    JTg,
    Recomputed,
    Reptile,
    Truncated,
    Unrolled,
)
from metalit.inner import SGD, Adam, MetaSGD, Newton
from metalit.linsolve import CG, Dense
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.modules.base import OuterLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, FewShot, Logistic, Ridge, ThetaPhi
from metalit.scaled import Scaled
from metalit.tree import flatten

LARGE = torch.tensor(2.0**16)
STEP = partial(torch.optim.SGD, lr=0.1)


def half(scale=2.0**16, growth_interval=2000):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def sine():
    return TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(4, 5, 5), Episodes(4, 5, 5))


def table():
    return SplitsDataModule(blobs(rows=60, classes=2))


def network(*sizes):
    torch.manual_seed(0)
    return MLP(sizes or [1, 8, 1], activation="Tanh")


def meta(hypergradient, inner=None, problem=FewShot, **options):
    return MetaLearner(problem(network()), inner or SGD(0.05), hypergradient, **{"optimizer": STEP, **options})


def bilevel(problem, hypergradient, lr=0.2, **options):
    return BilevelLearner(problem, SGD(lr), hypergradient, **{"optimizer": STEP, **options})


def cleaning():
    return Cleaning(network(4, 8, 2), 30, decay=0.01)


def supervised(perturbation=None, **options):
    return SupervisedLearner(network(4, 8, 3), None, perturbation, **{"optimizer": STEP, **options})


def rows():
    return BatchDataModule(blobs(), batch_size=16)


LEARNERS = {
    "MAML": (lambda **o: meta(Unrolled(2), **o), sine),
    "MAML, recomputed": (lambda **o: meta(Recomputed(2), **o), sine),
    "MAML, truncated": (lambda **o: meta(Truncated(3, 1), **o), sine),
    "Reptile": (lambda **o: meta(Reptile(2, batch=4), **o), sine),
    "FOMAML": (lambda **o: meta(FirstOrder(2), **o), sine),
    "Meta-SGD": (lambda **o: meta(Unrolled(2), MetaSGD(0.05), **o), sine),
    "Adam, clipped": (lambda **o: meta(Unrolled(2), Adam(0.05, eps=0.1, clip_norm=1.0), **o), sine),
    "logistic, implicit": (lambda **o: bilevel(Logistic(4, 0.0), Implicit(5, CG(5)), **o), table),
    "cleaning, unrolled": (lambda **o: bilevel(cleaning(), Unrolled(3), **o), table),
    "theta-phi, JTg": (lambda **o: bilevel(ThetaPhi([0.7, -1.2], [1.1, 0.4]), JTg(1), 0.01, **o), lambda: None),
    "supervised": (supervised, rows),
    "noise": (lambda **o: supervised(WeightNoise(0.01), **o), rows),
    "SAM": (lambda **o: supervised(SAM(0.2), **o), rows),
}


class Watch(Callback):
    """Keeps the gradients that the optimiser is given, and the scalars that are logged."""

    def __init__(self):
        self.gradients, self.logged = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad.reshape(-1).double() for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append(torch.cat(gradients))

    def setup(self, trainer, module, stage):
        module.stepper.write = self.logged.append


def gradients(tmp_path, learner, data, steps=1, **options):
    """What the optimiser was given, ``[steps, parameters]``, and what was logged."""
    watch = Watch()
    bare(tmp_path, steps, callbacks=[watch], val_check_interval=1.0, **options).fit(learner, data)
    return torch.stack(watch.gradients), watch.logged


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", LEARNERS)
def test_the_gradient_is_scaled_and_unscaled_once_in_every_learner(tmp_path, name):
    learner, data = LEARNERS[name]
    full, told = gradients(tmp_path, learner(), data())
    for precision, bound in ((half(), 2e-3), (half(2.0**8), 2e-3), ({"precision": "bf16-mixed"}, 2e-2)):
        found, logged = gradients(tmp_path, learner(), data(), **precision)
        assert error(found, full) < bound
        for tag in ("train/loss", "train/grad_norm"):
            assert logged[0][tag] == pytest.approx(told[0][tag], rel=2 * bound)


@pytest.mark.parametrize("kind", [F2SA, FiniteDifference])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_differences_are_not_taken_in_half_precision(kind, precision, tmp_path):
    options = half() if precision == "16-mixed" else {"precision": precision}
    told = rf"^hypergradient {kind.__name__} takes differences of gradients, which half precision would round away; use"
    with pytest.raises(InputError, match=told):
        bare(tmp_path, 1, **options).fit(bilevel(Logistic(4, 0.0), kind(3)), table())
    with pytest.raises(InputError, match=told):  # a meta-learner tries its first tasks before it trains
        bare(tmp_path, 1, **options).fit(meta(kind(3), problem=partial(FewShot, proximal=1.0)), sine())


class Tiny(FewShot):
    """A few-shot problem in units so large that its inner losses are about 1e-6."""

    def inner_loss(self, inner, outer, task, step):
        return 1e-6 * super().inner_loss(inner, outer, task, step)


def test_inner_gradients_do_not_underflow(tmp_path):
    def found(**precision):
        return gradients(tmp_path, meta(Unrolled(2), SGD(0.05e6), problem=Tiny), sine(), **precision)

    (full, told), (scaled, logged) = found(), found(**half())
    assert error(scaled, full) < 5e-3
    assert logged[0]["train/inner_grad_norm"] == pytest.approx(told[0]["train/inner_grad_norm"], rel=5e-3)
    problem, data = Tiny(network()), sine()
    data.setup("fit")
    task = task_at(data.draw("train", torch.arange(1)), 0)
    task = pytree_map(lambda leaf: leaf.float() if isinstance(leaf, torch.Tensor) else leaf, task)
    outer = {name: value.detach() for name, value in problem.outer().items()}
    full = flatten(problem.inner_grad(dict(outer), outer, task, 0))
    with torch.autocast("cpu", torch.half, cache_enabled=False):
        plain, scaled = (flatten(p.inner_grad(dict(outer), outer, task, 0)) for p in (problem, Scaled(problem, LARGE)))
    assert error(scaled, full) < 2e-3
    assert error(plain, full) > 0.02


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3, 1e6])
def test_the_scale_of_an_inner_loss_does_not_change_its_gradient(size):
    problem = PROBLEMS["bowl in 4-d"]
    task, outer = task_at(problem.tasks, 0), {"theta": problem.problem.theta.detach()}
    inner = {"theta": task.c + size}
    slopes = [
        vjp(lambda inner, posed=posed: posed.inner_grad(inner, outer, task, 0), inner)
        for posed in (problem.problem, Scaled(problem.problem, LARGE))
    ]
    values = [torch.cat([flatten(slope), flatten(pull_back(inner)[0])]) for slope, pull_back in slopes]
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0.0)


def test_true_gradients_are_clipped(tmp_path):
    module = meta(Unrolled(2), clip_norm=0.01)
    before = flatten(module.outer()).detach()
    bare(tmp_path, 1, **half()).fit(module, sine())
    assert float((flatten(module.outer()).detach() - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_the_default_optimizer_can_be_clipped(tmp_path):
    module = meta(Unrolled(2), clip_norm=0.01, optimizer=None)
    watch = Watch()
    bare(tmp_path, 2, callbacks=[watch], **half()).fit(module, sine())
    assert module.optimizers().param_groups[0]["fused"] is False
    assert len(watch.gradients) == 2


def test_clipping_with_a_fused_optimizer_is_refused_before_training(tmp_path):
    module = meta(Unrolled(2), clip_norm=0.01, optimizer=partial(torch.optim.Adam, fused=True))
    with pytest.raises(InputError, match=r"model\.optimizer: .*16-mixed.*fused Adam .*clip_norm=0\.01.*fused: false"):
        bare(tmp_path, 1, **half()).fit(module, sine())


@pytest.mark.parametrize("name", ["MAML", "cleaning, unrolled", "SAM"])
def test_a_scale_too_large_is_made_smaller_and_no_step_is_skipped_or_counted(tmp_path, name):
    make, data = LEARNERS[name]
    ends = []
    precision = half(2.0**40)
    for _ in range(2):
        module, watch = make(optimizer=partial(torch.optim.Adam, lr=0.01)), Watch()
        run = bare(tmp_path, 4, callbacks=[watch], **precision)
        run.fit(module, data())
        assert run.global_step == len(watch.gradients) == 4
        assert {float(state["step"]) for state in run.optimizers[0].state.values()} == {4}
        assert all(bool(torch.isfinite(gradient).all()) for gradient in watch.gradients)
        ends.append(module)
        scale = run.precision_plugin.scaler.get_scale()
        assert 1 <= scale < 2.0**40
        precision = half(scale)
    assert same(*ends)


def test_buffers_are_those_of_one_pass_where_a_batch_is_evaluated_again(tmp_path):
    ends = []
    for precision in ({"precision": "32-true"}, half(2.0**40)):
        torch.manual_seed(0)
        module = SupervisedLearner(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), optimizer=STEP)
        bare(tmp_path, 2, **precision).fit(module, rows())
        ends.append(dict(module.named_buffers()))
    full, found = ends
    assert int(found["network.1.num_batches_tracked"]) == int(full["network.1.num_batches_tracked"]) == 2
    torch.testing.assert_close(found["network.1.running_mean"], full["network.1.running_mean"], rtol=1e-2, atol=1e-3)


def test_all_groups_of_parameters_have_the_same_scale_where_it_grows(tmp_path):
    def found(growth):
        options = {"lr_by_name": {"*weight*": 0.05, "*": 0.02}, "optimizer": partial(torch.optim.SGD, lr=0.1)}
        return gradients(tmp_path, meta(Unrolled(2), **options), sine(), steps=4, **half(2.0**10, growth))[0]

    assert error(found(1), found(2000)) < 1e-3


def test_a_loss_that_is_not_finite_at_any_scale_stops_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="at outer step 1"):
        bare(tmp_path, 2, **half()).fit(meta(Unrolled(2), SGD(1e30)), sine())


@pytest.mark.parametrize("name", ["MAML", "cleaning, unrolled", "SAM"])
def test_the_scale_is_resumed(tmp_path, name):
    make, data = LEARNERS[name]
    options = {"optimizer": None, "scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)}
    if name.startswith("cleaning"):
        options["warm_start"] = True
    whole = make(**options)
    through = trainer(tmp_path / "whole", 7, **half(2.0**12, 3))
    through.fit(whole, data())
    run = trainer(tmp_path / "killed", 7, callbacks=[LastCheckpoint(seconds=0), Kill(4)], **half(2.0**12, 3))
    with pytest.raises(KilledError):
        run.fit(make(**options), data())
    again = make(**options)
    run = trainer(tmp_path / "killed", 7, **half(2.0**12, 3))
    run.fit(again, data(), ckpt_path=last(tmp_path / "killed"))
    assert same(whole, again)
    assert run.precision_plugin.scaler.get_scale() == through.precision_plugin.scaler.get_scale() == 2.0**14


def test_fused_steps_are_those_one_by_one(tmp_path):
    ends = [meta(Unrolled(2), fused_steps=steps) for steps in (1, 2)]
    for module in ends:
        bare(tmp_path, 4, log_every_n_steps=2, **half(2.0**40)).fit(module, sine())
    assert same(*ends)


def test_the_compiled_step_is_the_uncompiled_one(tmp_path):
    full, _ = gradients(tmp_path, meta(Unrolled(2)), sine())
    module = meta(Unrolled(2), compile=True)
    found, _ = gradients(tmp_path, module, sine(), **half())
    assert module.is_compiled
    assert error(found, full) < 2e-3


def test_evaluation_adapts_with_scaled_inner_gradients(tmp_path):
    module = meta(Unrolled(2), SGD(0.05e6), problem=Tiny)
    before = parameters(module)
    losses = []
    for precision in ({}, half()):
        bare(tmp_path, **precision).validate(module, sine(), verbose=False)
        losses.append(module.task_losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=5e-3)
    assert float((losses[0][:, 0] - losses[0][:, 2]).abs().max()) > 0.1
    assert all(torch.equal(value, before[name]) for name, value in parameters(module).items())


# ---- what a scale could hide, or spoil


class Endless(FewShot):
    """A loss that is infinite, with the gradient of one that is not."""

    def outer_loss(self, inner, outer, task):
        return super().outer_loss(inner, outer, task) + torch.inf


@pytest.mark.parametrize("precision", [{}, half(growth_interval=2)], ids=["32-true", "16-mixed"])
def test_a_loss_that_is_infinite_beside_a_finite_gradient_stops_the_run(tmp_path, precision):
    module = meta(Unrolled(2), problem=Endless, optimizer=partial(torch.optim.Adam, lr=0.01))
    run = bare(tmp_path, 3, log_every_n_steps=1, **precision)
    with pytest.raises(NonFiniteError, match="at outer step 1"):
        run.fit(module, sine())
    assert {float(state["step"]) for state in run.optimizers[0].state.values()} == {1}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_fused_optimizer_does_not_see_what_overflows(tmp_path, optimizer):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    ends, precision = [], half(2.0**40)
    for _ in range(2):
        module = meta(Unrolled(2), optimizer=partial(optimizer, lr=0.01, fused=True, **options))
        run = bare(tmp_path, 3, **precision)
        run.fit(module, sine())
        ends.append(module)
        precision = half(run.precision_plugin.scaler.get_scale())
    assert same(*ends)


class Slope(FewShot):
    """An inner loss that is linear in the predictions: 0 where they are, with a large gradient all the same."""

    def inner_loss(self, inner, outer, task, step):
        return -(self.predict(inner, outer, task.support.x) * task.support.y).mean()


def silent():
    """A network that says 0."""
    module = network()
    for parameter in list(module.parameters())[-2:]:
        nn.init.zeros_(parameter)
    return module


def test_an_inner_loss_of_0_with_a_large_gradient_trains(tmp_path):
    found = []
    for precision in ({}, half()):
        module = MetaLearner(Slope(silent()), SGD(0.05), Unrolled(2), optimizer=STEP)
        found.append(gradients(tmp_path, module, sine(), steps=3, **precision)[0])
    assert error(*found[::-1]) < 5e-3


def test_an_inner_loss_below_0_is_scaled_by_its_size():
    problem, phi = ThetaPhi([1.0], [1.0]), {"phi": torch.tensor([1e-3])}
    seen = []

    class Negative(ThetaPhi):
        def inner_loss(self, inner, outer, task, step):
            return -problem.inner_loss(inner, outer, task, step)

    for posed in (problem, Negative([1.0], [1.0])):
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            seen.append(Scaled(posed, LARGE).inner_grad(torch.tensor([1.0]), phi, None, 0))
    assert torch.equal(seen[0], -seen[1])
    assert float(seen[0]) == pytest.approx(2e-6, rel=1e-5)


def test_the_size_of_an_inner_loss_below_0_counts():
    class Down(ThetaPhi):
        """−θ, which is differentiated in half precision."""

        def inner_loss(self, inner, outer, task, step):
            return -inner.half().float().sum()

    slope = Scaled(Down([1.0], [1.0]), LARGE).inner_grad(torch.tensor([1.0]), {"phi": torch.tensor([1.0])}, None, 0)
    assert slope.item() == -1.0


def test_evaluation_takes_the_scale_that_training_found(tmp_path):
    def learner():
        return MetaLearner(Slope(silent()), SGD(0.05), Unrolled(2), optimizer=STEP)

    module, losses = learner(), []
    run = trainer(tmp_path, 3, **half())
    run.fit(module, sine())
    assert run.precision_plugin.scaler.get_scale() < 2.0**14
    for validated, path in ((module, None), (learner(), last(tmp_path))):
        bare(tmp_path, **half()).validate(validated, sine(), ckpt_path=path, verbose=False)
        assert bool(torch.isfinite(validated.task_losses).all())
        losses.append(validated.task_losses)
    assert torch.equal(*losses)


class Half(FewShot):
    """Whose losses are in half precision, as those of a network that ends in a mean may be."""

    def inner_loss(self, inner, outer, task, step):
        return super().inner_loss(inner, outer, task, step).half()

    def outer_loss(self, inner, outer, task):
        return super().outer_loss(inner, outer, task).half()


def test_losses_in_half_precision_are_scaled_in_single(tmp_path):
    full, _ = gradients(tmp_path, meta(Unrolled(2)), sine())
    module = meta(Unrolled(2), problem=Half)
    run = bare(tmp_path, 1, callbacks=[watch := Watch()], **half(2.0**17))
    run.fit(module, sine())
    assert error(watch.gradients[0], full[0]) < 5e-3
    assert Scaled(Half(network()), LARGE).scaled(torch.tensor(3.0).half()).item() == 3 * 2.0**16


def test_a_scaled_problem_has_what_the_problem_has():
    problem = FewShot(network())
    scaled = Scaled(problem, LARGE)
    assert scaled.outer().keys() == problem.outer().keys()
    assert scaled.predict == problem.predict
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = scaled.nothing_of_the_kind


@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_conjugate_gradients_keep_what_is_small(tmp_path, noise):
    given = regression(inputs=4).read()
    source = Given(given._replace(y=noise * given.y))
    found = []
    for precision in ({"precision": "64-true"}, half(2.0**12)):
        module = BilevelLearner(Ridge(4, -8.0), SGD(0.3), Implicit(60, CG(8)), optimizer=STEP)
        found.append(gradients(tmp_path, module, SplitsDataModule(source), **precision)[0][0])
    assert error(found[1], found[0]) < 1e-2


def test_the_logged_derivatives_are_true_ones(tmp_path):
    told = []
    for precision in ({}, half()):
        learner = bilevel(ThetaPhi([0.7, -1.2], [1.1, 0.4]), JTg(1), 0.01)
        told.append(gradients(tmp_path, learner, None, **precision)[1][0])
    assert told[0].keys() == told[1].keys()
    for name, value in told[0].items():
        assert told[1][name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


class Along(Perturbation):
    """α = the gradient itself, whose size counts."""

    def __call__(self, parameters, gradient, key):
        return gradient()


def test_perturbations_are_given_the_true_gradient(tmp_path):
    found = [gradients(tmp_path, supervised(Along()), rows(), **precision)[0] for precision in ({}, half())]
    assert error(*found[::-1]) < 5e-3


def test_a_pass_that_is_not_finite_is_seen_whatever_the_perturbation_makes_of_it(tmp_path):
    class Tamed(Perturbation):
        def __call__(self, parameters, gradient, key):
            return {name: torch.zeros_like(value) for name, value in gradient().items()}

    class Once(nn.Module):
        """Infinite in the first pass of every step."""

        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += self.training
            return self.linear(x) * (torch.inf if self.calls % 2 else 1.0)

    class Untried(SupervisedLearner):
        def on_fit_start(self):
            OuterLearner.on_fit_start(self)

    with pytest.raises(NonFiniteError, match="at outer step 1"):
        bare(tmp_path, 1).fit(Untried(Once(), None, Tamed(), optimizer=STEP), rows())


def test_all_that_adapts_is_scaled(tmp_path):
    """Where inner losses are about 1e-6, half precision alone adapts to nothing."""
    data, found = sine(), []
    data.setup("fit")
    tasks = data.draw("val", torch.arange(3))
    for precision in ({}, half()):
        module = meta(Unrolled(2), SGD(0.05e6), problem=Tiny)
        bare(tmp_path, **precision).validate(module, data, verbose=False)
        with module.trainer.precision_plugin.forward_context():
            adapted = module.adapt(tasks.support.x[0].float(), tasks.support.y[0].float())
            found.append([module.query_predictions(tasks).float(), adapted(tasks.query.x[0].float()).float()])
    for value, expected in zip(*found[::-1], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)


def test_pure_half_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"trainer\.precision='16-true' .*16-mixed"):
        bare(tmp_path, 1, precision="16-true").fit(meta(Unrolled(2)), sine())


def test_systems_are_solved_in_bfloat16_too(tmp_path):
    for inner, hypergradient in ((Newton(), Unrolled(1)), (SGD(0.3), Implicit(20, Dense()))):
        found = []
        for precision in ("32-true", "bf16-true"):
            module = BilevelLearner(Ridge(3, -1.0), inner, hypergradient, optimizer=STEP)
            found.append(gradients(tmp_path, module, SplitsDataModule(regression()), precision=precision)[0])
        assert error(*found[::-1]) < 0.1
