"""Which parameters train is asked when training starts, and followed while it goes on."""

from functools import partial

import pytest
import torch
from fits import bare, blobs, parameters, same, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from tiny import DATA
from torch.nn import functional as F

from metalit.data import BatchDataModule, SplitsDataModule
from metalit.errors import InputError
from metalit.hypergradients import Unrolled, over_tasks
from metalit.inner import SGD, MetaSGD
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import Cleaning, FewShot
from metalit.tree import leaves

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def net(inputs=1, outputs=1):
    torch.manual_seed(0)
    return MLP([inputs, 4, outputs], activation="Tanh")


def few_shot(network, inner=None, kind=MetaLearner, adapt=("*",), **options):
    options = {"eval_steps": 1, "optimizer": sgd, **options}
    return kind(FewShot(network, adapt=adapt), inner or SGD(0.05), Unrolled(1), **options)


LEARNERS = {
    "MAML": (net, few_shot, "meta"),
    "ANIL": (net, partial(few_shot, adapt=["out.*"]), "meta"),
    "Meta-SGD": (net, partial(few_shot, inner=MetaSGD(0.05)), "meta"),
    "bilevel": (net, partial(few_shot, kind=BilevelLearner), "meta"),
    "supervised": (partial(net, 4, 3), partial(SupervisedLearner, optimizer=sgd), "supervised"),
}


@pytest.mark.parametrize("freezes", [True, False])
@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_frozen_after_the_learner_was_made(name, freezes, tmp_path):
    network, make, data = LEARNERS[name]
    early, late = network(), network()
    early.hidden1.requires_grad_(not freezes)
    first = make(early)
    late.hidden1.requires_grad_(freezes)
    second = make(late)
    late.hidden1.requires_grad_(not freezes)
    before = {name: value.clone() for name, value in early.state_dict().items()}
    for module in (first, second):
        bare(tmp_path).fit(module, DATA[data]())
    assert same(first, second)
    assert parameters(first).keys() == parameters(second).keys()
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in late.state_dict().items():
        assert torch.equal(value, before[key]) == (freezes and key.startswith("hidden1")), key


def test_a_network_that_is_frozen_as_a_whole_may_be_unfrozen(tmp_path):
    for name in ("MAML", "supervised"):
        network, make, data = LEARNERS[name]
        frozen = network().requires_grad_(False)
        module = make(frozen)
        with pytest.raises(InputError, match="no trainable parameter"):
            bare(tmp_path).fit(module, DATA[data]())
        frozen.requires_grad_(True)
        bare(tmp_path).fit(module, DATA[data]())


def test_a_pattern_is_matched_when_training_starts(tmp_path):
    network = net()
    network.out.requires_grad_(False)
    module = few_shot(network, adapt=["out.*"])
    with pytest.raises(
        InputError, match=r"'out.\*' matches no trainable parameter; there are \['hidden1.weight', 'hid"
    ):
        bare(tmp_path).fit(module, DATA["meta"]())
    network.out.requires_grad_(True)
    bare(tmp_path).fit(module, DATA["meta"]())
    assert list(module.adapt(torch.zeros(1, 1), torch.zeros(1, 1)).inner) == ["out.weight", "out.bias"]


def test_what_was_learned_of_step_sizes_stays_when_more_adapt(tmp_path):
    network = net()
    network.hidden1.requires_grad_(False)
    module = few_shot(network, MetaSGD(0.05))
    bare(tmp_path).fit(module, DATA["meta"]())
    known = {name: value.clone() for name, value in leaves(module.learned.tree)}
    assert list(known) == ["lr.out.weight", "lr.out.bias"]
    network.hidden1.requires_grad_(True)
    bare(tmp_path).test(module, DATA["meta"](), verbose=False)
    present = dict(leaves(module.learned.tree))
    assert all(torch.equal(present[name], value) for name, value in known.items())
    assert float((present["lr.hidden1.weight"] - 0.05).abs().max()) == 0


