"""After a step of the supervised learner, a network is as after a forward pass of torch's own loop, bit for bit."""

import copy
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fits import bare
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from metalit.autodiff import SAM, WeightNoise
from metalit.modules import SupervisedLearner

STEPS = 12


class Mean(nn.Module):
    """The mean of what it saw, assigned anew, and how often, as a tensor and as a number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen = 0

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.calls += 1
            self.seen += 1
        return x - self.mean


class Grows(nn.Module):
    """A buffer of another shape after every pass, one that begins as None, one that is registered in a pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("history", torch.zeros(0))
        self.register_buffer("first", None)

    def forward(self, x):
        if self.training:
            self.history = torch.cat([self.history, x.detach().mean().reshape(1)])
            if self.first is None:
                self.first = x.detach().mean(0)
            if not hasattr(self, "scale"):
                self.register_buffer("scale", torch.ones(4))
            self.scale.mul_(0.9)
        return (x - self.first) * self.scale + self.history.mean()


class Twice(nn.Module):
    """A layer that stands at two places."""

    def __init__(self):
        super().__init__()
        shared = Mean()
        self.a, self.b = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 4))

    def forward(self, x):
        return self.b(self.a(x))


class Remembers(nn.Module):
    """Attributes of several kinds, and weights that it changes itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.sizes, self.last, self.box = [], None, SimpleNamespace(total=0.0)

    def forward(self, x):
        self.sizes.append(len(x))
        self.box.total += 1
        self.layer.weight.data.clamp_(-0.3, 0.3)
        self.last = self.layer(x)
        return self.last


class Scales(nn.Module):
    """Changes its input, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4)

    def forward(self, x):
        self.scale.mul_(0.99)
        x *= self.scale
        return x.sub_(1)


