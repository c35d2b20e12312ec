"""The steps of the supervised learner are those of a loop by hand: plain, noisy and sharpness-aware."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from fits import Kill, KilledError, bare, blobs, last, parameters, same, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from supervised_learners import DECAY, OPTIMIZERS, assert_equal_networks, batch, batchnorm, classes, mlp, noise, sam
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from metalit.autodiff import SAM, AdaptiveSAM, Perturbation, WeightNoise
from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data import BatchDataModule
from metalit.modules import SupervisedLearner
from metalit.tree import leaves


def by_hand(network, data, optimizer, step, steps=5, scheduler=None, clip=None, loss=F.cross_entropy):
    """torch's own training loop, where ``step`` returns the point at which the gradient is taken, or nothing."""
    network = copy.deepcopy(network).double().train()
    optimizer = optimizer(network.parameters())
    scheduler = scheduler and scheduler(optimizer)
    for number in range(steps):
        points = batch(data, number)
        optimizer.zero_grad()
        weights = [value.detach().clone() for value in network.parameters()]
        buffers = None
        alpha = step(network, lambda points=points: loss(network(points.x), points.y), number)
        if alpha is not None:
            buffers = [value.clone() for value in network.buffers()]
            for value, change in zip(network.parameters(), alpha, strict=True):
                value.data += change
        optimizer.zero_grad()
        loss(network(points.x), points.y).backward()
        for value, held in zip(network.parameters(), weights, strict=True):
            value.data.copy_(held)
        # the second pass of SAM leaves no trace in the running statistics; noise has but one pass
        if alpha is not None and step is not noise:
            for value, held in zip(network.buffers(), buffers, strict=True):
                value.copy_(held)
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return network


def plain(network, loss, number):
    return None


def adaptive(network, loss, number, rho=0.3, eta=0.02):
    slopes = torch.autograd.grad(loss(), list(network.parameters()))
    size = [value.detach().abs() + eta for value in network.parameters()]
    norm = math.sqrt(sum(float((t * slope).square().sum()) for t, slope in zip(size, slopes, strict=True)))
    return [rho * t * t * slope / norm for t, slope in zip(size, slopes, strict=True)]


RULES = {
    "plain": (None, plain),
    "noise": (WeightNoise(0.1), noise),
    "SAM": (SAM(0.3), sam),
    "adaptive SAM": (AdaptiveSAM(0.3, 0.02), adaptive),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_a_loop_by_hand(rule, optimizer, tmp_path):
    perturbation, step = RULES[rule]
    network, data = batchnorm(), classes()
    expected = by_hand(network, classes(), OPTIMIZERS[optimizer], step, scheduler=DECAY, clip=0.8)
    module = SupervisedLearner(
        network, None, perturbation, 7, optimizer=OPTIMIZERS[optimizer], scheduler=DECAY, clip_norm=0.8
    ).double()
    run = bare(tmp_path, steps=5, precision="64-true")
    run.fit(module, data)
    assert run.global_step == 5
    assert_equal_networks(network, expected)
    assert int(network[1].num_batches_tracked) == 5
    assert float(network[1].running_mean.abs().max()) > 0


def test_noise_never_moves_the_weights_themselves(tmp_path):
    network = mlp()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(all(torch.equal(value, before[name]) for name, value in network.state_dict().items()))

    still = lambda groups: torch.optim.SGD(groups, lr=0.0)  # noqa: E731
    bare(tmp_path, callbacks=[Watch()]).fit(
        SupervisedLearner(network, None, WeightNoise(5.0), optimizer=still), classes()
    )
    assert seen == [True] * 4
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_noise_is_that_of_the_seed_and_the_step(tmp_path):
    def end(seed):
        module = SupervisedLearner(mlp(), None, WeightNoise(0.5), seed)
        bare(tmp_path, steps=2).fit(module, classes())
        return module

    assert same(end(1), end(1))
    assert not same(end(1), end(2))


def test_a_radius_of_zero_is_plain_training(tmp_path):
    ends = []
    for perturbation in (None, SAM(0.0), AdaptiveSAM(0.0)):
        network = batchnorm()
        bare(tmp_path).fit(SupervisedLearner(network, None, perturbation), classes())
        ends.append(network.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())


class Slope(nn.Module):
    def __init__(self, w=0.1):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return self.w * x


def test_sam_ends_in_a_two_cycle_on_a_parabola(tmp_path):
    # loss (wx)² with x = 1 has the curvature 2
    rows = DataLoader([(torch.ones(1, 1).double(), torch.zeros(1, 1).double())] * 61, batch_size=None)
    lr, rho = 0.3, 0.5
    a = 2 * lr
    module = SupervisedLearner(Slope(), None, SAM(rho), optimizer=partial(torch.optim.SGD, lr=lr)).double()
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *rest):
            seen.append(float(module.network.w))

    bare(tmp_path, 61, precision="64-true", callbacks=[Watch()]).fit(module, rows)
    assert seen[-1] == pytest.approx(-seen[-2], rel=1e-12)
    assert abs(seen[-1]) == pytest.approx(a * rho / (2 - a), rel=1e-12)


