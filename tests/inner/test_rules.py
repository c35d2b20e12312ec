"""Inner optimisers that descend the gradient: their values are torch's, their derivatives those by hand."""

import math
import warnings
from functools import partial

import pytest
import torch
from cases import OPTIMIZERS, Bowl, bowls, draw, regression_tasks, task_at
from jsonargparse import ArgumentParser
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.linalg import matrix_power
from torch.testing import assert_close

from metalit.adapt import Iterate, adapt, beginning, iterates, outer_variable, path
from metalit.errors import InputError
from metalit.hypergradients import Unrolled, over_tasks
from metalit.inner import ALFA, SGD, Adam, AdamW, Cosine, InnerOptimizer, Learned, MetaCurvature, MetaSGD, RMSprop
from metalit.inner.pieces import clipped
from metalit.problems import FewShot
from metalit.tree import flatten, leaves, norm, tree_map

EXACT = {"rtol": 1e-13, "atol": 1e-13}


def real(*values):
    return torch.tensor(values, dtype=torch.float64)


def taken(optimizer, slopes, theta, outer=None):
    """θ after each step, where the gradients are given numbers."""
    state, found, outer = optimizer.init(theta), [theta], outer or {}
    for step, slope in enumerate(slopes):
        theta, state = optimizer.update(lambda _, slope=slope: slope, theta, state, outer, step)
        found.append(theta)
    return found


# ---- values

TORCH = {
    "SGD": (SGD(0.1, weight_decay=0.2), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": (
        SGD(0.1, 0.8, weight_decay=0.2),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.2},
    ),
    "Adam": (
        Adam(0.1, 0.8, 0.95, 1e-3, 0.2),
        torch.optim.Adam,
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "Adam as it comes": (Adam(0.1), torch.optim.Adam, {"lr": 0.1}),
    "AdamW": (AdamW(0.1), torch.optim.AdamW, {"lr": 0.1}),
    "AdamW, decay": (AdamW(0.1, weight_decay=0.5), torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5}),
    "RMSprop": (RMSprop(0.1), torch.optim.RMSprop, {"lr": 0.1}),
    "RMSprop, momentum": (
        RMSprop(0.1, 0.9, 1e-3, 0.2, 0.7),
        torch.optim.RMSprop,
        {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.2, "momentum": 0.7},
    ),
}


def of_torch(kind, options, problem, task, steps, clip=None):
    """The parameters of torch's optimiser after each step."""
    theta = nn.Parameter(problem.theta.detach().clone())
    optimizer, found = kind([theta], **options), [theta.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        problem.outer_loss({"theta": theta}, {}, task).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([theta], clip)
        optimizer.step()
        found.append(theta.detach().clone())
    return found


@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_torch(name):
    optimizer, kind, options = TORCH[name]
    problem, task = Bowl(draw(4, seed=4)), task_at(bowls(4), 1)
    outer = outer_variable(problem, optimizer, task)
    found = [inner["theta"] for inner in iterates(problem, optimizer, outer, task, 6)]
    assert_close(found, of_torch(kind, options, problem, task, 6), **EXACT)


def test_nesterovs_look_ahead_points_are_the_parameters_of_torch():
    problem, task = Bowl(draw(4, seed=4)), task_at(bowls(4), 1)
    optimizer = SGD(0.1, 0.8, nesterov=True, weight_decay=0.2)
    each = path(problem, optimizer, outer_variable(problem, optimizer, task), task, 6)
    found = [at.inner["theta"] - 0.1 * 0.8 * at.state["theta"]["velocity"] for at in each]
    options = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}
    assert_close(found, of_torch(torch.optim.SGD, options, problem, task, 6), **EXACT)


