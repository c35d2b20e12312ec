"""Second derivatives of what people put into networks: right, or an error of torch's own, or refused by name."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, weight_norm
from torch_layers import functions, layers, losses

from metalit.autodiff import SAM, call, gradient_at, hessian_products, per_sample_hessian, perturbed_gradient
from metalit.autodiff.attention import plain_attention
from metalit.autodiff.exact import ExactSecondDerivatives
from metalit.errors import InputError
from metalit.hypergradients import Implicit, Unrolled, over_tasks
from metalit.inner import SGD
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot
from metalit.tree import flatten, unflatten

NORMED = {
    "parametrization": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "hook": lambda: weight_norm(nn.Linear(3, 4), dim=1),
    "one norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4), dim=None),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), weight_norm(nn.Conv1d(1, 2, 2)), nn.Flatten()),
    "bias": lambda: parametrizations.weight_norm(nn.Linear(3, 4), "bias"),
}


def normed(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hook is deprecated, and used
        network = NORMED[kind]().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network, torch.randn(5, 3).double(), torch.randn(5, 4).double()


def by_differences(fn, point, step=1e-6):
    at = flatten(point)
    basis = step * torch.eye(len(at), dtype=at.dtype)
    values = [fn(unflatten(at + one, point)) - fn(unflatten(at - one, point)) for one in basis]
    return torch.stack([value / (2 * step) for value in values])


@pytest.mark.parametrize("kind", NORMED)
def test_the_hessian_through_weight_norm_is_that_of_finite_differences(kind):
    network, x, y = normed(kind)
    own = {name: value.detach() for name, value in network.named_parameters()}

    def loss(at):
        return (call(network, at, x) - y).square().mean()

    def slope(at):
        return flatten(grad(loss)(at))

    vector = torch.linspace(-1, 1, len(flatten(own)), dtype=torch.float64)
    found = flatten(grad(lambda at: slope(at) @ vector)(own))
    expected = by_differences(slope, own) @ vector
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)

    def plain(at, scale):
        return scale * (functional_call(network, at, (x,)) - y).square().mean()

    one = torch.ones((), dtype=torch.float64)
    product, _ = hessian_products(plain, own, one, unflatten(vector, own))
    torch.testing.assert_close(flatten(product), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", NORMED)
def test_second_derivatives_of_each_row_through_weight_norm(kind):
    network, x, _ = normed(kind)
    layers = nn.Sequential(nn.Linear(3, 3).double(), nn.Tanh(), network)
    own = {name: value.detach() for name, value in layers.named_parameters()}
    found = per_sample_hessian(layers, x)
    plain = per_sample_hessian(lambda x, **at: functional_call(layers, at, (x[None],))[0], x, parameters=own)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)
    expected = vmap(torch.func.hessian(lambda row: layers(row[None])[0]))(x)  # by x alone, torch is right
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class PenalisedLine(Problem):
    """A penalty on the directions of a weight-normed layer, which the user evaluates without call()."""

    def __init__(self, network, x, y):
        super().__init__()
        self.network, self.x, self.y = network.requires_grad_(False), x, y
        self.decay = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def init(self, outer, task):
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def inner_loss(self, inner, outer, task, step):
        penalty = sum(value.square().sum() for value in inner.values())
        return self.outer_loss(inner, outer, task) + outer["decay"].exp() * penalty

    def outer_loss(self, inner, outer, task):
        return (functional_call(self.network, inner, (self.x,)) - self.y).square().mean()


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_hypergradients_through_weight_norm_are_those_of_finite_differences(kind):
    network, x, y = normed(kind)
    key = torch.zeros(1, dtype=torch.int64)
    problem, task = FewShot(network), Task(Points(x[None], y[None]), Points(x[None] + 1, y[None]), key)
    own = {name: value.detach() for name, value in problem.outer().items()}

    def run(own):
        return over_tasks(Unrolled(2), problem, SGD(0.1), {"problem": own, "optimizer": {}}, task)

    found = flatten(run(own).gradient["problem"])
    torch.testing.assert_close(found, by_differences(lambda at: run(at).loss, own), rtol=1e-6, atol=1e-7)
    ridge = PenalisedLine(network, x, y)

    def penalised(value, estimator):
        return over_tasks(estimator, ridge, SGD(0.02), {"problem": {"decay": value}, "optimizer": {}}, key)

    one = torch.tensor(-2.0, dtype=torch.float64)
    slope = by_differences(lambda at: penalised(at["decay"], Unrolled(3)).loss, {"decay": one})
    torch.testing.assert_close(penalised(one, Unrolled(3)).gradient["problem"]["decay"], slope[0], rtol=1e-6, atol=1e-9)
    assert penalised(one, Implicit(3)).gradient["problem"]["decay"].isfinite()


def test_a_layer_that_torch_differentiates_wrongly_is_refused():
    network, x = nn.Sequential(nn.Conv2d(1, 3, 1), nn.CrossMapLRN2d(3)), torch.randn(2, 1, 2, 2)
    for way in (
        lambda: call(network, {}, x),
        lambda: gradient_at(network, lambda net: net(x).sum()),
        lambda: perturbed_gradient(network, lambda net: net(x).sum(), SAM()),
        lambda: per_sample_hessian(network, x),
    ):
        with pytest.raises(InputError, match="CrossMapLRN2d wrongly; use LocalResponseNorm"):
            way()


# ---- all that torch.nn holds

# torch has no second derivative of these, and says so
WITHOUT = {
    *("Hardsigmoid", "MultiLabelMarginLoss", "MultiMarginLoss", "CTCLoss", "pdist", "segment_reduce"),
    *(f"cdist, {p}" for p in (1.0, 2.0, 3.0)),
    *(f"EmbeddingBag, {kind}" for kind in ("sum", "mean", "max", "weights")),
}


@pytest.mark.long
def test_all_that_torch_holds_has_right_second_derivatives_or_none():
    torch.manual_seed(0)
    wrong, without = {}, set()
    for name, (module, inputs) in {**layers(), **losses(), **functions()}.items():
        module = module.double()  # noqa: PLW2901
        names = [key for key, _ in module.named_parameters()]
        own = [0.7 * torch.randn_like(value) + 0.05 for value in module.parameters()]
        given = [x for x in inputs if x.is_floating_point()]
        count = len(names)

        def fn(*values, module=module, names=names, inputs=inputs, count=count):
            real = iter(values[count:])
            x = [next(real) if part.is_floating_point() else part for part in inputs]
            # not around the checks, which write to their points by .data
            with plain_attention(), ExactSecondDerivatives():
                return functional_call(module, dict(zip(names, values[:count], strict=True)), tuple(x))

        values = [value.detach().clone().requires_grad_() for value in [*own, *given]]
        try:
            gradcheck(fn, values)
            gradgradcheck(fn, values, atol=1e-5, rtol=1e-3)
        except GradcheckError as error:
            wrong[name] = str(error)[:200]
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented" not in str(error):
                raise
            without.add(name)
    assert wrong == {}
    assert without == WITHOUT


class Data(nn.Module):
    """Reads weights and activations as constants, and writes to weights, by ``.data``."""

    def __init__(self, detach):
        super().__init__()
        self.hidden, self.out, self.detach = nn.Linear(3, 4), nn.Linear(4, 2), detach

    def forward(self, x):
        hidden = self.hidden(x)
        constants = [hidden.detach(), self.out.weight.detach()] if self.detach else [hidden.data, self.out.weight.data]
        if not self.detach:
            self.hidden.bias.data.mul_(2.0)  # too late to matter
        return self.out(hidden.tanh() * constants[0].abs()) / constants[1].norm()


def test_data_is_a_constant_for_the_outer_derivative_too():
    torch.manual_seed(0)
    networks = [Data(detach).double() for detach in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    x, y = torch.randn(2, 3, 5, 3, dtype=torch.float64), torch.randn(2, 3, 5, 2, dtype=torch.float64)
    tasks = Task(Points(x[0], y[0]), Points(x[1], y[1]), torch.arange(3))
    found = []
    for problem in map(FewShot, networks):
        outer = {"problem": {name: value.detach() for name, value in problem.outer().items()}, "optimizer": {}}
        found += [over_tasks(Unrolled(2), problem, SGD(0.1), outer, tasks).gradient for _ in range(2)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-12, atol=1e-14)
