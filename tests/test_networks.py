"""A walk over networks of every kind of layer: right, as a plain loop says, or refused with the way out.

Each is meta-learned in second and in first order, differentiated row by row and at SAM's point, and is exactly as it
was afterwards.
"""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from metalit.adapt import outer_variable
from metalit.autodiff import SAM, per_sample_gradients, perturbed_gradient
from metalit.compiling.compiled import Compiled
from metalit.errors import InputError
from metalit.hypergradients import FirstOrder, Unrolled, over_tasks
from metalit.inner import SGD
from metalit.problem import Points, Task
from metalit.problems import FewShot

LR, STEPS, RHO = 0.1, 2, 0.05


class Fn(nn.Module):
    """Any function of what comes in, and of the layers that it is given."""

    def __init__(self, fn, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.fn = fn

    def forward(self, x):
        return self.fn(x, *self.layers)


def to(*shape):
    return nn.Unflatten(1, shape)


def through(layer, shape, outputs, inputs=4):
    """A layer of inputs ``shape`` and so many outputs, between two linear ones."""
    count = torch.Size(shape).numel()
    return nn.Sequential(nn.Linear(inputs, count), to(*shape), layer, nn.Flatten(), nn.Linear(outputs, 2))


def acted(*layers):
    parts = [part for layer in layers for part in (nn.Linear(4, 4), layer)]
    return nn.Sequential(*parts, nn.Linear(4, 2))


def words(layer, outputs=4):
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(outputs, 2))


