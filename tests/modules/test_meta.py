"""The meta-learner under the Trainer: what one step does, what is logged, what resumes, what it answers."""

import math
import warnings

import pytest
import torch
from fits import Kill, KilledError, parameters, scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau

from metalit.adapt import adapt
from metalit.callbacks import LastCheckpoint
from metalit.data import Curves, Episodes, Sine, TaskDataModule
from metalit.errors import InputError, NonFiniteError
from metalit.evaluation.interval import mean_with_interval
from metalit.hypergradients import Direct, FirstOrder, Truncated, Unrolled, over_tasks
from metalit.inner import SGD, Learned, MetaSGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot
from metalit.tree import leaves


def sine(**changes):
    episodes = {"train": Episodes(4, 5, 5), "val": Episodes(6, 5, 10), "test": Episodes(6, 5, 10)}
    return TaskDataModule(Sine(), **{**episodes, **changes})


def gapminder(**options):
    tasks = Curves("data/gapminder.csv", "country", ["year"], ["lifeExp"], **options)
    return TaskDataModule(tasks, Episodes(4, 3), Episodes(6, 3), Episodes(6, 3))


def learner(network=None, inner=None, hypergradient=None, **options):
    torch.manual_seed(0)
    network = network or MLP([1, 8, 1], activation="Tanh")
    return MetaLearner(
        FewShot(network), inner or SGD(0.05), hypergradient or Unrolled(1), **{"eval_steps": 3, **options}
    )


