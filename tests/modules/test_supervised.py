"""The supervised learner under the Trainer: its steps are those of a loop by hand, plain, noisy and sharpness-aware."""

import copy
import math
import warnings
from functools import partial
from itertools import combinations

import pytest
import torch
from cases import draw
from fits import Kill, KilledError, bare, blobs, last, parameters, regression, same, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from metalit.autodiff import SAM, AdaptiveSAM, Perturbation, WeightNoise, gradient_at
from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.data import BatchDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.keys import fold
from metalit.modules import SupervisedLearner
from metalit.networks import MLP
from metalit.tree import leaves

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.01),
}
DECAY = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)


def batchnorm(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def mlp(*sizes, **options):
    torch.manual_seed(0)
    return MLP(sizes or [4, 8, 3], **options)


def classes(**options):
    return BatchDataModule(blobs(), **{"batch_size": 16, **options})


def batch(data, step):
    """In float64, the batch of a step."""
    if data.trainer is None:
        data.setup("fit")
    index = torch.arange(step * data.number, (step + 1) * data.number)
    return data.draw("train", index)


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


def noise(network, loss, number):
    weights = {name: value.detach() for name, value in network.named_parameters()}
    alpha = WeightNoise(0.1)(weights, dict, fold(torch.tensor(7), number))
    return list(alpha.values())


def sam(network, loss, number, rho=0.3):
    slopes = torch.autograd.grad(loss(), list(network.parameters()))
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    return [rho * slope / norm for slope in slopes]


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


def assert_equal_networks(network, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, **TIGHT)


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


def test_evaluation_uses_running_statistics_and_changes_nothing(tmp_path):
    network, data = batchnorm(), classes()
    module = SupervisedLearner(network)
    run = bare(tmp_path)
    run.fit(module, data)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    run.validate(module, data, verbose=False)
    points = data.splits.val
    with torch.no_grad():
        prediction = copy.deepcopy(network).eval()(points.x.float())
    assert module.scores["learned"]["loss"] == pytest.approx(float(F.cross_entropy(prediction, points.y)), rel=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training


def test_two_passes_are_one_step(tmp_path):
    module = SupervisedLearner(mlp(), None, SAM(0.1), scheduler=DECAY)
    run = trainer(tmp_path, steps=6)
    run.fit(module, classes())
    assert run.global_step == 6
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 6
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in logged["train/lr"]] == pytest.approx([1e-3 * 0.9**step for step in range(6)])


def test_logs_the_loss_at_the_weights_and_how_sharp_it_is(tmp_path):
    network, data = mlp(), classes()
    points = batch(data, 0)
    copied = copy.deepcopy(network).double()
    before = F.cross_entropy(copied(points.x), points.y)
    (alpha,) = [sam(copied, lambda: F.cross_entropy(copied(points.x), points.y), 0, 0.2)]
    weights = float(torch.cat([value.flatten() for value in copied.parameters()]).norm())
    for value, change in zip(copied.parameters(), alpha, strict=True):
        value.data += change
    after = F.cross_entropy(copied(points.x), points.y)
    slopes = torch.autograd.grad(after, list(copied.parameters()))
    expected = {
        "loss": float(before),
        "sharpness": float(after - before),
        "perturbation_norm": 0.2,
        "weight_norm": weights,
        "grad_norm": float(torch.cat([slope.flatten() for slope in slopes]).norm()),
    }
    trainer(tmp_path, steps=2, log_every_n_steps=1).fit(SupervisedLearner(network, None, SAM(0.2)), data)
    logged = scalars(tmp_path)
    for name, value in expected.items():
        assert logged[f"train/{name}"][0] == (1, pytest.approx(value, rel=1e-4)), name
    assert float(after) > float(before)


def test_noise_logs_its_size_alone(tmp_path):
    trainer(tmp_path, steps=2).fit(SupervisedLearner(mlp(), None, WeightNoise(0.1)), classes())
    logged = scalars(tmp_path)
    # 67 weights
    assert logged["train/perturbation_norm"][0][1] == pytest.approx(0.1 * 67**0.5, rel=0.3)
    assert "train/sharpness" not in logged


def test_plain_training_logs_no_perturbation(tmp_path):
    trainer(tmp_path, log_every_n_steps=2).fit(SupervisedLearner(mlp()), classes())
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["train/weight_norm"]] == [2, 4]
    assert not {"train/perturbation_norm", "train/sharpness"} & logged.keys()
    assert {"val/loss", "val/accuracy"} <= logged.keys()


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