def tokens(layer, pick=lambda y: y, outputs=4):
    """A layer of sequences of three tokens."""
    return nn.Sequential(nn.Linear(4, 12), to(3, 4), Fn(lambda x, f: pick(f(x)).mean(1), layer), nn.Linear(outputs, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Stateful(nn.Module):
    """Buffers that are read, changed in place and assigned anew, and attributes that stay behind."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.last = None

    def forward(self, x):
        y = self.layer(x) * self.scale + 0.1 * self.mean
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.last = y
        return torch.tanh(y)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.more = nn.ParameterDict({"out": torch.randn(4, 2)})
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.more["out"] + self.frozen


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope):
        return 3 * slope * ctx.saved_tensors[0] ** 2


class OldCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        return 3 * slope * ctx.saved_tensors[0] ** 2


def filled(x, layer):
    out = torch.zeros(len(x), 2, dtype=x.dtype)
    out[:, :] = layer(x)
    return out


def hooked():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    network[0].register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    network[1].register_forward_hook(lambda layer, given, found: found**2)
    return network


def lazy():
    network = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    network(torch.zeros(2, 4))
    return network


def unpooled():
    def both(x, pool, back):
        return back(*pool(x))

    return through(Fn(both, nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)), (1, 4, 4), 16)


def scaled_by(x, distance):
    return x * distance(x, x + 1)[:, None]


def attention(**options):
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


def cell(kind, pick=lambda state: state):
    def run(x, layer):
        state = None
        for _ in range(2):
            state = layer(x, state)
        return pick(state)

    return nn.Sequential(Fn(run, kind(4, 3)), nn.Linear(3, 2))


def decoder(x, layer):
    return layer(x, torch.sin(x))


FLOATS = {
    "Linear": lambda: nn.Linear(4, 2),
    "Bilinear": lambda: Fn(lambda x, layer: layer(x, x), nn.Bilinear(4, 4, 2)),
    "residual": lambda: nn.Sequential(Fn(lambda x, a: x + torch.relu(a(x)), nn.Linear(4, 4)), nn.Linear(4, 2)),
    "Conv1d": lambda: through(nn.Conv1d(2, 3, 2, padding=1, padding_mode="circular"), (2, 3), 12),
    "Conv2d": lambda: through(nn.Conv2d(2, 4, 3, groups=2, dilation=1, padding="same"), (2, 3, 3), 36),
    "Conv3d": lambda: through(nn.Conv3d(1, 2, 2), (1, 2, 3, 2), 4),
    "ConvTranspose1d": lambda: through(nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 3), 18),
    "ConvTranspose2d": lambda: through(nn.ConvTranspose2d(1, 2, 2, output_padding=1, stride=2), (1, 2, 2), 50),
    "ConvTranspose3d": lambda: through(nn.ConvTranspose3d(1, 1, 2), (1, 2, 2, 2), 27),
    "MaxPool": lambda: nn.Sequential(through(nn.MaxPool1d(2), (1, 6), 3), through(nn.MaxPool2d(2), (1, 4, 4), 4, 2)),
    "MaxPool3d": lambda: through(nn.MaxPool3d(2), (1, 2, 4, 2), 2),
    "AvgPool": lambda: nn.Sequential(through(nn.AvgPool1d(2), (1, 6), 3), through(nn.AvgPool3d(2), (1, 2, 2, 2), 1, 2)),
    "LPPool": lambda: through(nn.LPPool2d(2, 2), (1, 4, 4), 4),
    "AdaptiveAvgPool2d": lambda: through(nn.AdaptiveAvgPool2d(2), (1, 3, 5), 4),
    "AdaptiveMaxPool1d": lambda: through(nn.AdaptiveMaxPool1d(2), (1, 5), 2),
    "MaxUnpool2d": unpooled,
    "LayerNorm": lambda: acted(nn.LayerNorm(4)),
    "GroupNorm": lambda: through(nn.GroupNorm(2, 4), (4, 3), 12),
    "InstanceNorm": lambda: through(nn.InstanceNorm1d(2, affine=True), (2, 4), 8),
    "LocalResponseNorm": lambda: through(nn.LocalResponseNorm(2), (3, 4), 12),
    "RMSNorm": lambda: acted(nn.RMSNorm(4)),
    "orthogonal": lambda: acted(parametrizations.orthogonal(nn.Linear(4, 4))),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "spectral_norm": lambda: acted(parametrizations.spectral_norm(nn.Linear(4, 4))),
    "RNN": lambda: tokens(nn.RNN(4, 3, batch_first=True), lambda y: y[0], 3),
    "LSTM": lambda: tokens(nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True), lambda y: y[0]),
    "GRU": lambda: tokens(nn.GRU(4, 3, batch_first=True), lambda y: y[0], 3),
    "RNNCell": lambda: cell(nn.RNNCell),
    "LSTMCell": lambda: cell(nn.LSTMCell, lambda state: state[0]),
    "GRUCell": lambda: cell(nn.GRUCell),
    "attention": lambda: tokens(Fn(lambda x, layer: layer(x, x, x, need_weights=False)[0], attention())),
    "attention, weights": lambda: tokens(Fn(lambda x, f: f(x, x, x)[0], attention(add_bias_kv=True))),
    "attention, causal": lambda: tokens(Fn(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))),
    "TransformerEncoder": lambda: tokens(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), 2, enable_nested_tensor=False)
    ),
    "TransformerDecoderLayer": lambda: tokens(Fn(decoder, nn.TransformerDecoderLayer(4, 2, 6, 0.0, batch_first=True))),
    "Transformer": lambda: tokens(Fn(decoder, nn.Transformer(4, 2, 1, 1, 6, 0.0, batch_first=True))),
    "PixelShuffle": lambda: through(nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)), (4, 2, 2), 16),
    "ChannelShuffle": lambda: through(nn.ChannelShuffle(2), (4, 3), 12),
    "Upsample": lambda: through(nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 3), 24),
    "Upsample, nearest": lambda: through(nn.Upsample(scale_factor=2), (2, 3), 12),
    "padding": lambda: through(nn.Sequential(nn.ReflectionPad2d(1), nn.ZeroPad2d(1)), (1, 3, 3), 49),
    "Fold": lambda: through(nn.Sequential(nn.Unfold(2), nn.Fold((3, 3), 2)), (1, 3, 3), 9),
    "dropouts in evaluation": lambda: acted(nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)).eval(),
    "RReLU in evaluation": lambda: acted(nn.RReLU()).eval(),
    "PReLU": lambda: acted(nn.PReLU(), nn.PReLU(4)),
    "GLU": lambda: nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)),
    "softmax": lambda: acted(nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1)),
    "smooth activations": lambda: acted(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Tanh(), nn.Sigmoid()),
    "more activations": lambda: acted(nn.CELU(), nn.SELU(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink()),
    "cornered activations": lambda: acted(nn.ReLU(), nn.LeakyReLU(), nn.Hardswish(), nn.Hardtanh(), nn.ELU()),
    "hard activations": lambda: acted(nn.ReLU6(), nn.Softshrink(0.1), nn.Hardshrink(0.1)),
    "in-place activations": lambda: acted(nn.ReLU(inplace=True), nn.SiLU(inplace=True)),
    "CosineSimilarity": lambda: nn.Sequential(nn.Linear(4, 2), Fn(scaled_by, nn.CosineSimilarity())),
    "PairwiseDistance": lambda: nn.Sequential(nn.Linear(4, 2), Fn(scaled_by, nn.PairwiseDistance())),
    "lazy, once called": lazy,
    "parameters in lists": Parts,
    "tied weights": Tied,
    "one layer twice": Twice,
    "hooks": hooked,
    "FFT": lambda: acted(Fn(lambda x: torch.fft.rfft(x).abs()[:, [0, 1, 2, 1]])),
    "sorting": lambda: nn.Sequential(nn.Linear(4, 4), Fn(lambda x: x.sort(1)[0].cumsum(1).topk(2)[0])),
    "einsum": lambda: nn.Sequential(nn.Linear(4, 4), Fn(lambda x: torch.einsum("ri,rj->ri", x, x)), nn.Linear(4, 2)),
    "a function of one's own": lambda: nn.Sequential(nn.Linear(4, 2), Fn(Cube.apply)),
    "branches": lambda: Fn(lambda x, a, b: a(x) if x.sum() > 0 else b(x).tanh(), nn.Linear(4, 2), nn.Linear(4, 2)),
    "reads a value": lambda: Fn(lambda x, a: a(x) * x.max().item(), nn.Linear(4, 2)),
    "fills zeros": lambda: Fn(filled, nn.Linear(4, 2)),
    "state": Stateful,
}  # fmt: skip
INTEGERS = {
    "Embedding": lambda: words(nn.Embedding(5, 2, padding_idx=0)),
    "Embedding(max_norm)": lambda: words(nn.Embedding(5, 2, max_norm=0.5)),
    "Embedding(scale_grad_by_freq)": lambda: words(nn.Embedding(5, 2, scale_grad_by_freq=True)),
}
MIXING = {  # of rows, so that no row has a gradient of its own
    "BatchNorm1d": lambda: acted(nn.BatchNorm1d(4)),
    "BatchNorm2d": lambda: through(nn.BatchNorm2d(2, momentum=None), (2, 2, 2), 8),
    "BatchNorm3d": lambda: through(nn.BatchNorm3d(1, affine=False), (1, 2, 2, 2), 8),
}
NO_ROWS = {  # what has no derivatives of single rows, and why
    tuple(MIXING): "BatchNorm mixes the rows",
    ("branches", "reads a value"): "decides by the value of a tensor",
    ("fills zeros", "Embedding(max_norm)"): "changes a tensor in place",
}
ALL = {**FLOATS, **INTEGERS, **MIXING}


def made(name):
    torch.manual_seed(len(name))
    return ALL[name]().double()


def rows(name, tasks, count, seed):
    torch.manual_seed(seed)
    x = torch.randint(5, (tasks, count, 2)) if name in INTEGERS else torch.randn(tasks, count, 4).double()
    return Points(x, torch.randn(tasks, count, 2).double())


def batch(name):
    return Task(rows(name, 2, 4, 1), rows(name, 2, 3, 2), torch.arange(2))


class WeightNorm(TorchFunctionMode):
    """Its formula: the second derivative of torch's own is wrong on CPUs."""

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        if fn is torch._weight_norm:
            v, g, dim = args
            return v * (g / v.square().sum([place for place in range(v.dim()) if place != dim], keepdim=True).sqrt())
        return fn(*args, **(kwargs or {}))


def plain(network, parameters, x):
    """A copy of the network at copies of other parameters: a forward pass may change what it is given."""
    with WeightNorm():
        copies = {name: value.clone() for name, value in parameters.items()}
        return functional_call(copy.deepcopy(network), copies, (x.clone(),))


def slopes(loss, parameters, **options):
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, **options)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(parameters.items(), found, strict=True)}