def test_one_step_is_that_of_a_bare_loop(tmp_path):
    module, data = learner(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)).double(), sine()
    expected = parameters(module)
    for step in range(3):
        tasks = data.draw("train", torch.arange(4 * step, 4 * step + 4))
        outer = {"problem": {name.removeprefix("problem."): value for name, value in expected.items()}, "optimizer": {}}
        gradient = over_tasks(module.hypergradient, module.problem, module.inner_optimizer, outer, tasks).gradient
        expected = {name: value - 0.1 * dict(leaves(gradient))[name] for name, value in expected.items()}
    run = trainer(tmp_path, steps=3, precision="64-true")
    run.fit(module, data)
    assert run.global_step == 3
    for name, value in parameters(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_learned_step_sizes_are_trained_and_saved(tmp_path):
    module = learner(inner=MetaSGD(0.05))
    before = parameters(module)
    trainer(tmp_path).fit(module, sine())
    after = parameters(module)
    rates = [name for name in before if name.startswith("optimizer.lr.")]
    assert len(rates) == 4
    for name in rates:
        assert not torch.equal(before[name], after[name]), name
    saved = torch.load(tmp_path / "run/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["learned.lr.out.bias"], after["optimizer.lr.out.bias"])


@pytest.mark.parametrize(("hypergradient", "steps"), [(Unrolled(3), 3), (Truncated(3, 2), 3), (Direct(), 1)])
def test_there_are_as_many_rates_as_steps_are_trained(hypergradient, steps):
    module = learner(inner=SGD(Learned(0.05, "parameter and step")), hypergradient=hypergradient)
    assert {tuple(rates.shape) for _, rates in leaves(module.learned.tree)} == {(steps,)}


def test_a_buffer_may_hold_infinities(tmp_path):
    network = MLP([1, 8, 1])
    network.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    trainer(tmp_path).fit(learner(network), sine())
    assert (tmp_path / "run/version_0/checkpoints/last.ckpt").exists()


def test_only_outer_parameters_that_may_learn_do(tmp_path):
    network = MLP([1, 8, 1])
    network.hidden1.weight.requires_grad_(False)
    frozen = network.hidden1.weight.clone()
    trainer(tmp_path).fit(learner(network), sine())
    assert torch.equal(network.hidden1.weight, frozen)


def test_logs_under_their_names_on_one_axis(tmp_path):
    module, data = learner(), sine()
    run = trainer(tmp_path)
    run.fit(module, data)
    run.test(module, data, ckpt_path=str(tmp_path / "run/version_0/checkpoints/last.ckpt"), verbose=False)
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["train/loss"]] == [1, 2, 3, 4]
    assert {"train/grad_norm", "train/lr"} <= logged.keys()
    for k in range(4):
        assert [step for step, _ in logged[f"val/loss_step_{k}"]] == [2, 4]
        assert [step for step, _ in logged[f"test/loss_step_{k}"]] == [4]
        assert logged[f"test/loss_step_{k}_ci95"][0][1] > 0
    assert [value for _, value in logged["val/loss"]] == [value for _, value in logged["val/loss_step_1"]]
    assert any(event.summary.value[0].metadata.plugin_data.plugin_name == "hparams" for event in _events(tmp_path))


def _events(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in (tmp_path / "run" / "version_0").glob("events*"):
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("summary") and event.summary.value:
                yield event


def test_logs_only_when_due(tmp_path):
    trainer(tmp_path, log_every_n_steps=2).fit(learner(), sine())
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [2, 4]


def test_evaluation_adapts_as_the_inner_loop_does(tmp_path):
    module, data = learner().double(), sine()
    trainer(tmp_path, precision="64-true", inference_mode=True).test(module, data, verbose=False)
    tasks = data.draw("test", torch.arange(6))
    outer = module.constants()
    for k in range(4):
        for number in range(6):
            task = type(tasks)(
                *(type(part)(*(None if t is None else t[number] for t in part)) for part in tasks[:2]),
                tasks.key[number],
            )
            inner = adapt(module.problem, module.inner_optimizer, outer, task, k)
            expected = module.problem.outer_loss(inner, outer["problem"], task)
            torch.testing.assert_close(module.task_losses[number, k], expected, rtol=1e-10, atol=1e-12)
    assert not torch.equal(module.task_losses[:, 0], module.task_losses[:, 3])


def test_validation_logs_the_means_of_the_query_losses(tmp_path):
    module, data = learner(), sine()
    run = trainer(tmp_path)
    run.validate(module, data, verbose=False)
    losses = module.query_losses(data.draw("val", torch.arange(6)))
    for k, mean in enumerate(losses.mean(0)):
        assert float(run.callback_metrics[f"val/loss_step_{k}"]) == pytest.approx(float(mean), rel=1e-6)


def test_clips_the_true_gradient(tmp_path):
    module = learner(clip_norm=1e-3, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    before = parameters(module)
    trainer(tmp_path, steps=1, val_check_interval=1.0).fit(module, sine())
    moved = torch.cat([(after - before[name]).flatten() for name, after in parameters(module).items()])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert scalars(tmp_path)["train/grad_norm"][0][1] > 1e-2


def test_outer_rates_by_name(tmp_path):
    module = learner(
        lr_by_name={"problem.out.*": 0.0, "*.bias": 0.02}, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1)
    )
    before = parameters(module)
    run = trainer(tmp_path, steps=1, val_check_interval=1.0)
    run.fit(module, sine())
    after = parameters(module)
    assert torch.equal(before["problem.out.bias"], after["problem.out.bias"])
    assert not torch.equal(before["problem.hidden1.bias"], after["problem.hidden1.bias"])
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.0, 0.02]
    assert {"train/lr", "train/lr problem.out.*", "train/lr *.bias"} <= scalars(tmp_path).keys()


def test_a_scheduler_steps_once_for_each_outer_step(tmp_path):
    module = learner(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    trainer(tmp_path).fit(module, sine())
    assert [value for _, value in scalars(tmp_path)["train/lr"]] == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_a_plateau_scheduler_steps_once_for_each_validation(tmp_path):
    make = lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, threshold=1e9)  # noqa: E731
    module = learner(scheduler=make)
    trainer(tmp_path).fit(module, sine())
    assert [value for _, value in scalars(tmp_path)["train/lr"]] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert float(module.optimizers().param_groups[0]["lr"]) == pytest.approx(1e-5)


SCHEDULERS = {
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, threshold=0.9),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(stop, scheduler, tmp_path):
    def fit(root, *callbacks, ckpt=None):
        torch.manual_seed(0)
        module = learner(MLP([1, 8, 1], dropout=0.3), scheduler=SCHEDULERS[scheduler])
        run = trainer(root, steps=6, callbacks=[LastCheckpoint(seconds=0.0), *callbacks])
        run.fit(module, sine(), ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    with pytest.raises(KilledError):
        fit(tmp_path / "parts", Kill(stop))
    last = tmp_path / "parts/run/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stop
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint keeps")
        resumed = fit(tmp_path / "parts", ckpt=str(last))
    assert resumed.global_step == 6
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(resumed)[name]), name
    rates = [module.optimizers().param_groups[0]["lr"] for module in (whole, resumed)]
    assert rates[0] == rates[1] < 1e-3


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    module = learner(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e38))
    with pytest.raises(NonFiniteError, match=r"at outer step 2.*No checkpoint"):
        trainer(tmp_path, log_every_n_steps=50).fit(module, sine())
    assert not list(tmp_path.rglob("*.ckpt"))


