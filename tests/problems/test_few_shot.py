import copy

import pytest
import torch
from cases import draw, linear, regression_tasks, task_at
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.hypergradients import FirstOrder, Unrolled
from metalit.inner import SGD, MetaSGD
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import FewShot

LR, KEY = 0.1, torch.tensor(0)
each_estimator = pytest.mark.parametrize("estimator", [Unrolled(2), FirstOrder(2)], ids=["Unrolled", "FirstOrder"])


def points(inputs=2, outputs=1, rows=5, seed=1):
    return Points(draw(rows, inputs, seed=seed), draw(rows, outputs, seed=seed + 1))


def task(inputs=2, outputs=1):
    return Task(points(inputs, outputs), points(inputs, outputs, seed=3), KEY)


def estimate(problem, task, estimator, optimizer=None):
    optimizer = optimizer or SGD(LR)
    return estimator(problem, optimizer, outer_variable(problem, optimizer), task)


def adapted(problem, task, steps=1):
    return adapt(problem, SGD(LR), outer_variable(problem, SGD(LR)), task, steps)


def test_loss_is_the_mean_over_rows_and_outputs():
    problem, given = FewShot(linear(2, 3)), points(outputs=3)
    prediction = draw(5, 3, seed=9)
    assert_close(problem.judge(prediction, given), (prediction - given.y).square().mean(), rtol=1e-14, atol=0)


def test_masked_mean_is_the_mean_over_the_real_rows():
    problem, given, prediction = FewShot(linear(2, 3)), points(outputs=3), draw(5, 3, seed=9)
    real = torch.tensor([True, False, True, True, False])
    found = problem.judge(prediction, given._replace(mask=real))
    assert_close(found, (prediction - given.y)[real].square().mean(), rtol=1e-14, atol=0)
    assert_close(problem.judge(prediction, given._replace(mask=real | True)), problem.judge(prediction, given))


def test_padded_rows_get_no_gradient():
    problem, given, prediction = FewShot(linear(2, 3)), points(outputs=3), draw(5, 3, seed=9)
    real = torch.tensor([True, False, True, True, False])
    slope = grad(lambda prediction: problem.judge(prediction, given._replace(mask=real)))(prediction)
    assert slope[~real].abs().max() == 0
    assert_close(slope[real], 2 / 9 * (prediction - given.y)[real], rtol=1e-13, atol=0)


@each_estimator
def test_the_values_of_padded_rows_change_nothing(estimator):
    ragged = task_at(regression_tasks(2, 1, ragged=True), 0)
    support, query = ragged.support, ragged.query
    cut = Task(*(Points(part.x[part.mask], part.y[part.mask]) for part in (support, query)), KEY)
    assert len(cut.support.x) < len(support.x)
    problem = FewShot(MLP([2, 4, 1], "Tanh").double())
    found, expected = (estimate(problem, given, estimator) for given in (ragged, cut))
    assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert_close(found.gradient, expected.gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("predicted", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 1)), ((4, 1), (1, 1))])
def test_predictions_and_targets_are_never_broadcast(predicted, target):
    problem = FewShot(linear(2, 1))
    with pytest.raises(InputError) as raised:
        problem.judge(torch.zeros(predicted), Points(torch.zeros(4, 2), torch.zeros(target)))
    assert str(raised.value).startswith(f"network: its predictions have shape {predicted} and the targets {target};")


def test_broadcast_raises_in_the_inner_and_in_the_outer_loss():
    problem, right = FewShot(linear(2, 1)), points()
    wrong = right._replace(y=right.y.squeeze(1))
    outer = problem.outer()
    with pytest.raises(InputError, match=r"predictions have shape \(5, 1\) and the targets \(5,\)"):
        problem.inner_loss({}, outer, Task(wrong, right, KEY), 0)
    with pytest.raises(InputError, match=r"predictions have shape \(5, 1\) and the targets \(5,\)"):
        problem.outer_loss({}, outer, Task(right, wrong, KEY))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_reduced_loss_raises(reduction):
    problem = FewShot(linear(2, 1), loss=nn.L1Loss(reduction=reduction))
    with pytest.raises(InputError, match=r'loss: L1Loss\(\) returned shape \(\) for targets.*set reduction="none"'):
        problem.judge(torch.zeros(5, 1, dtype=torch.float64), points())