# ---- evaluation


@pytest.mark.parametrize("size", [7, 30, 64])
def test_scores_are_means_over_rows_whatever_the_batches(size, tmp_path):
    data = BatchDataModule(blobs(spread=2.0), batch_size=size)
    module = SupervisedLearner(mlp()).double()
    run = bare(tmp_path, steps=2, precision="64-true")
    run.fit(module, data)
    for split, judge in (("val", run.validate), ("test", run.test)):
        judge(module, data, verbose=False)
        points = data.points(split)
        with torch.no_grad():
            prediction = module(points.x)
        accuracy = MulticlassAccuracy(3, average="micro")(prediction, points.y)
        assert module.scores == {
            "learned": {
                "loss": pytest.approx(float(F.cross_entropy(prediction, points.y)), rel=1e-12),
                "accuracy": pytest.approx(float(accuracy), rel=1e-6),
            }
        }
        assert 0 < module.scores["learned"]["accuracy"] < 1
        assert float(run.callback_metrics[f"{split}/loss"]) == pytest.approx(module.scores["learned"]["loss"], rel=1e-6)


def test_real_targets_have_no_accuracy(tmp_path):
    data = BatchDataModule(regression(), batch_size=7)
    module = SupervisedLearner(mlp(3, 1), optimizer=partial(torch.optim.SGD, lr=0.2)).double()
    run = trainer(tmp_path, steps=100, precision="64-true", val_check_interval=1.0, log_every_n_steps=1000)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    points = data.points("test")
    with torch.no_grad():
        expected = MeanSquaredError()(module(points.x), points.y)
    assert module.scores == {"learned": {"loss": pytest.approx(float(expected), rel=1e-6)}}
    assert float(expected) < 0.1
    logged = scalars(tmp_path)
    assert logged["test/loss"][0] == (100, pytest.approx(float(expected), rel=1e-5))
    assert "val/accuracy" not in logged


def test_a_loss_of_ones_own_and_rows_from_any_loader(tmp_path):
    x = draw(20, 3, seed=1).float()
    rows = DataLoader(list(zip(x, x[:, :2], strict=True)), batch_size=8)
    module = SupervisedLearner(mlp(3, 2), nn.L1Loss(reduction="none"))
    run = bare(tmp_path, steps=3)
    run.fit(module, rows, rows)
    with torch.no_grad():
        expected = (module(x) - x[:, :2]).abs().mean()
    assert module.scores["learned"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_rows_whose_loss_is_nan_count(tmp_path):
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.where(torch.arange(len(x)) == 0, torch.nan, 1.0)[:, None]

    module = SupervisedLearner(Broken(4, 3))
    bare(tmp_path).validate(module, classes(), verbose=False)
    assert math.isnan(module.scores["learned"]["loss"])


def test_what_is_not_finite_stops(tmp_path):
    module = SupervisedLearner(mlp(3, 1), optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(NonFiniteError, match=r"at outer step 2\. .*No checkpoint"):
        trainer(tmp_path, log_every_n_steps=100, steps=6).fit(module, BatchDataModule(regression()))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_fast_dev_run_and_no_validation(tmp_path):
    run = bare(tmp_path, fast_dev_run=True)
    run.fit(SupervisedLearner(batchnorm(), None, SAM()), classes())
    assert run.global_step == 1
    bare(tmp_path, limit_val_batches=0).fit(SupervisedLearner(mlp()), classes())


# ---- errors before anything is trained


REFUSED = {
    "width": (lambda: mlp(5, 3), None, classes, r"cannot take inputs of shape \(2, 4\), 4 column"),
    "classes": (lambda: mlp(4, 2), None, classes, r"\(2, 2\) for two rows.*one output for each of 3 classes"),
    "outputs": (lambda: mlp(3, 2), None, partial(BatchDataModule, regression()), r", 2\) and the targets \(\d+, 1\)"),
    "reduction": (mlp, nn.CrossEntropyLoss(), classes, 'reduction="none"'),
}  # fmt: skip


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name, sanity, tmp_path):
    network, loss, data, told = REFUSED[name]
    module = SupervisedLearner(network(), loss)
    before = parameters(module)
    run = bare(tmp_path, num_sanity_val_steps=sanity)
    with pytest.raises(InputError, match=told):
        run.fit(module, data())
    assert run.global_step == 0
    assert same(module.outer(), before)


def test_a_trial_leaves_no_trace(tmp_path):
    network = batchnorm()
    with pytest.raises(KilledError):
        bare(tmp_path, callbacks=[Kill(0)]).fit(SupervisedLearner(network), classes())
    assert int(network[1].num_batches_tracked) == 0
    assert float(network[1].running_mean.abs().max()) == 0
    # the trial takes two rows of training, where validation may have but one
    bare(tmp_path).fit(SupervisedLearner(batchnorm()), BatchDataModule(blobs(), batch_size=16, val=0.008))


def test_refused_at_once():
    with pytest.raises(InputError, match="Flatten has no parameter that could be trained"):
        SupervisedLearner(nn.Flatten())

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

    with pytest.raises(InputError, match="has trainable parameters"):
        SupervisedLearner(mlp(), Weighted())
    with pytest.raises(InputError, match="clip_norm=-1"):
        SupervisedLearner(mlp(), clip_norm=-1.0)


def test_a_trial_leaves_the_buffers_of_a_layer_under_two_names(tmp_path):
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 3))
    held = norm.running_mean
    bare(tmp_path, 1).fit(SupervisedLearner(network), classes())
    assert norm.running_mean is held