class Collects(nn.Module):
    """Keeps what it made in a dictionary, and in a list that is new in every pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.made = nn.Linear(4, 4), {"all": []}

    def forward(self, x):
        self.made["last"] = self.layer(x)
        self.made["all"].append(self.made["last"])
        self.recent = [self.made["last"]]
        return self.made["last"]


KINDS = {
    "mean": Mean,
    "grows": Grows,
    "twice": Twice,
    "remembers": Remembers,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "batch norm": lambda: nn.BatchNorm1d(4, momentum=None),
    "in place": Scales,
}


def made(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), KINDS[kind](), nn.Tanh(), nn.Linear(4, 2))


def rows():
    torch.manual_seed(1)
    return TensorDataset(torch.randn(48, 4) + 2, torch.randn(48, 2))


def loader():
    return DataLoader(rows(), batch_size=12)


def by_hand(network, steps, chunk=12):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
    x, y = rows().tensors
    for step in range(steps):
        begin = 12 * (step % 4)
        optimizer.zero_grad()
        for start in range(begin, begin + 12, chunk):
            part = slice(start, start + chunk)
            (F.mse_loss(network(x[part].clone()), y[part]) * chunk / 12).backward()
        optimizer.step()
    return network


def learner(network, **options):
    return SupervisedLearner(network, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5), **options)


def state(network):
    """All that a network holds: tensors, and attributes as they are written."""
    found = {}
    for path, layer in network.named_modules(remove_duplicate=False):
        for name, value in {**vars(layer), **layer._parameters, **layer._buffers}.items():
            if name.startswith("_") and not isinstance(value, torch.Tensor):
                continue
            found[path, name] = value.detach() if isinstance(value, torch.Tensor) else repr(value)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        equal = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert equal, name


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_after_torchs_own_loop(kind, tmp_path):
    network = made(kind)
    expected = by_hand(copy.deepcopy(network), STEPS)
    bare(tmp_path, STEPS).fit(learner(network), loader())
    assert_same(state(network), state(expected))
    copy.deepcopy(network)


def test_what_a_pass_collects_is_on_no_graph(tmp_path):
    network = nn.Sequential(Collects(), nn.Linear(4, 2))
    bare(tmp_path, 2).fit(learner(network), loader())
    layer = copy.deepcopy(network)[0]
    kept = [layer.made["last"], *layer.made["all"], *layer.recent]
    assert len(kept) == 4
    assert not any(value.requires_grad for value in kept)


@pytest.mark.parametrize("kind", ["mean", "grows", "remembers"])
def test_in_chunks_all_is_as_after_a_loop_over_the_chunks(kind, tmp_path):
    network = made(kind)
    expected = by_hand(copy.deepcopy(network), 1, chunk=4)
    bare(tmp_path, 1).fit(learner(network, rows_per_chunk=4), loader())
    found, expected = state(network), state(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value)
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("perturbation", [SAM(0.1), WeightNoise(0.01)])
def test_buffers_and_attributes_follow_one_pass(kind, perturbation, tmp_path):
    network, before = made(kind), []

    def begin(*_):
        before[:] = [copy.deepcopy(network)]

    def end(trainer, module, outputs, batch, *_):
        with torch.no_grad():
            before[0](batch[0].clone())
        found, expected = state(network), state(before[0])
        names = [
            name for name in expected if name[1] not in dict(network.named_parameters()) and "weight" not in name[1]
        ]
        # where the weights were moved first, what depends on them differs
        if isinstance(perturbation, SAM):
            names = [name for name in names if name[1] not in ("bias", "last", "original")]
            assert_same({name: found[name] for name in names}, {name: expected[name] for name in names})
        else:
            assert found.keys() == expected.keys()
            assert {name: str(found[name]) for name in names if name[1] in ("seen", "sizes", "calls")} == {
                name: str(expected[name]) for name in names if name[1] in ("seen", "sizes", "calls")
            }

    watch = LambdaCallback(on_train_batch_start=begin, on_train_batch_end=end)
    bare(tmp_path, 3, callbacks=[watch]).fit(learner(network, perturbation=perturbation), loader())


@pytest.mark.parametrize("kind", ["mean", "grows", "spectral norm", "batch norm"])
def test_a_resumed_run_ends_as_one_that_never_stopped(kind, tmp_path):
    whole = made(kind)
    bare(tmp_path, 8).fit(learner(whole), loader())
    first = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    bare(tmp_path, 4, enable_checkpointing=True, callbacks=[first]).fit(learner(made(kind)), loader())
    resumed = made(kind)
    bare(tmp_path, 8).fit(learner(resumed), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


class Full(nn.Module):
    """Has memory for 8 rows, as long as it counts."""

    counts = False

    def forward(self, x):
        if self.counts and self.training and len(x) > 8:
            raise torch.OutOfMemoryError
        return x


@pytest.mark.parametrize("kind", ["mean", "grows", "remembers", "in place"])
def test_an_evaluation_that_begins_anew_begins_from_where_it_was(kind, tmp_path):
    ends = []
    for full in (False, True):
        network = nn.Sequential(made(kind), Full())
        begin = LambdaCallback(
            on_train_start=lambda *_, network=network, full=full: setattr(network[1], "counts", full)
        )
        bare(tmp_path, 2, callbacks=[begin]).fit(learner(network, rows_per_chunk=None if full else 8), loader())
        network[1].counts = False
        ends.append(state(network))
    assert_same(*ends)


def test_both_passes_see_the_same_inputs_and_the_data_stays(tmp_path):
    data, seen = rows(), []

    class Shifts(nn.Linear):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x.mul_(2))

    before = data.tensors[0].clone()
    # batches that are views of the table
    batches = [(data.tensors[0][:12], data.tensors[1][:12])]
    module = learner(Shifts(4, 2), perturbation=SAM(0.1))
    bare(tmp_path, 2).fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    module(data.tensors[0])
    assert torch.equal(data.tensors[0], before)
    assert all(torch.equal(x, before[:12]) for x in seen[:-1])
    assert len(seen) >= 2 * 2 + 1


class Random(nn.Module):
    """Draws from every generator that there is, and from one of its own."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator()

    def forward(self, x):
        x = x * (1 + torch.rand_like(x)) + random.random() + torch.rand(4, generator=self.own)
        return F.alpha_dropout(x, 0.3, self.training) if self.training else x


@pytest.mark.parametrize("chunk", [None, 5])
def test_whatever_a_network_draws_follows_seed_and_step(chunk, tmp_path):
    ends = []
    for seed in (0, 1):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), Random(), nn.Linear(4, 2))
        module, data = learner(network, perturbation=SAM(0.1), rows_per_chunk=chunk, seed=3), loader()
        torch.manual_seed(seed)
        random.seed(seed)
        bare(tmp_path, 3, num_sanity_val_steps=0).fit(module, data)
        assert torch.initial_seed() == seed
        ends.append(network.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)
