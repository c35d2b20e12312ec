"""Learners of classes on images: their episodes by a plain loop, and MAML's gradient by differences."""

import math
from functools import partial

import pytest
import torch
from cases import draw, task_at
from torch import nn
from torch.testing import assert_close

from metalit.adapt import adapt, outer_variable
from metalit.errors import InputError
from metalit.hypergradients import Direct, Unrolled, over_tasks
from metalit.inner import SGD, Adam, MetaSGD
from metalit.inner.none import NoSteps
from metalit.modules.learned import brought
from metalit.networks import MLP, Conv4
from metalit.problem import Points, Task
from metalit.problems import BayesianHead, FewShot, Matching, ProtoMAML, Prototypes, RidgeHead
from metalit.tree import flatten, norm, tree_map, unflatten

WAYS, SIZE = 3, 16


def episodes(shots=2, queries=2, count=2):
    """Tasks of images of noise, class by class."""

    def points(rows, seed):
        y = torch.arange(WAYS).repeat_interleave(rows).expand(count, -1)
        shift = draw(count, WAYS, 1, SIZE, SIZE, seed=9).repeat_interleave(rows, 1)
        return Points(shift + draw(count, WAYS * rows, 1, SIZE, SIZE, seed=seed), y)

    classes = torch.arange(WAYS).expand(count, -1)
    return Task(points(shots, 1), points(queries, 2), torch.arange(count), classes)


def conv4(norm="BatchNorm2d", ways=None, width=8):
    torch.manual_seed(0)
    network = Conv4(1, SIZE, width, ways, norm).double()
    for value in network.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return network


def log_softmax(logits):
    return [logit - math.log(sum(math.exp(other) for other in logits)) for logit in logits]


def features(network, points):
    """Of each row, as lists: BatchNorm has seen this set alone."""
    return [row.tolist() for row in network.train()(points.x).detach()]


def protonet(network, task):
    """The log-probabilities of each query row."""
    support, query = features(network, task.support), features(network, task.query)
    prototypes = []
    for k in range(WAYS):
        mine = [f for f, y in zip(support, task.support.y.tolist(), strict=True) if y == k]
        prototypes.append([sum(column) / len(mine) for column in zip(*mine, strict=True)])
    found = []
    for f in query:
        squares = [sum((a - b) ** 2 for a, b in zip(f, c, strict=True)) for c in prototypes]
        found.append(log_softmax([-square for square in squares]))
    return found


def matching(network, task):
    support, query = features(network, task.support), features(network, task.query)
    found = []
    for f in query:
        cosines = []
        for g in support:
            lengths = math.sqrt(sum(a * a for a in f)) * math.sqrt(sum(b * b for b in g))
            cosines.append(sum(a * b for a, b in zip(f, g, strict=True)) / lengths)
        attention = [math.exp(a) for a in log_softmax(cosines)]
        shares = [0.0] * WAYS
        for a, y in zip(attention, task.support.y.tolist(), strict=True):
            shares[y] += a
        found.append([math.log(share) for share in shares])
    return found


def ridge(network, task, penalty, scale, shift):
    """W one class after the other, from the normal equations of features."""
    phi, query = (torch.tensor(features(network, points), dtype=torch.float64) for points in task[:2])
    columns = []
    for k in range(WAYS):
        target = torch.tensor([float(y == k) for y in task.support.y.tolist()], dtype=torch.float64)
        gram = sum(torch.outer(row, row) for row in phi) + penalty * torch.eye(phi.shape[1], dtype=torch.float64)
        columns.append(torch.linalg.solve(gram, sum(row * t for row, t in zip(phi, target, strict=True))))
    return [log_softmax([float(scale * (row @ w) + shift) for w in columns]) for row in query]