@pytest.mark.parametrize("perturbation", [None, WeightNoise(0.1), SAM(0.2)])
@pytest.mark.parametrize("rows", [1, 6, 16])
def test_chunks_of_rows_are_the_whole_batch(tmp_path, perturbation, rows):
    ends = []
    for chunk in (None, rows):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
        module = SupervisedLearner(network, None, perturbation, rows_per_chunk=chunk, optimizer=OPTIMIZERS["SGD"])
        trainer(tmp_path / str(chunk), 5, precision="64-true").fit(module, classes())
        ends.append((parameters(module), scalars(tmp_path / str(chunk))))
    (whole, told), (parts, logged) = ends
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, **TIGHT)
    assert logged.keys() == told.keys()
    for tag, values in told.items():
        assert [value for _, value in logged[tag]] == pytest.approx([value for _, value in values], rel=1e-6)


def test_chunks_of_no_rows_are_refused():
    with pytest.raises(InputError, match=r"model\.rows_per_chunk=0 must be at least 1"):
        SupervisedLearner(mlp(), rows_per_chunk=0)


class Tokens(nn.Module):
    """Drops from ``[rows · 3, 4]``, ``[rows, 3, 4]`` or ``[3, rows, 4]``, or whole channels of ``[rows, 3, 4]``."""

    def __init__(self, form):
        super().__init__()
        self.before, self.after, self.form = nn.Linear(4, 12), nn.Linear(12, 3), form
        self.dropout = nn.Dropout1d(0.5) if form == "channels" else nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.before(x).reshape(-1, 3, 4)
        if self.form == "flat":
            hidden = self.dropout(hidden.flatten(0, 1)).reshape(-1, 3, 4)
        elif self.form == "tokens first":
            hidden = self.dropout(hidden.transpose(0, 1)).transpose(0, 1)
        else:
            hidden = self.dropout(hidden)
        return self.after(hidden.flatten(1))


@pytest.mark.parametrize("form", ["flat", "rows first", "channels", "tokens first"])
def test_each_row_drops_what_it_would_drop_in_the_whole_batch(tmp_path, form):
    ends = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        module = SupervisedLearner(Tokens(form), rows_per_chunk=chunk, optimizer=OPTIMIZERS["SGD"])
        bare(tmp_path, 2, precision="64-true").fit(module, classes())
        ends.append(torch.cat([value.flatten() for value in parameters(module).values()]))
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-13) == (form != "tokens first")


def test_parts_of_a_batch_drop_apart_where_rows_do_not_come_first():
    def dropped(first, rows):
        network, key, masks = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)), torch.tensor(3), []
        gradient_at(network, lambda net: masks.append(net(torch.ones(7, rows, 1))) or masks[0].sum(), key=key,
                    rows=range(first, first + rows))  # fmt: skip
        return (masks[0] == 0).detach()

    whole, parts = dropped(0, 300), [dropped(first, 100) for first in (0, 100, 200)]
    assert not torch.equal(torch.cat(parts, 1), whole)
    for one, other in combinations(parts, 2):
        assert 0.4 < float((one == other).float().mean()) < 0.6
        # nor is one a shifted copy of the other
        assert not torch.equal(one.flatten()[100:], other.flatten()[:-100])