def free(network):
    return {n: v.detach().clone().requires_grad_() for n, v in network.named_parameters() if v.requires_grad}


def by_loop(network, tasks, first_order):
    """The meta-gradient by nothing but ``torch.autograd``, task after task."""
    total, own = 0.0, free(network)
    for number in range(2):
        (sx, sy), (qx, qy) = ((part.x[number], part.y[number]) for part in tasks[:2])
        theta = own
        for _ in range(STEPS):
            step = slopes((plain(network, theta, sx) - sy).square().mean(), theta, create_graph=not first_order)
            theta = {n: v - LR * (step[n].detach() if first_order else step[n]) for n, v in theta.items()}
        total = total + (plain(network, theta, qx) - qy).square().mean() / 2
    return slopes(total, own)


def snapshot(network):
    return (
        {n: v.detach().clone() for n, v in network.state_dict().items()},
        {n: id(v) for n, v in (*network.named_parameters(), *network.named_buffers())},
        [layer.training for layer in network.modules()],
    )


def is_picklable(network):
    try:
        return bool(pickle.dumps(network))
    except (AttributeError, RuntimeError, pickle.PicklingError):
        return False


@pytest.fixture
def quiet():
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "tasks are evaluated one after the other")
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ALL)
def test_a_network_is_right_in_every_derivative_and_left_as_it_was(name):
    network, tasks = made(name), batch(name)
    reference = copy.deepcopy(network)
    before, pickled = snapshot(network), is_picklable(network)
    problem = FewShot(network)
    outer = outer_variable(problem, SGD(LR))
    outer = {"problem": {n: v.detach() for n, v in outer["problem"].items()}, "optimizer": {}}
    for kind in (Unrolled(STEPS), FirstOrder(STEPS)):
        found = over_tasks(kind, problem, SGD(LR), outer, tasks).gradient["problem"]
        expected = by_loop(reference, tasks, isinstance(kind, FirstOrder))
        assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=lambda told, kind=kind: f"{kind}: {told}")

    x, y = tasks.support.x[0], tasks.support.y[0]
    told = next((told for names, told in NO_ROWS.items() if name in names), None)
    per_row = partial(per_sample_gradients, network, x, y, loss=F.mse_loss)
    if told:
        with pytest.raises(InputError, match=told):
            per_row()
    else:
        found, own = per_row(), free(reference)
        for row in range(4):
            expected = slopes((plain(reference, own, x[row : row + 1])[0] - y[row]).square().mean(), own)
            assert_close({n: v[row] for n, v in found.items()}, expected, rtol=1e-9, atol=1e-10)

    found, own = (
        perturbed_gradient(network, lambda f: (f(x.clone()) - y).square().mean(), SAM(RHO)).gradient,
        free(reference),
    )
    first = slopes((plain(reference, own, x) - y).square().mean(), own)
    size = torch.cat([value.flatten() for value in first.values()]).norm()
    moved = {n: (v + RHO * first[n] / size).detach().requires_grad_() for n, v in own.items()}
    expected = slopes((plain(reference, moved, x) - y).square().mean(), moved)
    assert_close(found, expected, rtol=1e-7, atol=1e-9)

    after = snapshot(network)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
    assert_close(copy.deepcopy(network).state_dict(), before[0], rtol=0, atol=0)
    assert is_picklable(network) == pickled


