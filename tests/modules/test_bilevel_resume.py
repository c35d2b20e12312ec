"""What a bilevel learner's checkpoint holds: a run goes on bit for bit, and another learner's is refused."""

import warnings
from functools import partial

import pytest
import torch
from bilevel_learners import SCHEDULERS, cleaning, offset, ridge, sgd, table
from fits import Kill, KilledError, bare, blobs, last, same, trainer

from metalit.callbacks import LastCheckpoint
from metalit.data import (
    Episodes,
    Sine,
    SplitsDataModule,
    TaskDataModule,
)
from metalit.errors import InputError
from metalit.hypergradients import Implicit, Unrolled
from metalit.inner import SGD, Adam
from metalit.modules import BilevelLearner, MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot

RESUMED = {
    "ridge, minibatches": lambda: (
        ridge(
            SGD(0.1), Unrolled(3), batch=8, outer_batch=5, warm_start=True, optimizer=sgd(0.5, momentum=0.9),
            scheduler=SCHEDULERS["plateau"],
        ),
        table(draws=2),
    ),
    "cleaning, minibatches": lambda: (
        cleaning(batch=10, outer_batch=7, warm_start=True, scheduler=SCHEDULERS["exponential"]),
        SplitsDataModule(blobs(), corrupt=0.5),
    ),
    "keys": lambda: (
        offset(hypergradient=Implicit(2), warm_start=True, draws=2, scheduler=SCHEDULERS["plateau"]), None,
    ),
    "momenta": lambda: (
        ridge(Adam(0.05, 0.5, 0.7), Unrolled(2), warm_start=True, optimizer=sgd(0.5), batch=8), table(draws=2),
    ),
    "cold": lambda: (ridge(SGD(0.1), Unrolled(2), batch=8, scheduler=SCHEDULERS["exponential"]), table()),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(name, tmp_path):
    def fit(root, *callbacks, ckpt=None):
        module, data = RESUMED[name]()
        run = trainer(root, steps=6, callbacks=[LastCheckpoint(seconds=0.0), *callbacks])
        run.fit(module, data, ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    for stop in (1, 3, 4):
        root = tmp_path / str(stop)
        with pytest.raises(KilledError):
            fit(root, Kill(stop))
        checkpoint = torch.load(last(root), weights_only=True)
        assert checkpoint["global_step"] == stop
        assert (checkpoint["inner"] is not None) == whole.warm_start
        assert len(checkpoint["inner_state"]) == (6 if name == "momenta" else 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the checkpoint keeps")
            resumed = fit(root, ckpt=last(root))
        assert resumed.global_step == 6
        assert same(whole, resumed)
        if whole.warm_start:
            assert same(whole.inner, resumed.inner)
        assert whole.scores == resumed.scores
        states = [torch.load(last(path), weights_only=True)["optimizer_states"] for path in (tmp_path / "whole", root)]
        assert str(states[0]) == str(states[1])


@pytest.mark.parametrize("kept", ["none", "of another optimiser"])
def test_a_checkpoint_without_the_inner_optimisers_state_begins_it_anew(kept, tmp_path):
    module = partial(ridge, Adam(0.05), Unrolled(2), warm_start=True, optimizer=sgd(0.0))
    trainer(tmp_path, steps=3).fit(module(), table())
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    learner = module()
    learner.trainer = bare(tmp_path)
    if kept == "none":  # as of an older version
        del checkpoint["inner_state"]
    else:
        checkpoint["inner_state"] = checkpoint["inner_state"][:1]
    learner._warm.load(checkpoint)
    start = learner._warm.of_rank(learner.trainer, 1, lambda: checkpoint["inner"])
    assert same(start.inner, checkpoint["inner"])
    assert not any(bool(leaf.any()) for state in start.state.values() for leaf in state.values())


def test_a_checkpoint_of_another_number_of_draws_is_refused(tmp_path):
    module = partial(offset, hypergradient=Implicit(2), warm_start=True)
    trainer(tmp_path).fit(module(draws=2))
    with pytest.raises(InputError, match=r"inner variables of 2 tasks.* 3; use the number"):
        trainer(tmp_path, steps=6).fit(module(draws=3), ckpt_path=last(tmp_path))


def test_a_checkpoint_of_another_learner_is_refused(tmp_path):
    def few_shot(kind, **options):
        return kind(FewShot(MLP([1, 4, 1])), SGD(0.05), Unrolled(1), **options)

    data = TaskDataModule(Sine(), *[Episodes(4, 5, 5)] * 3)
    bare(tmp_path).fit(few_shot(BilevelLearner), data)
    trainer(tmp_path / "meta").fit(few_shot(MetaLearner, eval_steps=1), data)
    with pytest.raises(InputError, match="another kind of learner: it holds no inner variable"):
        trainer(tmp_path).fit(few_shot(BilevelLearner), data, ckpt_path=last(tmp_path / "meta"))
    with pytest.raises(InputError, match=r"of another network: 'problem\.log_penalty'"):
        trainer(tmp_path).fit(ridge(), table(), ckpt_path=last(tmp_path / "meta"))