def test_batches_are_cut_into_chunks_that_batchnorm_can_take(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    bare(tmp_path, 2).fit(SupervisedLearner(network, rows_per_chunk=5), classes())
    assert int(network[1].num_batches_tracked) == 2 * 4  # 16 rows


class Full(nn.Module):
    """Does not take more than 8 rows, as long as it counts."""

    def __init__(self):
        super().__init__()
        self.counts = False

    def forward(self, x):
        if self.counts and self.training and len(x) > 8:
            raise torch.OutOfMemoryError
        return x


def test_buffers_are_those_of_one_pass_where_memory_ends_in_another(tmp_path):
    ends = []
    for full in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Full(), nn.Linear(8, 3))
        module = SupervisedLearner(network, rows_per_chunk=None if full else 8, optimizer=OPTIMIZERS["SGD"])
        begin = LambdaCallback(
            on_train_start=lambda *_, network=network, full=full: setattr(network[2], "counts", full)
        )
        bare(tmp_path, 2, callbacks=[begin]).fit(module, classes())
        assert module._estimates.tasks_per_chunk == 8
        ends.append(dict(network.named_buffers()) | parameters(module))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_optimizers_that_evaluate_the_loss_themselves_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"model\.optimizer: LBFGS evaluates the loss several times"):
        bare(tmp_path, 1).fit(SupervisedLearner(mlp(), optimizer=partial(torch.optim.LBFGS, lr=0.1)), classes())


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


class Penalised(nn.Module):
    """The squared error with a penalty on weights that it holds beside the network."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters_of = parameters

    def forward(self, prediction, target):
        return F.mse_loss(prediction, target, reduction="none") + sum(p.square().sum() for p in self.parameters_of())


def test_a_penalty_in_the_loss_is_part_of_the_gradient(tmp_path):
    network, data = mlp(3, 1), BatchDataModule(regression(), batch_size=7)
    by_network = Penalised(network.parameters)

    def loss(prediction, target):
        return F.mse_loss(prediction, target) + sum(p.square().sum() for p in copied.parameters())

    module = SupervisedLearner(network, by_network, optimizer=partial(torch.optim.SGD, lr=0.1)).double()
    copied = copy.deepcopy(module.network)
    bare(tmp_path, 1, precision="64-true").fit(module, data)
    points = batch(data, 0)
    slopes = torch.autograd.grad(loss(copied(points.x), points.y), list(copied.parameters()))
    for value, before, slope in zip(module.network.parameters(), copied.parameters(), slopes, strict=True):
        torch.testing.assert_close(value, before - 0.1 * slope, **TIGHT)


def test_a_loss_whose_gradient_would_be_lost_in_part_is_refused_before_training(tmp_path):
    network = mlp(3, 1)
    kept = list(network.parameters())
    run = bare(tmp_path, 1)
    with pytest.raises(InputError, match=r"loss: it reaches the module's 'out\.weight' by another way"):
        run.fit(SupervisedLearner(network, Penalised(lambda: kept)), BatchDataModule(regression(), batch_size=7))
    assert run.global_step == 0


def test_one_logit_for_two_classes_where_the_criterion_takes_it(tmp_path):
    class Binary(nn.BCEWithLogitsLoss):
        def forward(self, prediction, target):
            return super().forward(prediction[:, 0], target.double())

    network, data = mlp(4, 1), BatchDataModule(blobs(classes=2), batch_size=16)
    module = SupervisedLearner(network, Binary(reduction="none"), optimizer=partial(torch.optim.SGD, lr=0.1))
    run = bare(tmp_path, 20, precision="64-true")
    run.fit(module, data)
    run.test(module, data, verbose=False)
    points = data.points("test")
    right = ((module(points.x.double())[:, 0] > 0) == (points.y == 1)).double().mean()
    assert module.scores["learned"]["accuracy"] == pytest.approx(float(right))
    with pytest.raises(InputError, match="one output for each of 2 classes"):
        bare(tmp_path, 1).fit(SupervisedLearner(mlp(4, 1)), BatchDataModule(blobs(classes=2), batch_size=16))