REFUSED = {
    "checkpointed": (
        lambda: Fn(lambda x, a: checkpoint(a, x, use_reentrant=False), acted(nn.Tanh())),
        r"^problem: torch\.utils\.checkpoint cannot be differentiated here; .* Recomputed",
    ),
    "a function with ctx in forward": (
        lambda: nn.Sequential(nn.Linear(4, 2), Fn(OldCube.apply)),
        r"^problem: a torch\.autograd\.Function of its own, or of its network, needs .* setup_context",
    ),
    "Hardsigmoid": (lambda: acted(nn.Hardsigmoid()), r"^problem: torch has no second derivative of hardsigmoid, "),
    "cdist": (
        lambda: nn.Sequential(nn.Linear(4, 2), Fn(lambda x: torch.cdist(x, x.detach()[:2]))),
        r"^problem: torch has no second derivative of cdist, .* FirstOrder",
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(Fn(lambda x: x.abs().long() % 5), nn.EmbeddingBag(5, 2)),
        r"^problem: torch has no second derivative of embedding_bag, .* FirstOrder",
    ),
    "draws": (
        lambda: Fn(lambda x, a: a(x) * torch.rand(2), nn.Linear(4, 2)),
        r"^problem: it, or its network, draws random numbers that would not follow the task",
    ),
    "InstanceNorm, running": (
        lambda: through(nn.InstanceNorm1d(2, track_running_stats=True), (2, 4), 8),
        r"running statistics of '2' cannot adapt",
    ),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(4, 2)), r"^network: DataParallel shares rows among devices"),
    "scripted": (
        lambda: torch.jit.script(nn.Linear(4, 2)),
        r"^network: RecursiveScriptModule cannot be evaluated with",
    ),
    "lazy": (lambda: nn.LazyLinear(2), r"^network: LazyLinear has no values for weight yet"),
    "quantised": (
        lambda: torch.ao.nn.quantized.dynamic.Linear(4, 2),
        r"^network: it has no trainable parameter",
    ),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(name):
    make, told = REFUSED[name]
    with pytest.raises(InputError, match=told) as raised:
        over_tasks(
            Unrolled(1), problem := FewShot(make().double()), SGD(LR), outer_variable(problem, SGD(LR)), batch(name)
        )
    assert "\n" not in str(raised.value)


@pytest.mark.long
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ALL)
def test_a_compiled_step_is_the_plain_one(name):
    network, tasks, told = made(name), batch(name), []
    problem, before = FewShot(network), snapshot(network)
    outer = {"problem": {n: v.detach() for n, v in problem.outer().items()}, "optimizer": {}}
    step = partial(over_tasks, Unrolled(1), problem, SGD(LR))
    expected = step(outer, tasks)
    if problem.vectorised:  # else learners do not compile it
        found = Compiled(step, problem, tell=told.append)(outer, tasks)
        assert told[-1].startswith(("compiled the outer step in", "the outer step is not compiled, and runs as it st"))
        assert_close(found.gradient, expected.gradient, rtol=1e-9, atol=1e-10)
    after = snapshot(network)
    assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]
    copy.deepcopy(network)