def posed(kind):
    network = conv4()
    if kind == "ProtoNet":
        return Prototypes(network), partial(protonet, network)
    if kind == "Matching":
        return Matching(network), partial(matching, network)
    problem = RidgeHead(network, log_penalty=0.3, classes=True, scale=4.0).double()
    problem.shift.data += 0.7
    return problem, partial(ridge, network, penalty=math.exp(0.3), scale=4.0, shift=0.7)


@pytest.mark.parametrize("kind", ["ProtoNet", "Matching", "RidgeHead"])
def test_an_episode_is_that_of_a_plain_loop(kind):
    (problem, loop), tasks = posed(kind), episodes()
    outer = problem.outer()
    for index in range(2):
        task = task_at(tasks, index)
        problem.check(task)
        inner = problem.init(outer, task)
        expected = loop(task)
        answers = problem.predict(inner, outer, task.query.x).log_softmax(1)
        assert_close(answers, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-11)
        losses = [-row[y] for row, y in zip(expected, task.query.y.tolist(), strict=True)]
        assert_close(problem.outer_loss(inner, outer, task).item(), sum(losses) / len(losses), rtol=1e-10, atol=1e-11)


PROBLEMS = {
    "MAML": lambda: FewShot(conv4(ways=WAYS)),
    "MAML, no norm": lambda: FewShot(conv4(None, WAYS)),
    "MAML, GroupNorm": lambda: FewShot(conv4("GroupNorm", WAYS)),
    "ANIL": lambda: FewShot(conv4(ways=WAYS), adapt=["out.*"]),
    "BOIL": lambda: FewShot(conv4(ways=WAYS), adapt=["conv*", "norm*"]),
    "MAML++": lambda: FewShot(conv4(ways=WAYS), per_step=["norm*"]),
    "ProtoMAML": lambda: ProtoMAML(conv4()),
    "ProtoNet": lambda: posed("ProtoNet")[0],
    "Matching": lambda: posed("Matching")[0],
    "RidgeHead": lambda: posed("RidgeHead")[0],
}


def made(name):
    """A problem, how it is adapted and learned, and its outer variable."""
    problem = PROBLEMS[name]()
    without = problem.adapts_in_init
    optimizer, hypergradient = (NoSteps(), Direct()) if without else (SGD(0.1), Unrolled(2))
    problem.trained_for(2)
    outer = outer_variable(problem, optimizer)
    return problem, optimizer, hypergradient, tree_map(torch.Tensor.detach, outer)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_outer_gradient_agrees_with_central_differences(name):
    # along directions so short that no pixel changes its side of a ReLU, or a maximum its place
    problem, optimizer, hypergradient, outer = made(name)
    task = task_at(episodes(), 0)
    gradient = flatten(hypergradient(problem, optimizer, outer, task).gradient)
    point = flatten(outer)

    def loss(at):
        given = unflatten(at, outer)
        inner = adapt(problem, optimizer, given, task, hypergradient.steps)
        return problem.after(hypergradient.steps).outer_loss(inner, given["problem"], task)

    for seed in range(3):
        along, step = nn.functional.normalize(draw(len(point), seed=seed), dim=0), 3e-7
        difference = (loss(point + step * along) - loss(point - step * along)) / (2 * step)
        assert_close(gradient @ along, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_tasks_at_once_are_one_after_the_other(name):
    problem, optimizer, hypergradient, outer = made(name)
    tasks = episodes()
    found = over_tasks(hypergradient, problem, optimizer, outer, tasks)
    each = [hypergradient(problem, optimizer, outer, task_at(tasks, index)) for index in range(2)]
    assert_close(found.loss, (each[0].loss + each[1].loss) / 2, rtol=1e-11, atol=0)
    mean = tree_map(lambda a, b: (a + b) / 2, *(one.gradient for one in each))
    assert norm(tree_map(torch.sub, found.gradient, mean)) < 1e-10 * norm(mean)


@pytest.mark.parametrize("optimizer", [SGD(0.05), Adam(0.01)])
def test_proto_maml_begins_as_protonet_and_descends_from_there(optimizer):
    task, network = task_at(episodes(), 0), conv4()
    problems = Prototypes(network), ProtoMAML(network)
    logits = []
    for problem in problems:
        outer = problem.outer()
        logits.append(problem.predict(problem.init(outer, task), outer, task.query.x).log_softmax(1))
    assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-11)
    outer = outer_variable(problems[1], optimizer, task)
    losses = [
        problems[1].inner_loss(adapt(problems[1], optimizer, outer, task, steps), outer["problem"], task, 0)
        for steps in (0, 3)
    ]
    assert losses[1] < 0.9 * losses[0]