# ---- while training goes on


class At(Callback):
    """Calls ``change`` on the network before the step after ``step``."""

    def __init__(self, step, change):
        self.step = step
        self.change = change

    def on_train_batch_start(self, run, module, *_):
        if run.global_step == self.step:
            self.change(module)


def freeze(network):
    return lambda module: network.hidden1.requires_grad_(False)


def unfreeze(network, knows=True):
    def change(module):
        network.hidden1.requires_grad_(True)
        if knows:
            group = {"params": list(network.hidden1.parameters()), "lr": 0.02}
            module.optimizers(use_pl_optimizer=False).add_param_group(group)

    return change


def by_hand(network, slopes, steps, changes, adds):
    """Steps of SGD with momentum on gradients that ``slopes(step)`` finds, by name.

    Before the steps in ``changes`` the hidden layer is frozen, or unfrozen; ``adds`` it to the optimiser at step 2.
    """
    optimizer = sgd([{"params": [parameter for parameter in network.parameters() if parameter.requires_grad]}])
    for step in range(steps):
        if step in changes:
            network.hidden1.requires_grad_(not network.hidden1.weight.requires_grad)
        if adds and step == 2:
            optimizer.add_param_group({"params": list(network.hidden1.parameters()), "lr": 0.02})
        found = slopes(step)
        for name, parameter in network.named_parameters():
            parameter.grad = found.get(name)
        optimizer.step()


def supervised_case():
    data = BatchDataModule(blobs(60), batch_size=8)
    data.setup("validate")

    def slopes(network, step):
        points = data.draw("train", torch.arange(8 * step, 8 * step + 8))
        wanted = {name: value for name, value in network.named_parameters() if value.requires_grad}
        loss = F.cross_entropy(network(points.x), points.y)
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    make = lambda network: SupervisedLearner(network, optimizer=sgd)  # noqa: E731
    return partial(net, 4, 3), make, lambda: BatchDataModule(blobs(60), batch_size=8), slopes


def meta_case():
    def slopes(network, step):
        problem = FewShot(network)
        tasks = DATA["meta"]().draw("train", torch.arange(2 * step, 2 * step + 2))
        outer = {"problem": problem.outer(), "optimizer": {}}
        return over_tasks(Unrolled(1), problem, SGD(0.05), outer, tasks).gradient["problem"]

    return net, few_shot, DATA["meta"], slopes


CASES = {"supervised": supervised_case, "meta": meta_case}


