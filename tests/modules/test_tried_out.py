"""Networks and losses of the user's that fail, or cannot do all that is asked, are told of before training."""

import random
import warnings

import numpy as np
import pytest
import torch
from fits import last, parameters, regression, trainer
from torch import nn
from torch.utils.data import DataLoader

from metalit.data import BatchDataModule, Episodes, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.hypergradients import FirstOrder, Implicit, Unrolled, over_tasks
from metalit.inner import SGD, Newton
from metalit.linsolve import CG, Dense
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot


def sine():
    return TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.GRU(1, 3, batch_first=True)
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.deep(x.unsqueeze(1))[0][:, -1])


def recurrent(**options):
    torch.manual_seed(1)
    return MetaLearner(FewShot(Recurrent()), SGD(0.1), Unrolled(2), eval_steps=2, **options)


def test_a_recurrent_network_is_learned_and_told_of_once(tmp_path, capsys):
    ends = []
    for options in ({}, {"tasks_per_chunk": 1}, {"compile": True, "fused_steps": 2}):
        module = recurrent(**options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer(tmp_path, log_every_n_steps=2).fit(module, sine())
        lines = [str(line.message) for line in told if "one after the other" in str(line.message)]
        assert lines == [
            "tasks are evaluated one after the other, which is exact and slower: layer 'network.deep' (GRU) has no "
            "rule for many at once"
        ]
        assert ("is not compiled, since its tasks" in capsys.readouterr().out) == ("compile" in options)
        ends.append(parameters(module))
        assert module.adapt(torch.zeros(3, 1), torch.ones(3, 1))(torch.zeros(2, 1)).shape == (2, 1)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(ends[0]["problem.deep.weight_ih_l0"], parameters(recurrent())["problem.deep.weight_ih_l0"])


class Bent(nn.Module):
    """Two layers with a fault between them."""

    def __init__(self, fault):
        super().__init__()
        self.first, self.second = nn.Linear(1, 4), nn.Linear(4, 1)
        self.fault = fault

    def forward(self, x):
        return self.second(self.fault(self.first(x)))


class Fault(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


FAULTS = {
    "too wide": (
        nn.Linear(2, 1),
        r"network cannot take inputs of shape \(5, 1\), 1 column\(s\) of x: mat1 and",
    ),
    "deep inside": (
        nn.Sequential(nn.Linear(1, 4), nn.Sequential(nn.Tanh(), nn.Linear(3, 1))),
        r"network: layer '1\.1' \(Linear\) fails with RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ),
    "an attribute": (Bent(Fault(lambda x: x.shap)), r"layer 'fault' \(Fault\) fails with AttributeError: .*'shap'"),
    "numpy": (Bent(Fault(lambda x: x + x.numpy())), r"layer 'fault' \(Fault\) fails with RuntimeError: "),
    "types": (
        Bent(Fault(lambda x: x.double())),
        r"layer 'second' \(Linear\) fails with RuntimeError: .*dtype.*; x is of torch.float32, the network's",
    ),
    "arguments": (Bent(nn.Bilinear(4, 4, 4)), r"network: layer 'fault'.*|fails with TypeError: .*missing 1 required"),
    "no second derivative": (Bent(Fault(lambda x: torch.cdist(x, torch.eye(4)))), r"second derivative of cdist"),
    "Python's dice": (
        Bent(Fault(lambda x: x * random.random())),
        "draws from the generators of Python or numpy",
    ),
    "numpy's dice": (
        Bent(Fault(lambda x: x * np.random.rand())),
        "draws from the generators of Python or numpy",
    ),
    "a class too many": (
        nn.Sequential(Fault(torch.Tensor.long), nn.Embedding(2, 1), nn.Flatten()),
        r"network: layer '1' \(Embedding\) fails with IndexError: index out of range",
    ),
    "one row": (
        Bent(Fault(lambda x: nn.functional.batch_norm(x[:1], None, None, training=True).expand(5, 4))),
        r"layer 'fault' \(Fault\) has no statistics of a single value: .*; give more rows, or use GroupNorm or LayerNo",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_network_that_fails_is_told_with_its_layer_before_training(name, tmp_path):
    network, told = FAULTS[name]
    module = MetaLearner(FewShot(network), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=told) as raised:
        trainer(tmp_path).fit(module, sine())
    assert "\n" not in str(raised.value)
    assert ("cannot take inputs" in str(raised.value)) == (name == "too wide")


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (
            nn.BatchNorm1d(4),
            r"layer 'fault' \(BatchNorm1d\) has no statistics of a single value: .*; give more rows, or",
        ),
        (
            nn.Sequential(nn.Unflatten(1, (4, 1)), nn.InstanceNorm1d(4), nn.Flatten()),
            r"layer 'fault\.1' \(InstanceNorm1d\) has no statistics of a single value: .*GroupNorm or LayerNorm",
        ),
    ],
    ids=["BatchNorm", "InstanceNorm"],
)
def test_one_shot_has_no_statistics(layer, told, tmp_path):
    data = TaskDataModule(Sine(), *[Episodes(4, 1, 5)] * 3)
    with pytest.raises(InputError, match=rf"^model\.problem\.network: {told}"):
        trainer(tmp_path).fit(MetaLearner(FewShot(Bent(layer)), SGD(0.1), Unrolled(1)), data)


def test_a_network_that_fails_on_a_loader_of_the_user_s_is_told_likewise(tmp_path):
    points = Points(torch.zeros(8, 5, 3), torch.zeros(8, 5, 1))
    tasks = DataLoader([0, 1], 1, collate_fn=lambda _: Task(points, points, torch.arange(8)))
    module = MetaLearner(FewShot(MLP([2, 4, 1])), SGD(0.1), FirstOrder(1))
    with pytest.raises(InputError, match=r"^model.problem.network cannot take inputs of shape \(5, 3\), 3 column\(s\)"):
        trainer(tmp_path).fit(module, tasks)


class Faulty(Problem):
    def __init__(self, fault):
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(()))
        self.head = Fault(fault)

    def init(self, outer, task):
        return {"w": torch.ones(3)}

    def inner_loss(self, inner, outer, task, step):
        return self.head(inner["w"]).square().sum() * outer["log_weight"].exp()

    def outer_loss(self, inner, outer, task):
        return inner["w"].sum()


def test_a_problem_that_fails_is_told_with_its_layer(tmp_path):
    module = BilevelLearner(Faulty(lambda w: w @ torch.ones(2)), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=r"^model.problem: layer 'head' \(Fault\) fails with RuntimeError: .*size"):
        trainer(tmp_path).fit(module)
    module = BilevelLearner(Faulty(lambda w: torch.cdist(w[None], 2 * w[None])), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=r"^problem: torch has no second derivative of cdist"):
        trainer(tmp_path).fit(module)


class Wide(nn.Module):
    """Two layers of two types."""

    def __init__(self, dtype):
        super().__init__()
        self.narrow, self.wide = nn.Linear(1, 4), nn.Linear(4, 1).to(dtype)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x)).to(self.wide.weight.dtype)).float()