def test_clipping_comes_before_the_decay_as_in_a_loop_of_torch():
    problem, task = Bowl(draw(4, seed=4)), task_at(bowls(4), 1)
    optimizer = SGD(0.1, weight_decay=0.2, clip_norm=0.5)
    found = [inner["theta"] for inner in iterates(problem, optimizer, outer_variable(problem, optimizer), task, 6)]
    right = of_torch(torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, problem, task, 6, clip=0.5)
    assert_close(found, right, rtol=1e-5, atol=1e-5)  # torch divides by ‖g‖ + 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_inner_variable_is_no_trouble(name):
    optimizer = OPTIMIZERS[name](0.1)
    inner, _ = optimizer.update(lambda inner: inner, {}, optimizer.init({}), optimizer.outer({}, 2), 0)
    assert inner == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_keeps_its_type(name):
    optimizer, types = OPTIMIZERS[name](0.1), (torch.float32, torch.float64, torch.bfloat16, torch.bfloat16)
    inner = {str(i): draw(*(2,) * (i % 3)).to(dtype) for i, dtype in enumerate(types)}
    if name == "Newton":  # which takes them all as one vector
        inner = {"0": inner["1"], "1": inner["1"]}
    outer, state = optimizer.outer(inner, 2), optimizer.init(inner)
    for step in range(3):
        after, state = optimizer.update(lambda inner: inner, inner, state, outer, step)
        assert {key: leaf.dtype for key, leaf in after.items()} == {key: leaf.dtype for key, leaf in inner.items()}


# ---- derivatives by hand


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_on_a_quadratic_is_the_power_of_a_matrix(nesterov):
    a, c, lr, momentum, steps = 1.7, 0.4, 0.2, 0.6, 5
    slope = a * lr * momentum if nesterov else 0.0  # of g by −v, which is taken at the look-ahead
    # (θ − c, v) ↦ v′ = momentum · v + a(θ − c) − slope · v, θ′ = θ − lr · v′
    of_velocity = [a, momentum - slope]
    M = real([1 - lr * of_velocity[0], -lr * of_velocity[1]], of_velocity)
    power = matrix_power(M, steps)
    theta, task = real(1.3), bowls(1)._replace(A=real([[a]]), c=real([c]))
    problem, optimizer = Bowl(theta), SGD(lr, momentum, nesterov)
    found = over_tasks(Unrolled(steps), problem, optimizer, outer_variable(problem, optimizer), task)
    after = power[0, 0] * (theta - c)
    assert_close(found.inner["theta"], (c + after)[None], **EXACT)
    assert_close(found.gradient["problem"]["theta"], power[0, 0] * a * after, **EXACT)
    # from a state that is not zero
    start = Iterate({"theta": theta[None]}, {"theta": {"velocity": real([0.8])}})
    warm = over_tasks(Unrolled(steps), problem, optimizer, outer_variable(problem, optimizer), task, start)
    assert_close(warm.inner["theta"][0] - c, power[:1] @ torch.cat([theta - c, real(0.8)]), **EXACT)
    assert_close(warm.state["theta"]["velocity"][0], power[1:] @ torch.cat([theta - c, real(0.8)]), **EXACT)


def test_one_step_of_adam_by_hand_also_without_a_gradient():
    g, lr, eps = real(-3.0, -1e-3, 0.0, 1e-9, 2.0), 0.1, 1e-2
    step = partial(taken, Adam(lr, eps=eps))
    assert_close(step([g], 0 * g)[1], -lr * g / (g.abs() + eps), **EXACT)
    derivative = jacrev(lambda g: step([g], 0 * g)[1])(g)
    assert_close(derivative, (-lr * eps / (g.abs() + eps) ** 2).diag(), **EXACT)


def test_two_steps_of_adam_by_hand_also_without_a_gradient():
    b1, b2, lr, eps = 0.8, 0.9, 0.1, 1e-2
    first, second = real(0.7, 0.0, 0.0, -1.2), real(-0.4, 0.0, 0.9, 0.0)

    def by_hand(g1, g2):
        """θ₂ and its derivatives by g₁ and g₂."""
        m, v = (b1 * (1 - b1) * g1 + (1 - b1) * g2) / (1 - b1**2), b2 * (1 - b2) * g1**2 + (1 - b2) * g2**2
        root = math.sqrt(v / (1 - b2**2))
        move = -lr * g1 / (abs(g1) + eps) - lr * m / (root + eps)

        def slope(share, of_m, of_v):  # d(m / (root + eps)), where d root = d v / (2 root)
            of_root = of_v / ((1 - b2**2) * 2 * root) if root > 0 else 0.0
            return share - lr * (of_m / (1 - b1**2) / (root + eps) - m / (root + eps) ** 2 * of_root)

        by_first = slope(-lr * eps / (abs(g1) + eps) ** 2, b1 * (1 - b1), 2 * b2 * (1 - b2) * g1)
        return move, by_first, slope(0.0, 1 - b1, 2 * (1 - b2) * g2)

    def run(g1, g2):
        return taken(Adam(lr, b1, b2, eps), [g1, g2], 0 * g1)[2]

    expected = [
        real(*row)
        for row in zip(*(by_hand(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)), strict=True)
    ]
    found = jacrev(run, argnums=(0, 1))(first, second)
    assert_close(run(first, second), expected[0], **EXACT)
    assert_close([part.diagonal() for part in found], expected[1:], **EXACT)