def test_the_gradient_is_asked_for_once(tmp_path):
    class Twice(Perturbation):
        def __call__(self, parameters, gradient, key):
            first, second = gradient(), gradient()
            assert first is second
            return {name: 0.1 * slope for name, slope in second.items()}

    network = batchnorm()
    bare(tmp_path, steps=3).fit(SupervisedLearner(network, None, Twice()), classes())
    assert int(network[1].num_batches_tracked) == 3


def test_a_perturbation_may_leave_parameters_out(tmp_path):
    network = mlp()
    bare(tmp_path).fit(SupervisedLearner(network, None, WeightNoise(0.1, "*.weight")), classes())


def test_two_passes_are_one_step(tmp_path):
    module = SupervisedLearner(mlp(), None, SAM(0.1), scheduler=DECAY)
    run = trainer(tmp_path, steps=6)
    run.fit(module, classes())
    assert run.global_step == 6
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 6
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in logged["train/lr"]] == pytest.approx([1e-3 * 0.9**step for step in range(6)])


def test_outer_rates_by_name(tmp_path):
    network = mlp()
    before = parameters(SupervisedLearner(network))
    rates = {"network.out.*": 0.0, "*.bias": 0.02}
    module = SupervisedLearner(network, lr_by_name=rates, optimizer=partial(torch.optim.SGD, lr=0.1))
    run = trainer(tmp_path, steps=1, val_check_interval=1.0)
    run.fit(module, classes())
    after = parameters(module)
    assert torch.equal(before["network.out.weight"], after["network.out.weight"])
    assert not torch.equal(before["network.hidden1.weight"], after["network.hidden1.weight"])
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.0, 0.02]


def test_a_plateau_scheduler_steps_once_for_each_validation(tmp_path):
    make = partial(ReduceLROnPlateau, monitor="val/accuracy", patience=0, threshold=1e9)
    module = SupervisedLearner(mlp(), scheduler=make)
    trainer(tmp_path).fit(module, classes())
    assert [value for _, value in scalars(tmp_path)["train/lr"]] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize("perturbation", [None, SAM(0.1)], ids=["plain", "SAM"])
def test_autocast_keeps_weights_and_gradients_in_float32(perturbation, tmp_path):
    network, seen = batchnorm(), []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.extend(parameter.grad.dtype for _, parameter in leaves(module.outer()))

    def dtype(module, inputs, output):
        seen.append(output.dtype)

    network[0].register_forward_hook(dtype)
    adam = partial(torch.optim.Adam, lr=0.05)
    module = SupervisedLearner(network, None, perturbation, optimizer=adam)
    bare(tmp_path, 40, precision="bf16-mixed", callbacks=[Watch()], val_check_interval=1.0).fit(module, classes())
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    # stale casts of the weights would learn nothing
    assert module.scores["learned"]["accuracy"] > 0.7