@pytest.mark.parametrize("optimizer", [SGD(0.1), Newton(1.0)], ids=["SGD", "Newton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_several_types_keep_theirs_and_get_the_gradients_of_a_plain_loop(dtype, optimizer, tmp_path):
    torch.manual_seed(0)
    module = MetaLearner(
        FewShot(Wide(dtype)), optimizer, Unrolled(1), optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0)
    )
    before, data = parameters(module), sine()
    own = {name.removeprefix("problem."): value for name, value in before.items()}
    tasks = module.cast(data.draw("train", torch.arange(4)))
    slopes = over_tasks(Unrolled(1), module.problem, optimizer, {"problem": own, "optimizer": {}}, tasks).gradient
    trainer(tmp_path, steps=1, val_check_interval=1).fit(module, data)
    assert {name: slope.dtype for name, slope in slopes["problem"].items()} == {n: v.dtype for n, v in own.items()}
    for name, value in parameters(module).items():
        assert torch.equal(value, before[name] - slopes["problem"][name.removeprefix("problem.")])
    if dtype == torch.float64:  # not rounded on its way
        assert not torch.equal(slopes["problem"]["wide.weight"], slopes["problem"]["wide.weight"].float().double())


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.complex64, r"^model: its parameter problem\.wide\.weight is of torch\.complex64, and complex"),
        (torch.half, r"^model: its parameter problem\.wide\.weight is of torch\.float16, where small"),
    ],
)
def test_types_in_which_nothing_can_be_learned_are_refused(dtype, told, tmp_path):
    with pytest.raises(InputError, match=told):
        trainer(tmp_path).fit(MetaLearner(FewShot(Wide(dtype)), SGD(0.1), Unrolled(1)), sine())
    tables = BatchDataModule(regression(inputs=1), batch_size=7)
    with pytest.raises(InputError, match=told.replace("problem", "network")):
        trainer(tmp_path).fit(SupervisedLearner(Wide(dtype)), tables)


