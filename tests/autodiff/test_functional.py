import copy

import pytest
import torch
from cases import draw
from torch import nn
from torch.func import grad, hessian, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.autodiff import call, draws, hessian_products
from metalit.errors import InputError
from metalit.hypergradients import Unrolled, for_each_task, over_tasks
from metalit.inner import SGD
from metalit.keys import fold
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot
from metalit.tree import flatten

KEY = torch.tensor(11)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def squared_product(x, y):
    return (x @ y) ** 2


@pytest.mark.parametrize(
    ("vector", "by_x", "by_y"), [((1, 0), (2, 4), (16, 2)), ((0, 1), (4, 8), (12, 14)), ((3, -2), (-2, -4), (24, -22))]
)
def test_hessian_products_are_the_rows_of_the_notebook(vector, by_x, by_y):
    products = hessian_products(squared_product, f64(3, 1), f64(1, 2), f64(*vector))
    assert_close(products, (f64(*by_x), f64(*by_y)), rtol=0, atol=0)


def test_hessian_products_neither_read_nor_write_grad():
    x, y, v = (nn.Parameter(f64(*value)) for value in ((3, 1), (1, 2), (1, 0)))
    for variable, accumulated in ((x, (10, 20)), (y, (30, 10)), (v, (5, 5))):
        variable.grad = f64(*accumulated)
    assert_close(hessian_products(squared_product, x, y, v), (f64(2, 4), f64(16, 2)), rtol=0, atol=0)
    assert_close([x.grad, y.grad, v.grad], [f64(10, 20), f64(30, 10), f64(5, 5)], rtol=0, atol=0)


def test_hessian_products_of_the_seed_survive_a_step_in_place():
    theta, phi = draw(3, seed=5), draw(4, seed=6)
    at_start, s = theta.clone(), phi @ phi

    def f(theta, phi):
        return (theta @ theta) * (phi @ phi)

    g = grad(f)(theta, phi)
    Hg, Jg = hessian_products(f, theta, phi, g)
    theta -= 0.1 * g
    assert not torch.equal(theta, at_start)
    assert_close(g, 2 * s * at_start, rtol=1e-13, atol=0)
    assert_close(Hg, 2 * s * g, rtol=1e-13, atol=0)
    assert_close(Jg, 8 * s * (at_start @ at_start) * phi, rtol=1e-13, atol=0)


def test_hessian_products_of_trees_are_products_with_the_dense_blocks():
    def f(inner, outer):
        return (torch.tanh(inner["a"] @ inner["b"]["c"]) * outer["d"]).sum().exp()

    inner, outer = {"a": draw(2, 3, seed=1), "b": {"c": draw(3, seed=2)}}, {"d": draw(2, seed=3)}
    vector = {"a": draw(2, 3, seed=4), "b": {"c": draw(3, seed=5)}}

    def flat(point, d):
        return f({"a": point[:6].view(2, 3), "b": {"c": point[6:]}}, {"d": d})

    point = flatten(inner)
    Hv, Jv = hessian_products(f, inner, outer, vector)
    assert_close(flatten(Hv), hessian(flat)(point, outer["d"]) @ flatten(vector), rtol=1e-11, atol=1e-12)
    J = jacrev(grad(flat), argnums=1)(point, outer["d"])
    assert_close(Jv, {"d": J.T @ flatten(vector)}, rtol=1e-11, atol=1e-12)