RESUMED = {
    "dropout and noise": lambda: SupervisedLearner(
        mlp(dropout=0.3), None, WeightNoise(0.05), scheduler=DECAY, optimizer=OPTIMIZERS["SGD"]
    ),
    "dropout and SAM": lambda: SupervisedLearner(mlp(dropout=0.3), None, SAM(0.1), optimizer=OPTIMIZERS["Adam"]),
    "BatchNorm and SAM": lambda: SupervisedLearner(
        batchnorm(), None, SAM(0.1), scheduler=partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=0.9)
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(name, tmp_path):
    def fit(root, *callbacks, ckpt=None):
        module = RESUMED[name]()
        # other numbers of the global generator, which nothing may depend on
        torch.manual_seed(hash(str(root)) % 1000)
        run = trainer(root, steps=6, callbacks=[BestCheckpoint(), LastCheckpoint(seconds=0.0), *callbacks])
        run.fit(module, classes(), ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    for stop in (2, 3):
        root = tmp_path / str(stop)
        with pytest.raises(KilledError):
            fit(root, Kill(stop))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the checkpoint keeps")
            resumed = fit(root, ckpt=last(root))
        state = resumed.network.state_dict()
        assert all(torch.equal(value, state[path]) for path, value in whole.network.state_dict().items())
        assert whole.scores == resumed.scores


def test_dropout_is_at_work_and_the_same_in_both_passes(tmp_path):
    masks = []

    class Seen(nn.Module):
        def forward(self, x):
            masks.append(x.detach() == 0)
            return x

    network = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), Seen(), nn.Linear(32, 3))
    run = bare(tmp_path, steps=2, num_sanity_val_steps=0, limit_val_batches=0)
    run.fit(SupervisedLearner(network, None, SAM(0.1)), classes())
    _, *passes = masks  # less that of the trial
    assert len(passes) == 4
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[2], passes[3])
    assert not torch.equal(passes[0], passes[2])
    assert 0.4 < float(passes[0].float().mean()) < 0.6


class Odd(nn.Module):
    """A frozen layer, one without use, and two of one weight, or one layer under two names."""

    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.again = self.tied if shared else nn.Linear(4, 4)
        self.again.weight = self.tied.weight
        self.unused = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.again(self.tied(self.frozen(x)).relu()).relu())


@pytest.mark.parametrize("shared", [False, True], ids=["one weight", "one layer"])
@pytest.mark.parametrize("rule", ["plain", "SAM"])
def test_frozen_tied_and_unused_parameters(rule, shared, tmp_path):
    network = Odd(shared)
    module = SupervisedLearner(network, None, RULES[rule][0], optimizer=partial(torch.optim.SGD, lr=0.1)).double()
    before = copy.deepcopy(network)
    assert {name.split(".")[1] for name in parameters(module)} - {"again"} == {"tied", "unused", "out"}
    bare(tmp_path, steps=3, precision="64-true").fit(module, classes())
    # by hand, without the unused layer
    copied = copy.deepcopy(before)
    used = [value for name, value in copied.named_parameters() if name.split(".")[0] not in ("frozen", "unused")]
    for number in range(3):
        points = batch(classes(), number)
        loss = F.cross_entropy(copied(points.x), points.y)
        slopes = torch.autograd.grad(loss, used)
        if rule == "SAM":
            total = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
            held = [value.detach().clone() for value in used]
            for value, slope in zip(used, slopes, strict=True):
                value.data += 0.3 * slope / total
            slopes = torch.autograd.grad(F.cross_entropy(copied(points.x), points.y), used)
            for value, kept in zip(used, held, strict=True):
                value.data.copy_(kept)
        for value, slope in zip(used, slopes, strict=True):
            value.data -= 0.1 * slope
    assert_equal_networks(network, copied)
    assert torch.equal(network.frozen.weight, before.frozen.weight)


def test_fast_dev_run_and_no_validation(tmp_path):
    run = bare(tmp_path, fast_dev_run=True)
    run.fit(SupervisedLearner(batchnorm(), None, SAM()), classes())
    assert run.global_step == 1
    bare(tmp_path, limit_val_batches=0).fit(SupervisedLearner(mlp()), classes())


def test_buffers_that_share_memory_are_left_alone(tmp_path):
    class Shared(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("one", torch.ones(1).expand(3))

        def forward(self, x):
            return super().forward(x) * self.one

    bare(tmp_path, 2).fit(SupervisedLearner(Shared()), classes())


def test_dropout_in_attention_is_drawn_from_the_seed(tmp_path):
    ends = []
    for seed, chunk in ((0, None), (1, None), (2, 5), (3, 5)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
        network = nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3))
        module = SupervisedLearner(network, rows_per_chunk=chunk, optimizer=OPTIMIZERS["SGD"])
        data = BatchDataModule(blobs(inputs=8), batch_size=16)
        torch.manual_seed(seed)
        bare(tmp_path, 2, precision="64-true").fit(module, data)
        assert torch.initial_seed() == seed
        ends.append(torch.cat([value.flatten() for value in parameters(module).values()]))
    assert torch.equal(ends[0], ends[1])
    # parts of a batch draw apart, each from its own rows
    assert torch.equal(ends[2], ends[3])
    assert not torch.allclose(ends[2], ends[0])