def test_images_and_classes_are_adapted_to(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    points = [Points(torch.randn(5, 1, 4, 4), torch.arange(5) % 3) for _ in range(4)]
    module = MetaLearner(FewShot(network), SGD(0.1), Unrolled(1), eval_steps=2)
    trainer(tmp_path).fit(module, DataLoader(list(zip(points, points, strict=True)), 2))
    adapted = module.adapt(*points[0][:2])
    assert adapted(points[1].x).table.shape == (5, 3)
    assert torch.equal(module.adapt(points[0].x.numpy(), points[0].y)(points[1].x).table, adapted(points[1].x).table)
    with pytest.raises(InputError, match=r"^adapt: x is of type str; give a tensor"):
        module.adapt("pictures", points[0].y)
    with pytest.raises(InputError, match=r"^adapt: x has shape \(\); the network takes \[rows, \.\.\.\]"):
        adapted(torch.tensor(1.0))


class Scales(Problem):
    """An inner variable of two types, both of which solve their share of ½‖w − φ‖²."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2, dtype=torch.float64) / 3)
        self.rho = nn.Parameter(torch.ones(2) / 3)

    def init(self, outer, task):
        return {"wide": torch.zeros(2, dtype=torch.float64), "narrow": torch.zeros(2)}

    def inner_loss(self, inner, outer, task, step):
        return 0.5 * sum((inner[n] - outer[p]).square().sum() for n, p in (("wide", "phi"), ("narrow", "rho")))

    def outer_loss(self, inner, outer, task):
        return (inner["wide"] - 1).square().sum() + (inner["narrow"] - 1).square().sum()


@pytest.mark.parametrize("hypergradient", [Unrolled(1), Implicit(1, Dense()), Implicit(1, CG())])
@pytest.mark.parametrize("optimizer", [SGD(0.5), Newton()], ids=["SGD", "Newton"])
def test_an_inner_variable_of_several_types_keeps_them_through_solvers_and_warm_starts(
    hypergradient, optimizer, tmp_path
):
    problem = Scales()
    own = {"problem": problem.outer(), "optimizer": {}}
    estimate = hypergradient(problem, optimizer, own, None)
    types = {"wide": torch.float64, "narrow": torch.float32}
    assert {name: value.dtype for name, value in estimate.inner.items()} == types
    assert {name: value.dtype for name, value in estimate.gradient["problem"].items()} == {
        "phi": torch.float64,
        "rho": torch.float32,
    }
    module = BilevelLearner(problem, optimizer, hypergradient, warm_start=True)
    trainer(tmp_path).fit(module)
    assert {name: value.dtype for name, value in module.inner.items()} == types
    assert not torch.equal(module.inner["wide"], module.inner["wide"].float().double())
    again = BilevelLearner(Scales(), optimizer, hypergradient, warm_start=True)
    trainer(tmp_path, steps=6, val_check_interval=1).fit(again, ckpt_path=last(tmp_path))
    assert {name: value.dtype for name, value in again.solve(None).items()} == types


@pytest.mark.parametrize(
    ("network", "loss", "told"),
    [
        (nn.Linear(2, 1), None, r"^model cannot take inputs of shape \(4, 3\), 3 column\(s\) of x: mat1"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 1)),
            None,
            r"^model: layer 'network\.1' \(Linear\) fails with",
        ),
        (
            nn.Linear(3, 1),
            nn.CrossEntropyLoss(reduction="none", weight=torch.ones(3)),
            r"^loss: it fails on what the network",
        ),
        (nn.GRU(3, 1), None, r"^network: it returned a tuple"),
    ],
)
def test_a_supervised_network_or_loss_that_fails_is_told_likewise(network, loss, told, tmp_path):
    rows = list(zip(torch.randn(8, 3), torch.randn(8, 1), strict=True))
    with pytest.raises(InputError, match=told):
        trainer(tmp_path).fit(SupervisedLearner(network, loss), DataLoader(rows, 4))


def test_finding_the_cause_leaves_the_network_as_it_was(tmp_path):
    network = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 4), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError, match=r"layer '2' \(Linear\) fails with RuntimeError"):
        trainer(tmp_path).fit(MetaLearner(FewShot(network), SGD(0.1), Unrolled(1)), sine())
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_fewer_outputs_than_classes_are_told(tmp_path):
    points = [Points(torch.randn(5, 2), torch.arange(5) % 3) for _ in range(4)]
    module = MetaLearner(FewShot(nn.Linear(2, 2)), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=r"^loss: it fails on what the network predicts with IndexError: Target 2"):
        trainer(tmp_path).fit(module, DataLoader(list(zip(points, points, strict=True)), 2))
