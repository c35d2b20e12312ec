"""The number of the outer step reaches hypergradients, however the steps are taken."""

import math
import pickle

import pytest
import torch
from fits import bare, parameters, same, trainer
from torch.testing import assert_close

from metalit.data import Episodes, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.hypergradients import Annealed, Direct, Recomputed, Unrolled, over_tasks
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot, ThetaPhi

STEPS, FUSED = 10, 5
FIRST, LAST, OVER = [0.5, 0.3, 0.2], [0.0, 0.1, 0.9], 7


def learner(kind=Unrolled, **options):
    torch.manual_seed(0)
    problem = FewShot(MLP([1, 6, 1], activation="Tanh"))
    return MetaLearner(problem, SGD(0.05), kind(3, Annealed(FIRST, LAST, OVER)), eval_steps=3, **options)


def sine():
    return TaskDataModule(Sine(), Episodes(4, 5, 5), Episodes(2, 5, 5), Episodes(2, 5, 5))


def fit(root, module, ckpt=None):
    run = trainer(root, STEPS, precision="64-true", val_check_interval=1.0, log_every_n_steps=FUSED)
    run.fit(module, sine(), ckpt_path=ckpt)
    return module


@pytest.fixture(scope="module")
def by_hand():
    """Each step with weights that are worked out in Python, by torch's own Adam."""
    module, data = learner().double(), sine()
    data.setup("test")
    adam = torch.optim.Adam(module.parameters())
    for step in range(STEPS):
        share = min(step / OVER, 1.0)
        weights = [(1 - share) * first + share * last for first, last in zip(FIRST, LAST, strict=True)]
        tasks = module.cast(data.draw("train", torch.arange(4 * step, 4 * step + 4)))
        outer = {**module.constants(), "problem": {n: p.detach() for n, p in module.problem.outer().items()}}
        found = over_tasks(Unrolled(3, weights), module.problem, SGD(0.05), outer, tasks).gradient["problem"]
        for name, parameter in module.problem.outer().items():
            parameter.grad = found[name]
        adam.step()
    return parameters(module)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Unrolled, {}),
        (Unrolled, {"fused_steps": FUSED}),
        (Unrolled, {"tasks_per_chunk": 3}),
        pytest.param(Unrolled, {"compile": True}, marks=pytest.mark.long),
        (Unrolled, {"compile": True, "fused_steps": FUSED}),
        (Recomputed, {}),
    ],
    ids=["eager", "fused", "chunks", "compiled", "compiled, fused", "recomputed"],
)
def test_annealed_weights_are_those_of_each_step(kind, options, by_hand, tmp_path):
    module = fit(tmp_path, learner(kind, **options))
    assert module.is_compiled == options.get("compile", False)
    assert_close(parameters(module), by_hand, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fused", [1, FUSED])
def test_a_resumed_run_goes_on_at_its_step(fused, tmp_path):
    whole = fit(tmp_path / "whole", learner(fused_steps=fused))
    path = tmp_path / "half.ckpt"
    first = trainer(tmp_path / "half", FUSED, precision="64-true", val_check_interval=1.0, log_every_n_steps=FUSED)
    first.fit(learner(fused_steps=fused), sine())
    first.save_checkpoint(path)
    assert same(whole, fit(tmp_path / "resumed", learner(fused_steps=fused), ckpt=path))


class Heard(Direct):
    """Keeps the step numbers that it is given."""

    def __init__(self):
        object.__setattr__(self, "heard", [])

    def __call__(self, problem, optimizer, outer, task, start=None, progress=0):
        self.heard.append((int(progress), progress.dtype, progress.dim()))
        return super().__call__(problem, optimizer, outer, task, start, progress)


def test_steps_are_counted_from_0_also_where_steps_are_only_tried(tmp_path):
    hypergradient = Heard()
    module = BilevelLearner(ThetaPhi([0.7], [0.5]), SGD(0.1), hypergradient)
    bare(tmp_path, 3, limit_val_batches=0).fit(module)
    assert {(dtype, dim) for _, dtype, dim in hypergradient.heard} == {(torch.int64, 0)}
    assert sorted({step for step, *_ in hypergradient.heard}) == [0, 1, 2]


def test_weights_move_in_a_straight_line_and_then_stay():
    annealed, like = Annealed([1.0, 0.0], [0.25, 0.75], over=3), torch.zeros((), dtype=torch.float64)
    for step, expected in ((0, [1.0, 0.0]), (1, [0.75, 0.25]), (2, [0.5, 0.5]), (3, [0.25, 0.75]), (99, [0.25, 0.75])):
        assert annealed.at(step, like) == pytest.approx(expected, rel=1e-15)
        found = torch.stack(annealed.at(torch.tensor(step), like))
        assert found.dtype == torch.float64
        assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (Annealed([0.5, 0.5], [1.0], 5), r"Unrolled: weights.last=\[1.0\] must be 2 numbers"),
        (Annealed([0.5, 0.4], [0.0, 1.0], 5), r"Unrolled: weights.first=\[0.5, 0.4\] must be 2 numbers"),
        (Annealed([0.5, 0.5], [0.0, 0.9], 5), r"Unrolled: weights.last=\[0.0, 0.9\] must be 2 numbers"),
        (Annealed([0.5, 0.5], [0.0, 1.0], 0), "Unrolled: weights.over=0 must be a whole number"),
        (Annealed([0.5, 0.5], [0.0, 1.0], math.nan), "Unrolled: weights.over=nan must be a whole number"),
        (Annealed("ab", [0.0, 1.0], 5), "Unrolled: weights.first='ab' must be 2 numbers"),
        (Annealed([1.0], [1.0], 5), r"Unrolled: weights.first=\[1.0\] must be 2 numbers"),
        (0.5, "Unrolled: weights=0.5 must be 2 numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, told):
    with pytest.raises(InputError, match=told):
        Unrolled(2, weights)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_learner_travels_to_another_process(compiled):
    module = learner(compile=compiled, fused_steps=2)
    assert same(pickle.loads(pickle.dumps(module)), module)