@pytest.mark.parametrize(
    "optimizer", [Adam(0.1), AdamW(0.1), RMSprop(0.1, momentum=0.5)], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_unit_has_a_finite_meta_gradient(optimizer, dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).to(dtype)
    with torch.no_grad():
        network[0].bias[0] = -100.0
    tasks = torch.utils._pytree.tree_map(
        lambda v: v.to(dtype) if v is not None and v.is_floating_point() else v, regression_tasks(1, 1)
    )
    problem = FewShot(network)
    found = over_tasks(Unrolled(3), problem, optimizer, outer_variable(problem, optimizer), tasks)
    assert all(bool(value.isfinite().all()) for _, value in leaves(found.gradient))
    assert found.gradient["problem"]["2.weight"][0, 0] == 0


@pytest.mark.parametrize("most", [0.5, 5.0, 100.0])
def test_clipping_and_its_derivative_by_hand(most):
    g = {"a": real(3.0), "b": real(0.0, -4.0)}
    share = min(1.0, most / 5)
    assert_close(clipped(g, most), tree_map(lambda leaf: share * leaf, g), **EXACT)
    v = flatten(g)

    def flat(v):
        return flatten(clipped({"a": v[:1], "b": v[1:]}, most))

    identity = torch.eye(3, dtype=torch.float64)
    expected = most / 5 * (identity - v.outer(v) / 25) if most < 5 else identity
    assert_close(jacrev(flat)(v), expected, **EXACT)
    assert_close(jacrev(flat)(0 * v), identity, **EXACT)


# ---- schedules and learned numbers


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [([1.0, 0.5], [1, 0.5, 0.5, 0.5]), (0.5, [1, 0.5, 0.25, 0.125]), (Cosine(2, 0.2), [1, 0.6, 0.2, 0.2])],
)
def test_a_schedule_multiplies_the_rate(schedule, factors):
    found = taken(SGD(0.1, schedule=schedule), [real(1.0)] * 4, real(0.0))
    assert_close(torch.cat(found).diff(), -0.1 * real(*factors), **EXACT)
    learned = SGD(Learned(0.1), schedule=schedule)
    assert_close(taken(learned, [real(1.0)] * 4, real(0.0), learned.outer(real(0.0), 2)), found, **EXACT)


SHAPES = {
    "all": (),
    "step": (3,),
    "parameter": {"w": (), "b": ()},
    "parameter and step": {"w": (3,), "b": (3,)},
    "entry": {"w": (2, 2), "b": (2,)},
}
INNER = {"w": real([1.0, 2.0], [3.0, 4.0]), "b": real(5.0, 6.0)}


@pytest.mark.parametrize("per", SHAPES)
def test_there_are_as_many_rates_as_are_asked_for_and_the_last_step_repeats(per):
    optimizer = SGD(Learned(0.1, per))
    outer, shapes = optimizer.outer(INNER, 3), SHAPES[per]
    found = outer["lr"]
    if isinstance(shapes, tuple):
        assert tuple(found.shape) == shapes
    else:
        assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    assert all(bool((value == 0.1).all()) for _, value in leaves(outer))
    other = tree_map(lambda value: value + 0.01 * torch.arange(1.0, 1 + value.numel()).view_as(value), outer)
    state, ones = optimizer.init(INNER), tree_map(torch.ones_like, INNER)
    moves = []
    for step in range(5):
        after, _ = optimizer.update(lambda _: ones, INNER, state, other, step)
        moves.append(tree_map(torch.sub, INNER, after))
    for step, move in enumerate(moves):
        for name, value in move.items():
            rates = other["lr"][name] if isinstance(shapes, dict) else other["lr"]
            rate = rates[min(step, 2)] if "step" in per else rates
            assert_close(value, rate.expand_as(value), **EXACT)
    assert ("step" in per) == bool((moves[0]["w"] != moves[1]["w"]).any())