class TestAdapt:
    def test_answers_in_the_users_units(self, tmp_path):
        data = gapminder()
        module = learner()
        trainer(tmp_path).fit(module, data)
        scaling = data.tasks.scaling()
        tasks = data.draw("val", torch.arange(1))
        x, y = scaling.restore_x(tasks.support.x[0]), scaling.restore_y(tasks.support.y[0])
        asked = scaling.restore_x(tasks.query.x[0])
        expected = scaling.restore_y(module.query_predictions(tasks)[0, -1])
        torch.testing.assert_close(module.adapt(x, y, steps=3)(asked), expected, rtol=1e-5, atol=1e-4)

    def test_a_checkpoint_keeps_the_units(self, tmp_path):
        data = gapminder()
        module = learner()
        trainer(tmp_path).fit(module, data)
        path = tmp_path / "run/version_0/checkpoints/last.ckpt"
        loaded = MetaLearner.load_from_checkpoint(
            path,
            problem=FewShot(MLP([1, 8, 1], "Tanh")),
            inner_optimizer=SGD(0.05),
            hypergradient=Unrolled(1),
            eval_steps=3,
        )
        x, y = torch.tensor([[1960.0], [1990.0]]), torch.tensor([[50.0], [60.0]])
        assert torch.equal(loaded.adapt(x, y)(x), module.adapt(x, y)(x))
        assert 20 < float(loaded.adapt(x, y)(x).mean()) < 100

    def test_leaves_the_learner_as_it_was(self):
        module = learner(MLP([1, 8, 1], dropout=0.5))
        module.problem.network.out.eval()
        modes = [part.training for part in module.modules()]
        before = parameters(module)
        answer = module.adapt(torch.randn(3, 1), torch.randn(3, 1))
        x = torch.randn(4, 1)
        assert torch.equal(answer(x), answer(x))
        assert [part.training for part in module.modules()] == modes
        for name, value in parameters(module).items():
            assert torch.equal(value, before[name])

    @pytest.mark.parametrize(
        ("x", "y", "told"),
        [
            (torch.ones(3), torch.ones(3, 1), r"x has shape \(3,\)"),
            (torch.ones(0, 1), torch.ones(0, 1), "x has 0 points"),
            (torch.ones(3, 1), torch.ones(2, 1), "x has 3 points and y has 2"),
            (torch.full((3, 1), math.nan), torch.ones(3, 1), "x holds values that are not finite"),
        ],
    )
    def test_bad_points(self, x, y, told):
        with pytest.raises(InputError, match=told):
            learner().adapt(x, y)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path).fit(learner(), gapminder())
    path = str(tmp_path / "run/version_0/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"trained on data with the scaling y_mean=\[.*\]; give the data and the"):
        trainer(tmp_path).test(learner(), gapminder(split_seed=1), ckpt_path=path)


@pytest.mark.parametrize(
    "hypergradient", [Unrolled(1), pytest.param(FirstOrder(1), marks=pytest.mark.long)], ids=["MAML", "FOMAML"]
)
def test_learns_to_learn(hypergradient, tmp_path):
    data = sine(train=Episodes(25, 10, 10), val=Episodes(100, 5, 50), test=Episodes(200, 5, 50))
    module = learner(
        MLP([1, 40, 40, 1]), SGD(0.01), hypergradient, optimizer=lambda groups: torch.optim.Adam(groups, lr=3e-3)
    )
    run = trainer(tmp_path, steps=600, val_check_interval=1.0, log_every_n_steps=200)
    run.fit(module, data)
    run.test(module, data, verbose=False)
    before, after = (mean_with_interval(module.task_losses[:, k]) for k in (0, 1))
    assert before.mean > 3.0057 - 3 * before.half_width
    assert after.mean < 2.4
    assert float((module.task_losses[:, 0] - module.task_losses[:, 1]).mean()) > 0.5


def test_autocast_keeps_parameters_and_gradients_in_float32(tmp_path):
    module, seen = learner(), []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.extend(parameter.grad.dtype for _, parameter in leaves(module.outer()))

    trainer(tmp_path, precision="bf16-mixed", callbacks=[Watch()], enable_checkpointing=False).fit(module, sine())
    assert seen == [torch.float32] * 16
    for name, value in parameters(module).items():
        assert value.dtype == torch.float32, name


def test_fast_dev_run(tmp_path):
    run = trainer(tmp_path, fast_dev_run=True, logger=False)
    run.fit(learner(), sine())
    assert run.global_step == 1