def padded(task):
    """The same task with rows of padding, which are of class 0."""

    def longer(points):
        x = torch.cat([points.x, torch.zeros_like(points.x[:2])])
        y = torch.cat([points.y, torch.zeros_like(points.y[:2])])
        return Points(x, y, torch.arange(len(y)) < len(points.y))

    return task._replace(support=longer(task.support), query=longer(task.query))


@pytest.mark.parametrize("kind", [Prototypes, Matching, ProtoMAML, partial(RidgeHead, classes=True), "ignored"])
def test_rows_of_padding_and_what_the_criterion_ignores_do_not_count(kind):
    ignored = kind == "ignored"
    problem = (Prototypes if ignored else kind)(conv4("GroupNorm")).double()
    task = task_at(episodes(), 0)
    longer = padded(task)
    if ignored:
        whole = [part._replace(y=torch.where(part.mask, part.y, -100), mask=None) for part in longer[:2]]
        longer = longer._replace(support=whole[0], query=whole[1])
    outer = problem.outer()
    found, expected = (problem.outer_loss(problem.init(outer, given), outer, given) for given in (longer, task))
    assert_close(found, expected, rtol=1e-12, atol=0)
    normed = Prototypes(conv4())
    with pytest.raises(InputError, match="BatchNorm would mix the padding"):
        normed.init(normed.outer(), padded(task))


def test_what_cannot_be_is_said():
    task = task_at(episodes(), 0)
    real = task._replace(
        **{name: part._replace(y=part.y.double()) for name, part in zip(("support", "query"), task[:2], strict=True)}
    )
    for problem in (
        Prototypes(nn.Flatten()),
        Matching(nn.Flatten()),
        ProtoMAML(conv4()),
        RidgeHead(nn.Flatten(), classes=True),
    ):
        name = type(problem).__name__
        with pytest.raises(
            InputError, match=rf"data: {name} names classes, \[rows\] whole numbers, and the targets are"
        ):
            problem.check(real)
        with pytest.raises(InputError, match=rf"data: {name} needs the number of classes of a task"):
            problem.check(task._replace(classes=None))
        with pytest.raises(InputError, match="so the number of classes is not known"):
            problem.init(problem.outer(), task._replace(classes=None))
    with pytest.raises(InputError, match="BayesianHead predicts real numbers"):
        BayesianHead(1, 1).check(task)
    with pytest.raises(InputError, match="would be ProtoMAML's own head"):
        ProtoMAML(nn.ModuleDict({"head": nn.Linear(1, 1)}))
    problem = ProtoMAML(conv4())
    with pytest.raises(InputError, match="the head of ProtoMAML is made of a task's support set"):
        problem.init(problem.outer())
    with pytest.raises(
        InputError, match=r"inner_optimizer MetaSGD learns .* ProtoMAML.init is called .* SGD with numbers"
    ):
        brought(problem, MetaSGD(), 1)
    with pytest.raises(InputError, match=r"scale=0\.0 must be a finite positive number"):
        RidgeHead(nn.Flatten(), classes=True, scale=0.0)


def test_dropout_follows_the_key_of_the_task():
    task, problem = task_at(episodes(), 0), ProtoMAML(MLP([SIZE**2, 8, 4], dropout=0.5).double())
    starts = [flatten(problem.init(problem.outer(), task._replace(key=torch.tensor(key)))) for key in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