@pytest.mark.parametrize(("begins", "fused"), [(True, 1), (False, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("case", CASES)
def test_a_callback_may_freeze_and_unfreeze(case, begins, fused, tmp_path):
    network, make, data, slopes = CASES[case]()
    networks = [network().double(), network().double()]
    for each in networks:
        each.hidden1.requires_grad_(begins)
    mine, theirs = networks
    steps = [2, 4] if begins else [2]  # frozen and unfrozen again, or unfrozen
    by_hand(theirs, partial(slopes, theirs), 6, steps, adds=not begins)
    change = [freeze(mine), unfreeze(mine, knows=False)] if begins else [unfreeze(mine)]
    callbacks = [At(step, each) for step, each in zip(steps, change, strict=True)]
    options = {} if case == "supervised" else {"fused_steps": fused}
    module = make(mine, **options)
    # not validated before the end: Lightning would forget the gradients
    run = bare(tmp_path, 6, callbacks=callbacks, precision="64-true", log_every_n_steps=2, val_check_interval=6)
    run.fit(module, data())
    for name, value in mine.named_parameters():
        torch.testing.assert_close(value, dict(theirs.named_parameters())[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_the_optimiser_does_not_know_is_told(name, tmp_path):
    network, make, data = LEARNERS[name]
    frozen = network()
    frozen.hidden1.requires_grad_(False)
    run = bare(tmp_path, callbacks=[At(1, unfreeze(frozen, knows=False))])
    with pytest.raises(InputError, match=r"hidden1\.weight' became trainable when the optimiser was made already"):
        run.fit(make(frozen), DATA[data]())
    assert run.global_step == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"inner": MetaSGD(0.05)}, "MetaSGD learns parameters for what adapts"),
        ({"kind": BilevelLearner, "warm_start": True, "adapt": ["*.weight"]}, r"model\.warm_start"),
    ],
)
def test_what_was_made_for_all_that_adapts_is_told(options, told, tmp_path):
    network = net()
    run = bare(tmp_path, callbacks=[At(2, freeze(network))])
    with pytest.raises(InputError, match=f"{told}.*froze or unfroze"):
        run.fit(few_shot(network, **options), DATA["meta"]())
    assert run.global_step == 2


def test_the_first_task_is_checked_in_each_fit_and_where_other_parameters_train(tmp_path):
    class Counting(FewShot):
        checked = 0

        def check(self, task):
            super().check(task)
            self.checked += 1

    network = net()
    problem = Counting(network)
    module = MetaLearner(problem, SGD(0.05), Unrolled(1), eval_steps=1, optimizer=sgd)
    found = []
    for callbacks in ([], [At(2, freeze(network))], []):
        bare(tmp_path, callbacks=callbacks).fit(module, DATA["meta"]())
        found.append(problem.checked)
    # before the network is tried and after it, and once more where other parameters train
    assert found == [2, 5, 7]


class Thaw(BaseFinetuning):
    """Lets the hidden layer train from the second epoch on."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def freeze_before_training(self, module):
        self.freeze(self.network.hidden1)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.network.hidden1, optimizer, lr=0.02)


@pytest.mark.parametrize("name", ["MAML", "supervised"])
def test_finetuning_by_epochs(name, tmp_path):
    network, make, data = LEARNERS[name]
    mine = network()
    begun = mine.hidden1.weight.clone()
    seen = []
    watch = At(2, lambda module: seen.append(mine.hidden1.weight.clone()))
    run = trainer(tmp_path, 4, callbacks=[watch, Thaw(mine)], limit_train_batches=2, val_check_interval=1.0)
    run.fit(make(mine), DATA[data]())
    assert torch.equal(seen[0], begun)
    assert not torch.equal(mine.hidden1.weight, begun)
    logged = scalars(tmp_path)
    assert [value for _, value in logged["train/lr"]] == pytest.approx([0.1] * 4)
    assert logged["train/lr 1"] == [(3, pytest.approx(0.02)), (4, pytest.approx(0.02))]


def test_frozen_step_sizes_are_given_the_rate_0(tmp_path):
    module = few_shot(net(), MetaSGD(0.05))
    module.learned.requires_grad_(False)
    with pytest.raises(InputError, match=r"'optimizer.lr.hidden1.weight' is frozen.*model\.lr_by_name"):
        bare(tmp_path).fit(module, DATA["meta"]())


def test_the_inner_variable_of_cleaning_never_becomes_an_outer_one(tmp_path):
    modules = [BilevelLearner(Cleaning(net(4, 3), 60), SGD(0.1), Unrolled(2)) for _ in range(2)]
    modules[1].unfreeze()
    for module in modules:
        bare(tmp_path).fit(module, SplitsDataModule(blobs(120)))
    assert list(parameters(modules[1])) == ["problem.logit"]
    assert same(*modules)


@pytest.mark.long
def test_compiled_steps_follow_too(tmp_path):
    found = []
    for compiles in (False, True):
        network = net()
        options = {"fused_steps": 2, "compile": compiles, "optimizer": partial(torch.optim.Adam, lr=0.01)}
        callbacks = [At(2, freeze(network)), At(4, unfreeze(network, knows=False))]
        module = few_shot(network, **options)
        bare(tmp_path, 6, callbacks=callbacks, log_every_n_steps=2, val_check_interval=2).fit(module, DATA["meta"]())
        found.append(parameters(module))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)
