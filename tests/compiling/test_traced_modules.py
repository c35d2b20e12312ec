"""What tracing and compiling leave in the user's module, which is nothing; and programs that stay small."""

import copy

import pytest
import torch
from fits import bare
from torch import nn
from torch._inductor.loop_body import LoopBody
from torch._subclasses import FakeTensor
from torch.func import grad
from torch.nn.utils import parametrizations

from metalit.compiling import program
from metalit.compiling.compiled import Compiled
from metalit.compiling.loops import repeated
from metalit.data import Episodes, Sine, TaskDataModule
from metalit.hypergradients import Unrolled
from metalit.inner import SGD
from metalit.keys import fold, uniform
from metalit.modules import MetaLearner
from metalit.problems import FewShot


class Aliases(nn.Module):
    """Layers under several names, nested ones too, a tied weight, a parametrization, and what forward keeps."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.three = self.one
        self.block = nn.Sequential(self.one, nn.Sequential(nn.Tanh(), parametrizations.orthogonal(nn.Linear(3, 3))))
        self.again = self.block[1]
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.own = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("shift", torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.cache = {}
        self.kept = None

    def forward(self, x):
        x = self.three(self.block(self.two(x))) + self.again(self.tied(x)) @ self.own
        self.shift = self.shift + x.detach().mean(0)
        self.kept = self.cache["x"] = x
        return x + self.shift


def held(module):
    """All tensors of the module's layers, by owner and name, and their values."""
    return {
        (number, name): value
        for number, layer in enumerate(module.modules())
        for name, value in {**layer._parameters, **layer._buffers}.items()
        if value is not None
    }


@pytest.fixture
def traced(monkeypatch):
    """The traced graph in place of a compiled program, which is of no account here."""
    monkeypatch.setattr(program, "compile_graph", lambda graph, _: lambda tensors: graph(*tensors))


def slope(module):
    return grad(lambda x: module(x).square().sum())


def check_as_before(module, before, values):
    after = held(module)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] is value, name
        assert torch.equal(value, values[name])
    for layer in module.modules():
        assert not any(isinstance(value, FakeTensor) for value in layer.__dict__.values())
    assert module.two is module.three is module.one
    assert module.kept is None
    assert module.cache == {}


def fails(*_, **__):
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("compiler", [None, fails], ids=["it succeeds", "it fails"])
def test_a_module_is_as_before(compiler, traced, monkeypatch):
    if compiler is not None:
        monkeypatch.setattr(program, "compile_graph", compiler)
    torch.manual_seed(0)
    module = Aliases().requires_grad_(False)
    expected, x = copy.deepcopy(module), torch.randn(2, 3)
    before = held(module)
    values = {name: value.clone() for name, value in before.items()}
    compiled = Compiled(slope(module), module, tell=lambda line: None)
    found = compiled.program([x], torch.utils._pytree.tree_flatten((x,))[1])([x])[0]
    assert compiled.failed == (compiler is not None)
    if not compiled.failed:
        check_as_before(module, before, values)
        copy.deepcopy(module)
    torch.testing.assert_close(found, slope(expected)(x))


def test_a_module_is_as_before_where_it_cannot_be_traced(traced):
    class Decides(Aliases):
        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x) if float(self.two(x).sum()) < torch.inf else x

    module = Decides().requires_grad_(False)
    before = held(module)
    values = {name: value.clone() for name, value in before.items()}
    compiled = Compiled(lambda x: 2 * module(x), module, tell=lambda line: None)
    leaves, spec = torch.utils._pytree.tree_flatten((torch.randn(2, 3),))
    compiled.program(leaves, spec)
    assert compiled.failed
    check_as_before(module, before, values)


class Twice(nn.Module):
    """One layer under two names, and in a list."""

    def __init__(self):
        super().__init__()
        self.begin, self.middle, self.end = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.same = self.middle
        self.layers = nn.ModuleList([self.middle, nn.Tanh(), self.same])

    def forward(self, x):
        x = torch.tanh(self.same(torch.tanh(self.begin(x))))
        for layer in self.layers:
            x = layer(x)
        return self.end(self.middle(x))


@pytest.mark.parametrize("fused", [1, 3])
def test_a_learner_of_a_layer_under_several_names_ends_where_the_plain_one_does(fused, traced, tmp_path):
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        network = Twice().double()
        learner = MetaLearner(
            FewShot(network), SGD(0.1), Unrolled(1), eval_steps=1, compile=compiles, fused_steps=fused
        )
        data = TaskDataModule(Sine(), *[Episodes(2, 5, 5)] * 3)
        before = held(network)
        run = bare(tmp_path, 6, log_every_n_steps=6, precision="64-true", limit_val_batches=0)
        run.fit(learner, data)
        assert learner.is_compiled == compiles  # also false where it was given up
        after = held(network)
        assert all(after[name] is value for name, value in before.items())
        found.append({name: value.detach().clone() for name, value in copy.deepcopy(network).named_parameters()})
    plain, compiled = found
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-10, atol=1e-12)


# ---- the size of programs


def test_a_hash_in_a_loop_is_not_written_out_again_and_again(monkeypatch):
    """Each of its steps uses a value twice: written out every time, that is 2 to the power of the steps."""
    begin, sizes = LoopBody.__init__, []

    def counted(body, *rest, **options):
        begin(body, *rest, **options)
        sizes.append(len(body.root_block.graph.nodes))
        if sizes[-1] > 1000:
            raise RuntimeError("it grows without end")

    monkeypatch.setattr(LoopBody, "__init__", counted)

    def drawn(count, keys):
        def step(number, going, known):
            key = known.index_select(0, number.reshape(1)).squeeze(0)
            once, _, less = going
            # what is equal before the loop, or after each step, is one tensor in the program
            return once + uniform(fold(key, 3), 4), once + uniform(fold(key, 3), 4), less - uniform(fold(key, 3), 4)

        return repeated(step, count, tuple(torch.zeros(4, dtype=torch.float64) for _ in range(3)), keys)

    said = []
    compiled = Compiled(drawn, tell=said.append)
    count, keys = torch.tensor(5), torch.arange(5)
    found = compiled(count, keys)
    assert not compiled.failed, said
    # sums of the very same numbers
    total = uniform(fold(keys, 3), 4).sum(0)
    torch.testing.assert_close(found, (total, total, -total), rtol=1e-15, atol=0)