def test_a_loss_of_ones_own_may_return_rows_or_trailing_dimensions():
    class PerRow(nn.Module):
        def forward(self, prediction, target):
            return (prediction - target).abs().sum(1)

    prediction, given = draw(5, 3, seed=9), points(outputs=3)
    error = (prediction - given.y).abs()
    assert_close(FewShot(linear(2, 3), loss=PerRow()).judge(prediction, given), error.sum(1).mean(), rtol=1e-14, atol=0)
    whole = FewShot(linear(2, 3), loss=nn.L1Loss(reduction="none"))
    assert_close(whole.judge(prediction, given), error.mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, True, False, True, False])])
def test_cross_entropy_with_classes(mask):
    x, classes = draw(5, 2, seed=1), torch.tensor([0, 2, 1, 2, 0])
    network = linear(2, 3)
    problem = FewShot(network, loss=nn.CrossEntropyLoss(reduction="none"))
    given = Points(x, classes, mask)
    probability = network(x).detach().softmax(1)
    real = torch.ones(5, dtype=torch.bool) if mask is None else mask
    loss = problem.inner_loss({}, problem.outer(), Task(given, given, KEY), 0)
    assert_close(loss, -probability[torch.arange(5), classes].log()[real].mean(), rtol=1e-13, atol=0)
    moved = adapted(problem, Task(given, given, KEY))
    error = (probability - nn.functional.one_hot(classes, 3))[real] / real.sum()
    assert_close(moved["weight"], network.weight - LR * error.T @ x[real], rtol=1e-12, atol=1e-14)
    assert_close(moved["bias"], network.bias - LR * error.sum(0), rtol=1e-12, atol=1e-14)


def test_cross_entropy_with_probabilities():
    target = draw(5, 3, seed=4).softmax(1)
    problem, prediction = FewShot(linear(2, 3), loss=nn.CrossEntropyLoss(reduction="none")), draw(5, 3, seed=9)
    expected = -(target * prediction.log_softmax(1)).sum(1).mean()
    assert_close(problem.judge(prediction, Points(draw(5, 2), target)), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("patterns", "adapted"),
    [
        (["*"], ["hidden1.weight", "hidden1.bias", "out.weight", "out.bias"]),
        (["out.*"], ["out.weight", "out.bias"]),
        (["hidden?.*"], ["hidden1.weight", "hidden1.bias"]),
        (["out.bias", "*.weight"], ["hidden1.weight", "out.weight", "out.bias"]),
    ],
)
def test_patterns_choose_what_is_handed_over(patterns, adapted):
    problem = FewShot(MLP([2, 3, 1]), adapt=patterns)
    outer = problem.outer()
    assert list(outer) == ["hidden1.weight", "hidden1.bias", "out.weight", "out.bias"]
    inner = problem.init(outer)
    assert list(inner) == adapted
    assert all(inner[name] is outer[name] for name in adapted)


@pytest.mark.parametrize(
    ("patterns", "wrong"),
    [(["head.*"], "head.*"), (["out.*", "head.*"], "head.*"), (["OUT.*"], "OUT.*"), (["head.*", "*"], "head.*")],
)
def test_a_pattern_that_matches_nothing_is_named_with_the_parameters_there_are(patterns, wrong):
    with pytest.raises(InputError) as raised:
        FewShot(MLP([2, 3, 1]), adapt=patterns)
    names = "['hidden1.weight', 'hidden1.bias', 'out.weight', 'out.bias']"
    assert str(raised.value) == f"adapt: the pattern {wrong!r} matches no trainable parameter; there are {names}"


def test_no_pattern_raises():
    with pytest.raises(InputError, match=r"adapt: no pattern is given.*\['weight', 'bias'\]"):
        FewShot(nn.Linear(2, 1), adapt=[])