def test_meta_sgd_is_the_finest_grain():
    slopes, rates = [draw(4, seed=s) for s in range(3)], {"lr": draw(4, seed=9)}
    for one, other in zip(
        *(taken(o, slopes, real(1.0, 2.0, 3.0, 4.0), rates) for o in (MetaSGD(0.1), SGD(Learned(0.1, "entry")))),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert MetaSGD(0.1).outer(INNER, 3).keys() == {"lr"}


NUMBERS = {
    "lr": (SGD, 0.1), "momentum": (SGD, 0.9), "weight_decay": (SGD, 0.1), "beta1": (Adam, 0.9), "beta2": (Adam, 0.99),
    "eps": (Adam, 1e-3), "alpha": (RMSprop, 0.9), "clip_norm": (RMSprop, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_a_learned_number_starts_as_the_fixed_one_and_stays_in_its_domain(name):
    kind, start = NUMBERS[name]
    fixed, learned = kind(**{name: start}), kind(**{name: Learned(start, positive=True)})
    slopes, theta = [draw(3, seed=s) for s in range(3)], real(1.0, 2.0, 3.0)
    outer = learned.outer(theta, 3)
    assert outer.keys() == {name}
    assert not fixed.learns
    assert learned.learns
    assert_close(taken(learned, slopes, theta, outer), taken(fixed, slopes, theta), rtol=1e-12, atol=1e-12)
    for far in (-20.0, 20.0):
        at = next(iter(learned.numbers(theta, {name: outer[name] + far}, 0).values()))[name]
        assert 0 < at < (1 if name in ("momentum", "beta1", "beta2", "alpha") else math.inf)


def test_a_learned_rate_is_free_unless_it_is_positive():
    theta = real(1.0)
    assert_close(taken(SGD(Learned(0.1)), [theta], theta, {"lr": real(-0.5)[0]})[1], real(1.5), **EXACT)
    found = taken(SGD(Learned(0.1, positive=True)), [theta], theta, {"lr": real(math.log(0.5))[0]})[1]
    assert_close(found, real(0.5), **EXACT)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SGD(momentum=1.0), "SGD: momentum=1.0 must be a number from 0 to below 1"),
        (lambda: SGD(weight_decay=-0.1), "SGD: weight_decay=-0.1 must be a finite number, 0 or more"),
        (lambda: SGD(clip_norm=0.0), "SGD: clip_norm=0.0 must be a finite positive number"),
        (lambda: SGD(schedule=[]), "SGD: schedule=[] must be factors"),
        (lambda: SGD(schedule=[1.0, math.nan]), "SGD: schedule=[1.0, nan] must be factors"),
        (lambda: SGD(schedule=-0.5), "SGD: schedule=-0.5 must be factors"),
        (lambda: SGD(schedule=Cosine(0)), "SGD: schedule=Cosine(steps=0, last=0.0) must be factors"),
        (lambda: Adam(eps=0.0), "Adam: eps=0.0 must be a finite positive number"),
        (lambda: AdamW(beta2=-0.1), "AdamW: beta2=-0.1 must be"),
        (lambda: MetaSGD(-0.1), "MetaSGD: lr=-0.1 must be a finite positive number"),
        (lambda: SGD(Learned(0.0, positive=True)), "SGD: lr.start=0.0 must be positive"),
        (lambda: SGD(momentum=Learned(0.0)), "SGD: momentum.start=0.0 must be between 0 and 1"),
        (lambda: Adam(beta1=Learned(1.0)), "Adam: beta1.start=1.0 must be between 0 and 1"),
        (lambda: Adam(weight_decay=Learned(0.0)), "Adam: weight_decay.start=0.0 must be positive"),
        (lambda: SGD(clip_norm=Learned(1.0, "entry")), "SGD: clip_norm.per='entry' must be 'all' or 'step'"),
        (lambda: Learned(math.nan), "Learned: start=nan must be a finite number"),
        (lambda: Learned(0.1, "layer"), "Learned: per='layer' must be one of 'all', 'parameter', 'step'"),
    ],
)
def test_what_has_no_meaning_is_refused(make, told):
    with pytest.raises(InputError) as raised:
        make()
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize(
    "given",
    [
        ["--inner=SGD", "--inner.lr=Learned", "--inner.lr.start=0.02", "--inner.lr.per=parameter and step"],
        ["--inner", '{"class_path": "SGD", "init_args": {"lr": {"start": 0.02, "per": "parameter and step"}}}'],
        [
            "--inner",
            '{"class_path": "SGD", "init_args": {"lr": {"class_path": "Learned", "init_args": '
            '{"start": 0.02, "per": "parameter and step"}}}}',
        ],
    ],
    ids=["command line", "short", "class_path"],
)
def test_a_config_names_what_is_learned(given):
    parser = ArgumentParser()
    parser.add_argument("--inner", type=InnerOptimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parser.instantiate_classes(parser.parse_args([*given, "--inner.schedule=0.5"])).inner
    assert found == SGD(Learned(0.02, "parameter and step"), schedule=0.5)


# ---- curvature, and a network


def test_a_curvature_multiplies_every_dimension_and_those_of_a_filter_as_one():
    inner = {"filter": draw(2, 3, 2, 2), "weight": draw(2, 3), "bias": draw(3), "scale": draw()}
    optimizer = MetaCurvature(0.1)
    outer = optimizer.outer(inner, 1)
    assert {name: value.shape[0] for name, value in leaves(outer["curvature"])} == {
        "filter.0": 2, "filter.1": 3, "filter.2": 4, "weight.0": 2, "weight.1": 3, "bias.0": 3, "scale.0": 1,
    }  # fmt: skip
    slopes = tree_map(lambda leaf: draw(*leaf.shape, seed=5), inner)
    plain, _ = SGD(0.1).update(lambda _: slopes, inner, SGD(0.1).init(inner), {}, 0)
    begun, _ = optimizer.update(lambda _: slopes, inner, optimizer.init(inner), outer, 0)
    assert_close(begun, plain, rtol=0, atol=0)
    turned = tree_map(lambda leaf: draw(*leaf.shape, seed=7), outer)
    found, _ = optimizer.update(lambda _: slopes, inner, optimizer.init(inner), turned, 0)
    for name, leaf in inner.items():
        product = torch.ones(1, 1, dtype=torch.float64)
        for matrix in turned["curvature"][name].values():
            product = torch.kron(product, matrix)
        assert_close(found[name], leaf - 0.1 * (product @ slopes[name].flatten()).view_as(leaf), **EXACT)


def test_alfa_starts_as_gradient_descent_with_decay_and_draws_by_its_seed():
    slopes = tree_map(lambda leaf: draw(*leaf.shape, seed=5), INNER)
    optimizer, plain = ALFA(0.1, weight_decay=0.3), SGD(0.1, weight_decay=0.3)
    found, _ = optimizer.update(lambda _: slopes, INNER, optimizer.init(INNER), optimizer.outer(INNER, 1), 0)
    assert_close(found, plain.update(lambda _: slopes, INNER, plain.init(INNER), {}, 0)[0], **EXACT)
    drawn = [flatten(ALFA(0.1, seed=seed).outer(INNER, 1)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- a state that is taken up


@pytest.mark.parametrize("name", ["momentum", "Adam", "RMSprop"])
def test_a_start_with_a_state_goes_on_as_if_it_had_never_stopped(name):
    problem, task, optimizer = Bowl(draw(3, seed=4)), task_at(bowls(3), 0), OPTIMIZERS[name](0.1)
    outer = outer_variable(problem, optimizer, task)
    *_, half = path(problem, optimizer, outer, task, 3)
    *_, whole = path(problem, optimizer, outer, task, 5)
    *_, again = path(problem, optimizer, outer, task, 2, half)
    assert_close(again, whole, rtol=0, atol=0)
    anew = adapt(problem, optimizer, outer, task, 2, half.inner)
    assert norm(tree_map(torch.sub, anew, whole.inner)) > 1e-4
    slope = grad(lambda own: beginning(problem, optimizer, own, task, Iterate(own, half.state)).inner["theta"].sum())
    assert slope(outer["problem"])["theta"].abs().max() == 0


def test_curvature_in_mixed_precision_is_that_of_the_gradient_as_it_is():
    optimizer, generator = MetaCurvature(0.1), torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 4, generator=generator)
    curvature = optimizer.outer({"w": weight[0]}, 1)["curvature"]
    learned = {"curvature": tree_map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator), curvature)}

    def stepped(leaf):
        return optimizer.update(lambda inner: inner, {"w": leaf}, {"w": {}}, learned, 0)[0]["w"]

    expected = vmap(stepped)(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vmap(stepped)(weight), expected)