class Everything(nn.Module):
    """Tied, frozen and unused parameters, a buffer that counts, BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("position", torch.arange(3.0))
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.second(self.first(x + self.position))))


def filled(module):
    module = module.double()
    for index, value in enumerate([*module.parameters(), *module.buffers()]):
        if value.is_floating_point():
            value.data = draw(*value.shape, seed=index).abs() + 0.5
    return module


def identities(module):
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return {name: id(value) for name, value in tensors}


@pytest.mark.parametrize("training", [True, False])
def test_call_leaves_the_module_exactly_as_it_was(training):
    module = filled(Everything()).train(training)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, held = copy.deepcopy(module.state_dict()), identities(module)
    slope = grad(lambda given: call(module, given, draw(5, 3, seed=8), key=KEY).sum())(dict(module.named_parameters()))
    assert flatten(slope).abs().max() > 0
    assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert identities(module) == held
    assert {layer.training for layer in module.modules()} == {training}
    assert all(bool((parameter.grad == 7).all()) for parameter in module.parameters())


def test_call_leaves_the_module_as_it_was_when_the_input_is_wrong():
    module = filled(Everything())
    before, held = copy.deepcopy(module.state_dict()), identities(module)
    with pytest.raises(RuntimeError):
        call(module, {"first.weight": draw(3, 3)}, draw(5, 4), key=KEY)
    assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    assert identities(module) == held


def test_call_uses_the_given_parameters_and_the_modules_own_for_the_rest():
    module, x, weight = filled(nn.Linear(3, 2)), draw(4, 3, seed=8), draw(2, 3, seed=9)
    assert_close(call(module, {"weight": weight}, x), x @ weight.T + module.bias, rtol=1e-13, atol=0)


@pytest.mark.parametrize("key", [None, KEY])
def test_call_ties_weights_and_uses_frozen_parameters_and_buffers(key):
    module, x, weight = filled(Everything()).eval(), draw(5, 3, seed=8), draw(3, 3, seed=9)
    module.norm = nn.Identity()
    hidden = (x + module.position) @ weight.T + module.first.bias
    found = call(module, {"first.weight": weight}, x, key=key)
    assert_close(found, hidden @ weight.T + module.second.bias, rtol=1e-12, atol=0)


def test_gradients_reach_tied_weights_once_for_each_use_and_unused_parameters_not_at_all():
    module, x = filled(Everything()).eval(), draw(5, 3, seed=8)
    module.norm = nn.Identity()
    given = {"first.weight": draw(3, 3, seed=9), "unused": draw(2, seed=10)}

    def by_hand(weight):
        return (((x + module.position) @ weight.T + module.first.bias) @ weight.T + module.second.bias).square().sum()

    found = grad(lambda parameters: call(module, parameters, x).square().sum())(given)
    assert_close(found["first.weight"], grad(by_hand)(given["first.weight"]), rtol=1e-12, atol=0)
    assert_close(found["unused"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batches", [1, 3])
def test_batch_norm_uses_the_batch_and_leaves_its_buffers(training, batches):
    layer, x = filled(nn.BatchNorm1d(3)).train(training), 2 + draw(6, 3, seed=8)
    layer.num_batches_tracked.fill_(4)
    before = copy.deepcopy(layer.state_dict())
    weight, bias = draw(3, seed=9), draw(3, seed=10)
    for _ in range(batches):
        found = call(layer, {"weight": weight, "bias": bias}, x)
    variance = (x - x.mean(0)).square().mean(0)
    assert_close(found, (x - x.mean(0)) / (variance + layer.eps).sqrt() * weight + bias, rtol=1e-12, atol=1e-13)
    assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_differentiates_through_the_statistics_of_the_batch(training):
    layer, x, y = filled(nn.BatchNorm1d(2)).train(training), draw(5, 2, seed=8), draw(5, 2, seed=9)

    def by_hand(x):
        centred = x - x.mean(0)
        return (y * centred / (centred.square().mean(0) + layer.eps).sqrt() * layer.weight).sum()

    assert_close(grad(lambda x: (y * call(layer, {}, x)).sum())(x), grad(by_hand)(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_the_inner_loop_leaves_its_buffers(training):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double().train(training)
    before = copy.deepcopy(network.state_dict())
    problem, points = FewShot(network), Points(draw(2, 6, 2, seed=1), draw(2, 6, 1, seed=2))
    outer = {"problem": problem.outer(), "optimizer": {}}
    found = over_tasks(Unrolled(2), problem, SGD(0.1), outer, Task(points, points, torch.arange(2)))
    assert flatten(found.gradient["problem"]).abs().max() > 0
    assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def dropped(key, layer=None, shape=(40, 50)):
    return call(layer or nn.Dropout(0.3), {}, ones(*shape), key=key)


def test_dropout_scales_what_it_keeps():
    assert_close(dropped(KEY).unique(), f64(0, 1 / 0.7), rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_rate_is_within_5_sigma(p):
    count = 400 * 500
    rate = (dropped(KEY, nn.Dropout(p), (400, 500)) == 0).double().mean()
    assert abs(rate - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_dropout_draws_depend_on_the_key_alone():
    state = torch.get_rng_state()
    first = dropped(KEY)
    torch.rand(3)
    assert torch.equal(dropped(KEY), first)
    assert not torch.equal(dropped(KEY + 1), first)
    torch.set_rng_state(state)
    dropped(KEY)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_dropout_layers_draw_different_masks():
    both = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    kept = (dropped(KEY, both) != 0).double().mean()
    assert abs(kept - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_dropout_under_vmap_is_a_loop_over_keys_in_any_order():
    keys = fold(torch.tensor(3), torch.arange(4))
    batch = vmap(dropped)(keys)
    assert torch.equal(batch, torch.stack([dropped(key) for key in keys]))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(vmap(dropped)(keys[order]), batch[order])
    assert len({tuple(mask.flatten().tolist()) for mask in batch}) == 4


def test_dropout_with_rate_0_or_in_evaluation_draws_nothing():
    state = torch.get_rng_state()
    assert torch.equal(dropped(KEY, nn.Dropout(0.0)), ones(40, 50))
    for layer in (nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5)):
        assert torch.equal(dropped(KEY, layer.eval()), ones(40, 50))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_rate_0_does_not_shift_the_next_draw():
    assert torch.equal(dropped(KEY, nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.3))), dropped(KEY))


def test_dropout_of_rate_1_is_zero_with_a_zero_gradient():
    def total(x):
        return call(nn.Dropout(1.0), {}, x, key=KEY).sum()

    assert dropped(KEY, nn.Dropout(1.0)).abs().max() == 0
    assert grad(total)(ones(4)).abs().max() == 0


def test_dropout_in_place_leaves_its_input():
    x = ones(40, 50)
    assert torch.equal(call(nn.Dropout(0.3, inplace=True), {}, x, key=KEY), dropped(KEY))
    assert torch.equal(x, ones(40, 50))


@pytest.mark.parametrize(
    ("layer", "channels", "space"),
    [
        (nn.Dropout1d(0.5), (300, 4), (6,)),
        (nn.Dropout2d(0.5), (300, 4), (3, 2)),
        (nn.Dropout3d(0.5), (300, 4), (2, 2, 2)),
        (nn.Dropout1d(0.5), (1200,), (6,)),
    ],
    ids=str,
)
def test_channel_dropout_drops_whole_channels(layer, channels, space):
    flat = dropped(KEY, layer, (*channels, *space)).reshape(1200, -1)
    assert_close(flat, flat[:, :1].expand_as(flat), rtol=0, atol=0)
    assert_close(flat.unique(), f64(0, 2), rtol=0, atol=0)
    assert abs((flat[:, 0] == 0).double().mean() - 0.5) < 5 * (0.25 / 1200) ** 0.5


def test_draws_says_whether_dropout_is_active():
    network = MLP([1, 4, 1], dropout=0.5)
    assert draws(network)
    assert not draws(network.eval())
    assert not draws(MLP([1, 4, 1]))


def dropout_problem():
    torch.manual_seed(0)
    network = MLP([2, 16, 1], activation="Tanh", dropout=0.5).double()
    points = Points(draw(3, 6, 2, seed=1), draw(3, 6, 1, seed=2))
    return FewShot(network), Task(points, points, fold(torch.tensor(5), torch.arange(3)))


def test_dropout_over_tasks_is_a_loop_over_tasks_in_any_order():
    problem, tasks = dropout_problem()
    outer = {"problem": problem.outer(), "optimizer": {}}

    def run(chosen):
        picked = Task(*(Points(part.x[chosen], part.y[chosen]) for part in tasks[:2]), tasks.key[chosen])
        return over_tasks(Unrolled(2), problem, SGD(0.1), outer, picked)

    each, permuted = [run([index]) for index in range(3)], run([2, 0, 1])
    for name in outer["problem"]:
        one_by_one = torch.cat([estimate.inner[name] for estimate in each])
        assert_close(run([0, 1, 2]).inner[name], one_by_one, rtol=1e-12, atol=1e-13)
        assert_close(permuted.inner[name], one_by_one[[2, 0, 1]], rtol=1e-12, atol=1e-13)
    mean = sum(flatten(estimate.gradient["problem"]) for estimate in each) / 3
    assert_close(flatten(run([0, 1, 2]).gradient["problem"]), mean, rtol=1e-12, atol=1e-13)


def test_dropout_differs_between_inner_steps_and_from_the_outer_loss():
    problem, tasks = dropout_problem()
    task = Task(*(Points(part.x[0], part.y[0]) for part in tasks[:2]), tasks.key[0])
    outer = problem.outer()
    losses = [problem.inner_loss({}, outer, task, step).item() for step in (0, 1, 2, 0)]
    losses.append(problem.outer_loss({}, outer, task).item())
    assert losses[0] == losses[3]
    assert len(set(losses)) == 4
    problem.eval()
    assert len({problem.inner_loss({}, outer, task, step).item() for step in (0, 1)}) == 1


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    "layer",
    [nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.RReLU(), Attention(6, 2, dropout=0.5)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.filterwarnings("ignore:tasks are evaluated one after the other")
def test_draws_of_other_layers_follow_the_key_task_by_task(layer):
    def run(_, key):
        return call(layer, {}, torch.linspace(-1, 1, 24).reshape(4, 6), key=key)

    before = torch.get_rng_state()
    found = for_each_task(run, {}, torch.arange(3))
    torch.rand(2)
    assert not torch.equal(found[0], found[1])
    assert all(torch.equal(found[number], run({}, torch.tensor(number))) for number in range(3))
    torch.set_rng_state(before)


def test_draws_that_cannot_follow_a_key_are_refused():
    layer = FunctionalDropout(6, 6)
    assert not draws(layer)
    with pytest.raises(InputError, match="draws random numbers that would not follow the task"):
        for_each_task(lambda _, key: call(layer, {}, torch.ones(4, 6)), {}, torch.arange(3))


def test_instance_norm_with_running_statistics_is_refused():
    layer = nn.InstanceNorm1d(3, track_running_stats=True)
    with pytest.raises(InputError, match="track_running_stats=False"):
        call(layer, {}, torch.randn(2, 3, 5))


def test_call_refuses_unknown_names():
    with pytest.raises(InputError, match="wieght"):
        call(nn.Linear(2, 1), {"wieght": torch.zeros(1, 2)}, torch.ones(2))


def test_dropout2d_reads_three_dimensions_as_a_batch_of_channels_as_torch_does():
    dropped = call(nn.Dropout2d(0.5), {}, torch.ones(40, 5, 7), key=torch.tensor(1))
    per_channel = dropped[:, :, 0]
    assert torch.equal(dropped, per_channel.unsqueeze(-1).expand(40, 5, 7))
    assert int((per_channel.sum(1) > 0).sum()) > 0
    assert int((per_channel == 0).any(1).sum()) > 30


def test_a_recurrent_layer_keeps_its_own_list_of_weights():
    layer, x = nn.LSTM(2, 3).double(), draw(4, 1, 2)
    held = list(layer._flat_weights)
    call(nn.Sequential(layer, _First()), {"0.weight_ih_l0": torch.zeros(12, 2, dtype=torch.float64)}, x)
    assert all(now is before for now, before in zip(layer._flat_weights, held, strict=True))


class _First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_dropout_of_rate_zero_draws_nothing():
    assert draws(nn.Dropout(0.1))
    assert not draws(nn.Dropout(0.0))


def test_a_layer_under_two_names_keeps_its_parameters():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    network.append(network[0])
    held = network[0].weight
    call(network, {"0.weight": torch.zeros(2, 2, dtype=torch.float64)}, draw(4, 2))
    assert network[0].weight is network[2].weight is held


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.arange(30).reshape(5, 6) % 7 > 1},
        {"attn_mask": torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)},
        {"enable_gqa": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_attention_that_drops_by_a_key_is_torchs_where_little_is_dropped(options):
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = draw(3, 4, 5, 2), draw(3, heads, 6, 2, seed=1), draw(3, heads, 6, 2, seed=2)

    class Attention(nn.Module):
        def forward(self, x, dropout_p):
            return F.scaled_dot_product_attention(x, key, value, dropout_p=dropout_p, **options)

    expected = F.scaled_dot_product_attention(query, key, value, **options)
    assert_close(call(Attention(), {}, query, 1e-12, key=KEY), expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(call(Attention(), {}, query, 0.0, key=KEY), expected)
    dropped, again = (call(Attention(), {}, query, 0.5, key=KEY) for _ in range(2))
    assert torch.equal(dropped, again)
    assert not torch.allclose(dropped, expected)
    many = vmap(lambda key: call(Attention(), {}, query, 0.5, key=key))(KEY + torch.arange(2000))
    assert_close(many.mean(0), expected, rtol=0, atol=0.15)