@pytest.mark.parametrize("network", [nn.Tanh(), nn.Linear(2, 1).requires_grad_(False)])
def test_a_network_without_trainable_parameters_raises(network):
    # asked when training starts: until then it may be unfrozen
    with pytest.raises(InputError, match=r"network: it has no trainable parameter"):
        (problem := FewShot(network)).init(problem.outer())


def test_a_pattern_of_frozen_parameters_alone_raises():
    network = MLP([2, 3, 1])
    network.out.requires_grad_(False)
    problem = FewShot(network, adapt=["out.*"])
    with pytest.raises(
        InputError, match=r"'out.\*' matches no trainable parameter; there are \['hidden1.weight', 'hid"
    ):
        problem.init(problem.outer())
    network.out.requires_grad_(True)
    assert list(problem.init(problem.outer())) == ["out.weight", "out.bias"]


class Twice(nn.Module):
    """x ↦ W(Wx), one weight under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_weights_adapt_together():
    network, given = Twice().double(), task(2, 2)
    problem = FewShot(network)
    assert list(problem.outer()) == ["first.weight"]

    def after(W):
        return W - LR * grad(lambda W: (given.support.x @ W.T @ W.T - given.support.y).square().mean())(W)

    def loss(W):
        return (given.query.x @ after(W).T @ after(W).T - given.query.y).square().mean()

    W = network.first.weight.detach()
    found = estimate(problem, given, Unrolled(1))
    assert_close(found.inner, {"first.weight": after(W)}, rtol=1e-12, atol=1e-14)
    assert_close(found.gradient["problem"], {"first.weight": grad(loss)(W)}, rtol=1e-11, atol=1e-13)
    predicted = problem.predict(found.inner, {"first.weight": W}, given.query.x)
    assert_close(predicted, given.query.x @ after(W).T @ after(W).T, rtol=1e-12, atol=1e-14)


@each_estimator
@pytest.mark.parametrize("optimizer", [SGD(LR), MetaSGD(LR)], ids=["SGD", "MetaSGD"])
def test_frozen_parameters_neither_adapt_nor_get_an_outer_gradient_but_count(estimator, optimizer):
    network, given = linear(2, 1), task()
    network.bias.requires_grad_(False)
    found = estimate(FewShot(network), given, estimator, optimizer)
    assert found.inner.keys() == found.gradient["problem"].keys() == {"weight"}
    shifted = Task(*(part._replace(y=part.y - network.bias.detach()) for part in given[:2]), KEY)
    bare = nn.Linear(2, 1, bias=False).double()
    bare.weight = network.weight
    expected = estimate(FewShot(bare), shifted, estimator, optimizer)
    assert network.bias.abs() > 0.1
    assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=1e-14)
    assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)


@each_estimator
def test_unused_parameters_get_a_zero_gradient_and_stay(estimator):
    network = linear(2, 1)
    network.unused = nn.Parameter(draw(3, seed=7))
    found = estimate(FewShot(network), task(), estimator, MetaSGD(LR))
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_close(found.gradient["problem"]["unused"], zeros, rtol=0, atol=0)
    assert_close(found.gradient["optimizer"]["lr"]["unused"], zeros, rtol=0, atol=0)
    assert_close(found.inner["unused"], network.unused.detach(), rtol=0, atol=0)
    assert found.gradient["problem"]["weight"].abs().max() > 0


@each_estimator
def test_parameters_that_do_not_adapt_are_learned_all_the_same(estimator):
    found = estimate(FewShot(MLP([2, 3, 1], "Tanh").double(), adapt=["out.*"]), task(), estimator)
    assert found.inner.keys() == {"out.weight", "out.bias"}
    assert found.gradient["problem"]["hidden1.weight"].abs().max() > 0


def test_predict_is_the_network_with_the_adapted_parameters_put_in():
    network, given = MLP([2, 3, 1], "Tanh").double(), task()
    problem = FewShot(network, adapt=["out.*"])
    inner = adapted(problem, given, 2)
    tuned = copy.deepcopy(network)
    tuned.load_state_dict({**network.state_dict(), **inner})
    predicted = problem.predict(inner, problem.outer(), given.query.x)
    assert_close(predicted, tuned(given.query.x), rtol=1e-12, atol=0)
    assert_close(
        problem.judge(predicted, given.query), problem.outer_loss(inner, problem.outer(), given), rtol=0, atol=0
    )
    assert not torch.allclose(predicted, network(given.query.x))


def test_support_adapts_and_query_judges():
    problem, given = FewShot(linear(2, 1)), task()
    swapped = Task(given.query, given.support, KEY)
    outer = problem.outer()
    assert problem.inner_loss({}, outer, given, 0) == problem.outer_loss({}, outer, swapped)
    assert problem.inner_loss({}, outer, given, 0) != problem.outer_loss({}, outer, given)


def test_integer_targets_are_not_broadcast():
    points = Points(torch.zeros(4, 2), torch.tensor([1, 2, 3, 4]))
    with pytest.raises(InputError, match=r"returned shape \(4, 4\)"):
        FewShot(nn.Linear(2, 1), nn.MSELoss(reduction="none")).judge(torch.tensor([[1.0], [2], [3], [4]]), points)


def test_batch_norm_is_refused_where_rows_are_padding():
    problem = FewShot(nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    points = Points(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([True, True, False]))
    with pytest.raises(InputError, match="BatchNorm would mix the padding"):
        problem.inner_loss({}, problem.outer(), Task(points, points, torch.tensor(0)), 0)


def test_targets_without_a_column_are_told_to_have_one():
    with pytest.raises(InputError, match="with a column even if there is but one"):
        FewShot(nn.Linear(2, 1)).judge(torch.zeros(4, 1), Points(torch.zeros(4, 2), torch.zeros(4)))


def test_a_loss_with_trainable_parameters_is_refused():
    loss = nn.PReLU()
    with pytest.raises(InputError, match=r"PReLU.*trainable parameters"):
        FewShot(nn.Linear(2, 1), loss=loss)


def test_dropout_draws_anew_in_each_inner_step_in_the_outer_loss_and_for_each_task():
    problem, given = FewShot(MLP([2, 16, 1], dropout=0.5).double()), points(rows=20)
    outer = problem.outer()

    def losses(key):
        task = Task(given, given, torch.tensor(key))
        return [*(problem.inner_loss({}, outer, task, step) for step in range(3)), problem.outer_loss({}, outer, task)]

    values = torch.stack([*losses(0), *losses(1)])
    assert len(set(values.tolist())) == 8
    assert_close(torch.stack([*losses(0), *losses(1)]), values, rtol=0, atol=0)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: FewShot("MLP"), r"^network='MLP' is of type str; it must be a torch\.nn\.Module"),
        (lambda: FewShot(nn.Linear), r"^network=<class .*Linear'> is a class; it must be"),
        (lambda: FewShot(torch.tanh), r"^network=.*tanh.* is of type builtin_function_or_method; it must be"),
        (
            lambda: FewShot(nn.DataParallel(nn.Linear(2, 1))),
            r"^network: DataParallel shares rows.* its \.module",
        ),
        (
            lambda: FewShot(nn.Sequential(nn.DataParallel(nn.Linear(2, 1)))),
            r"^network: layer '0' \(DataParallel\) shares rows among devices",
        ),
        (
            lambda: FewShot(nn.Sequential(torch.jit.trace(nn.Linear(2, 1), torch.zeros(3, 2)))),
            r"^network: layer '0' \(TopLevelTracedModule\) cannot be evaluated with other parameters",
        ),
        (
            lambda: FewShot(nn.Sequential(nn.Tanh(), nn.LazyLinear(1))),
            r"^network: layer '1' \(LazyLinear\) has no values for weight yet; initialise it first",
        ),
        (lambda: FewShot(nn.Linear(2, 1, device="meta")), r"^network: Linear has no values for weight yet"),
        (lambda: FewShot(nn.Linear(2, 1), nn.functional.l1_loss), r"^loss=l1_loss is of type function; give a module"),
        (lambda: FewShot(nn.Linear(2, 1), nn.MSELoss), r"^loss=MSELoss is of type type; give a module"),
        (lambda: FewShot(nn.Linear(2, 1), "mse"), r"^loss='mse' is of type str; give a module"),
    ],
)
def test_arguments_of_another_kind_are_told(make, told):
    with pytest.raises(InputError, match=told):
        make()


def test_a_network_or_a_loss_that_returns_no_tensor_is_told():
    with pytest.raises(InputError, match=r"^network: it returned a tuple; it must return one tensor \[rows, outputs\]"):
        estimate(FewShot(Pair(2, 1).double()), task(), Unrolled(1))

    class Number(nn.Module):
        def forward(self, prediction, target):
            return 1.0

    with pytest.raises(InputError, match=r"^loss: Number\(\) returned a float; it must return a tensor \[rows\]"):
        estimate(FewShot(linear(2, 1), Number()), task(), Unrolled(1))


def test_one_pattern_need_not_be_in_a_list():
    assert FewShot(linear(2, 1), adapt="weight").adapted == ["weight"]


def test_ignored_classes_count_nowhere():
    torch.manual_seed(0)
    scores, y = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    y[0, :2], y[1, 4] = -100, -100
    problem = FewShot(torch.nn.Linear(1, 3))
    found = vmap(lambda scores, y: problem.judge(scores, Points(torch.zeros(5, 1), y)))(scores, y)
    assert_close(found, torch.stack([F.cross_entropy(*pair) for pair in zip(scores, y, strict=True)]))
    mask = torch.arange(5) != 0
    masked = problem.judge(scores[1], Points(torch.zeros(5, 1), y[1], mask))
    assert_close(masked, F.cross_entropy(scores[1][1:], y[1][1:]))


@pytest.mark.parametrize("adapt", [["*"], ["out.*"]], ids=["MAML", "ANIL"])
def test_the_proximal_term_draws_what_adapts_to_its_outer_value(adapt):
    network, given = MLP([2, 3, 1], "Tanh").double(), task()
    plain, problem = FewShot(network, adapt=adapt), FewShot(network, adapt=adapt, proximal=0.6)
    outer = problem.outer()
    moved = {name: value + draw(*value.shape, seed=8) for name, value in problem.init(outer).items()}
    distance = sum(draw(*value.shape, seed=8).square().sum() for value in moved.values())
    found = problem.inner_loss(moved, outer, given, 0) - plain.inner_loss(moved, outer, given, 0)
    assert_close(found, 0.3 * distance, rtol=1e-11, atol=0)
    assert problem.outer_loss(moved, outer, given) == plain.outer_loss(moved, outer, given)


def test_what_is_reset_starts_at_zero_and_learns_nothing_whatever_it_is():
    network, given = MLP([2, 3, 1], "Tanh", context=2).double(), task()
    network.context.data = draw(2, seed=8)
    problem = FewShot(network, adapt=["context"], reset=["context"])
    outer = problem.outer()
    assert list(outer) == [name for name, _ in network.named_parameters() if name != "context"]
    start = problem.init(outer)
    assert_close(start, {"context": torch.zeros(2, dtype=torch.float64)}, rtol=0, atol=0)
    found = estimate(problem, given, Unrolled(2))
    assert found.gradient["problem"].keys() == outer.keys()
    assert found.inner["context"].abs().min() > 0
    network.context.data.zero_()
    network.context.requires_grad_(False)
    again = estimate(FewShot(network, adapt=["context"], reset=["context"]), given, Unrolled(2))
    assert_close(again, found, rtol=0, atol=0)
    both = FewShot(network, reset=["context"])
    assert both.adapted == [*outer, "context"]
    assert all(both.init(outer)[name] is value for name, value in outer.items())


def test_a_pattern_of_what_is_reset_must_match_what_adapts():
    with pytest.raises(InputError, match=r"^reset: the pattern 'context' matches no adapted parameter; there are \['o"):
        FewShot(MLP([2, 3, 1], context=2), adapt=["out.*"], reset=["context"])
