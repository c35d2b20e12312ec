"""What Lightning's Trainer and its callbacks offer either works with every learner, or is refused in one line."""

import inspect
import warnings
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pandas as pd
import pytest
import torch
from fits import bare, parameters, same, told_once
from lightning.pytorch import Callback, LightningDataModule, Trainer, callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from tiny import DATA, LEARNERS
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from metalit.callbacks import BestCheckpoint, LastCheckpoint
from metalit.checks.trainer import check_trainer
from metalit.errors import InputError, NonFiniteError
from metalit.hypergradients import JTg, Unrolled
from metalit.inner import SGD
from metalit.modules import BilevelLearner, MetaLearner, SupervisedLearner
from metalit.networks import MLP
from metalit.problems import FewShot, ThetaPhi

STEPS = 4
SAME, WORKS = "same", "works"  # the same parameters as without the option; the same number of steps


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, module):
        pass

    def finetune_function(self, module, epoch, optimizer):
        pass


class Step(Callback):
    def on_train_batch_end(self, *_):
        pass


class Epoch(Callback):
    def on_train_epoch_end(self, *_):
        pass


class Backward(Callback):
    def on_after_backward(self, *_):
        pass


OPTIONS = {
    "accelerator": [("auto", SAME)],
    "accumulate_grad_batches": [(2, r"accumulate_grad_batches=2.*model\.tasks_per_chunk")],
    "barebones": [(True, SAME)],
    "benchmark": [(True, SAME)],
    "check_val_every_n_epoch": [
        *((2, "check_val_every_n_epoch=2 counts epochs"), (0, "check_val_every_n_epoch=0 must be"), (None, SAME)),
    ],
    "detect_anomaly": [(True, SAME)],
    "deterministic": [(True, SAME), ("warn", SAME)],
    "devices": [(1, SAME)],
    "enable_autolog_hparams": [(False, SAME)],
    "enable_model_summary": [(True, SAME)],
    "enable_progress_bar": [(True, SAME)],
    "fast_dev_run": [(STEPS, SAME)],
    "gradient_clip_algorithm": [("value", r"gradient_clip_algorithm=value.*model\.clip_norm")],
    "gradient_clip_val": [(1.0, r"gradient_clip_val=1\.0.*model\.clip_norm"), (0, SAME)],
    "inference_mode": [(False, SAME)],
    "limit_predict_batches": [(1, SAME)],
    "limit_test_batches": [(1, SAME)],
    "limit_train_batches": [(2, SAME), (0.5, SAME), (0, "limit_train_batches=0 trains nothing")],
    "limit_val_batches": [(1, SAME), (0, SAME)],
    "log_every_n_steps": [(0, SAME), (3, SAME), (-1, "log_every_n_steps=-1 must be")],
    "logger": [(True, SAME)],
    "max_epochs": [(0, "max_epochs=0 counts epochs"), (2, "max_epochs=2 counts epochs"), (None, SAME)],
    "max_steps": [(-1, "max_steps=-1"), (0, "max_steps=0")],
    "max_time": [("00:01:00:00", SAME), (timedelta(hours=1), SAME)],
    "min_epochs": [(2, r"min_epochs=2 counts epochs.*trainer\.min_steps")],
    "min_steps": [(2, SAME)],
    "num_sanity_val_steps": [(0, SAME), (-1, SAME)],
    "overfit_batches": [(1, WORKS)],
    "plugins": [(AsyncCheckpointIO, SAME), (lambda: MixedPrecision("bf16-mixed", "cpu"), WORKS)],
    "precision": [
        *(("32-true", SAME), ("64-true", WORKS), ("bf16-true", WORKS), ("bf16-mixed", WORKS), ("16-mixed", WORKS)),
        ("16-true", r"precision='16-true'.*16-mixed"),
    ],
    "profiler": [("simple", SAME), ("advanced", SAME)],
    "reload_dataloaders_every_n_epochs": [(1, SAME)],
    "strategy": [("auto", SAME)],
    "sync_batchnorm": [(True, SAME)],
    "use_distributed_sampler": [(False, SAME)],
    "val_check_interval": [
        *((1, SAME), (0.3, SAME), (1.0, SAME), (0, "val_check_interval=0 must be")),
        *((5, r"val_check_interval=5 is more than trainer\.max_steps=4"), (timedelta(seconds=1), "by the clock")),
    ],
}
CALLBACKS = [
    (BackboneFinetuning, "BackboneFinetuning: it counts epochs"),
    (BatchSizeFinder, "BatchSizeFinder cannot work"),
    (BestCheckpoint, SAME),
    (lambda: DeviceStatsMonitor(cpu_stats=False), SAME),
    (lambda: EarlyStopping("val/loss"), SAME),
    (lambda: EarlyStopping("val/loss", check_on_train_epoch_end=True), "check_on_train_epoch_end=True counts epochs"),
    (lambda: EMAWeightAveraging(decay=0.5), WORKS),
    (lambda: EMAWeightAveraging(update_starting_at_epoch=1), "update_starting_at_epoch=1 counts epochs"),
    (lambda: GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler cannot work"),
    (lambda: LambdaCallback(on_after_backward=print), r"LambdaCallback\.on_after_backward would never be called"),
    (lambda: LambdaCallback(on_before_optimizer_step=lambda *_: None), SAME),
    (lambda: LambdaCallback(on_train_batch_end=lambda *_: None), SAME),
    (LastCheckpoint, SAME),
    (LearningRateFinder, "LearningRateFinder cannot work"),
    (LearningRateMonitor, SAME),
    (lambda: LearningRateMonitor("step"), SAME),
    (lambda: LearningRateMonitor("epoch"), "logging_interval='epoch' counts epochs"),
    (ModelCheckpoint, SAME),
    (lambda: ModelCheckpoint(every_n_epochs=2), "every_n_epochs=2 counts epochs"),
    (lambda: ModelCheckpoint(every_n_train_steps=2), SAME),
    (lambda: ModelCheckpoint(monitor="val/loss", save_last=True, save_top_k=-1), SAME),
    (lambda: ModelCheckpoint(train_time_interval=timedelta(seconds=1)), "train_time_interval=.*LastCheckpoint"),
    (lambda: ModelPruning("l1_unstructured"), "ModelPruning cannot work"),
    (ModelSummary, SAME),
    (lambda: OnExceptionCheckpoint(mkdtemp()), SAME),
    (RichModelSummary, SAME),
    (RichProgressBar, SAME),
    (SpikeDetection, "SpikeDetection cannot work"),
    (lambda: StochasticWeightAveraging(0.1), "StochasticWeightAveraging.* counts epochs.*EMAWeightAveraging"),
    (lambda: ThroughputMonitor(batch_size_fn=lambda batch: 1), SAME),
    (lambda: Timer(timedelta(hours=1)), SAME),
    (lambda: Timer(timedelta(hours=1), interval="epoch"), "interval='epoch' counts epochs"),
    (TQDMProgressBar, SAME),
    (WeightAveraging, WORKS),
    (Backward, r"Backward\.on_after_backward would never be called.*on_before_optimizer_step"),
    (Unfreezing, "Unfreezing: it counts epochs"),
]


def fit(kind, folder, options, **learner):
    module = LEARNERS[kind](**learner)
    shown = [callback for callback in options.get("callbacks", []) if isinstance(callback, ProgressBar)]
    defaults = {"val_check_interval": 1.0 if "overfit_batches" in options else 2, "enable_progress_bar": bool(shown)}
    if options.get("barebones"):
        defaults |= {"barebones": True, "log_every_n_steps": None, "enable_model_summary": None}
        defaults |= {"enable_checkpointing": None, "logger": None, "enable_progress_bar": None}
    run = bare(folder, STEPS, **{**defaults, **options})
    run.fit(module, DATA[kind]())
    return run, module


@cache
def plain(kind):
    """The parameters without any option."""
    return parameters(fit(kind, ".", {})[1])


def check(outcome, kind, folder, options, **learner):
    if outcome not in (SAME, WORKS):
        with pytest.raises(InputError, match=outcome) as caught:
            fit(kind, folder, options, **learner)
        assert "\n" not in str(caught.value)
        assert not list(folder.iterdir())
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is called once")
        run, module = fit(kind, folder, options, **learner)
    assert run.global_step == STEPS
    assert outcome == WORKS or same(parameters(module), plain(kind))


def test_every_argument_of_the_trainer_is_in_the_list():
    given = {"callbacks", "default_root_dir", "enable_checkpointing", "model_registry", "num_nodes"}
    assert set(inspect.signature(Trainer).parameters) == {*OPTIONS, *given}


def test_every_callback_of_lightning_is_in_the_list():
    bases = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "ProgressBar"}
    assert {type(make()).__name__ for make, _ in CALLBACKS} | bases >= set(callbacks.__all__)


def each_with_a_learner(cases):
    """Every case with every learner, but in the quick run with one: the learners take turns."""
    return [
        pytest.param(*case, kind, marks=[] if turn == number % len(LEARNERS) else pytest.mark.long)
        for number, case in enumerate(cases)
        for turn, kind in enumerate(LEARNERS)
    ]


@pytest.mark.parametrize(
    ("name", "value", "outcome", "kind"),
    each_with_a_learner((name, *case) for name, cases in OPTIONS.items() for case in cases),
)
def test_arguments_of_the_trainer(name, value, outcome, kind, tmp_path):
    check(outcome, kind, tmp_path, {name: value() if callable(value) else value})


@pytest.mark.parametrize(("make", "outcome", "kind"), each_with_a_learner(CALLBACKS))
def test_callbacks(make, outcome, kind, tmp_path):
    options = {"callbacks": [make()], "enable_checkpointing": True, "logger": CSVLogger(tmp_path)}
    check(outcome, kind, tmp_path, options)


FUSED = [
    (lambda: DeviceStatsMonitor(cpu_stats=False), r"DeviceStatsMonitor .*model\.fused_steps: 1"),
    (lambda: EarlyStopping("val/loss"), SAME),
    (EMAWeightAveraging, r"EMAWeightAveraging .*model\.fused_steps: 1"),
    (lambda: LambdaCallback(on_before_optimizer_step=lambda *_: None), SAME),
    (LearningRateMonitor, r"LearningRateMonitor .*model\.fused_steps: 1"),
    (lambda: ModelCheckpoint(every_n_train_steps=1), r"every_n_train_steps=1 must be a multiple"),
    (lambda: ModelCheckpoint(every_n_train_steps=2), SAME),
    (RichProgressBar, SAME),
    (lambda: ThroughputMonitor(batch_size_fn=lambda batch: 1), r"ThroughputMonitor .*model\.fused_steps: 1"),
    (lambda: Timer(timedelta(hours=1)), SAME),
    (WeightAveraging, r"WeightAveraging .*model\.fused_steps: 1"),
]


@pytest.mark.parametrize("kind", ["meta", "bilevel"])
@pytest.mark.parametrize(("make", "outcome"), FUSED)
def test_callbacks_beside_fused_steps(make, outcome, kind, tmp_path):
    options = {"callbacks": [make()], "enable_checkpointing": True, "logger": CSVLogger(tmp_path)}
    check(outcome, kind, tmp_path, {**options, "log_every_n_steps": 2}, fused_steps=2)


@pytest.mark.parametrize(("callback", "fused", "told"), [(Step, 2, "model.fused_steps=2"), (Epoch, 1, "no epochs")])
def test_callbacks_of_ones_own_that_are_called_rarely_are_named(callback, fused, told, tmp_path):
    run = bare(tmp_path, STEPS, callbacks=[callback()], log_every_n_steps=2, val_check_interval=2)
    found = told_once(lambda: run.fit(LEARNERS["meta"](fused_steps=fused), DATA["meta"]()), "is called once")
    assert callback.__name__ in found
    assert told in found


def test_hooks_of_a_learner_of_ones_own_that_are_called_rarely_are_named(tmp_path):
    class Mine(MetaLearner):
        def on_train_batch_end(self, *_):
            pass

    module = Mine(FewShot(MLP([1, 2, 1])), SGD(0.1), Unrolled(1), fused_steps=2)
    run = bare(tmp_path, STEPS, log_every_n_steps=2, val_check_interval=2)
    assert told_once(lambda: run.fit(module, DATA["meta"]()), "is called once").startswith("Mine.on_train_batch_end")


def test_what_callbacks_log_lies_at_the_same_steps_beside_fused_steps(tmp_path):
    def logged(fused):
        values = iter(range(100))
        log = LambdaCallback(
            on_train_batch_end=lambda run, module, *_: module.log("mine", float(module.global_step)),
            on_validation_epoch_end=lambda run, module: module.log("val/mine", float(next(values))),
        )
        logger = CSVLogger(tmp_path, version=fused)
        run = bare(tmp_path, 8, callbacks=[log], logger=logger, log_every_n_steps=4, val_check_interval=4)
        run.fit(LEARNERS["meta"](fused_steps=fused), DATA["meta"]())
        logger.save()
        frame = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
        return {name: frame[["step", name]].dropna().to_numpy().tolist() for name in ("mine", "val/mine")}

    assert logged(4) == logged(1)
    assert [step for step, _ in logged(2)["mine"]] == [3, 7]


def test_a_run_that_diverges_beside_every_kind_of_checkpoint(tmp_path):
    savers = [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path, save_on_exception=True)]
    run = bare(tmp_path, STEPS, callbacks=savers, enable_checkpointing=True, log_every_n_steps=1)
    with pytest.raises(NonFiniteError, match="No checkpoint had been saved yet"):
        run.fit(LEARNERS["supervised"](optimizer=partial(torch.optim.SGD, lr=1e38)), DATA["supervised"]())
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (EMAWeightAveraging, "EMAWeightAveraging hears one call"),
        (lambda: Timer(timedelta(hours=1), interval="epoch"), "interval='epoch' counts epochs"),
        (lambda: ModelCheckpoint(every_n_train_steps=1), "every_n_train_steps=1 must be a multiple"),
    ],
)
def test_callbacks_that_a_learner_of_ones_own_brings(make, told, tmp_path):
    class Mine(MetaLearner):
        def configure_callbacks(self):
            return [make()]

    module = Mine(FewShot(MLP([1, 2, 1])), SGD(0.1), Unrolled(1), fused_steps=2)
    run = bare(tmp_path, STEPS, log_every_n_steps=2, val_check_interval=2, enable_checkpointing=True)
    with pytest.raises(InputError, match=told):
        run.fit(module, DATA["meta"]())


def test_synchronised_batch_statistics(tmp_path):
    module = LEARNERS["meta"]()
    run = bare(tmp_path, sync_batchnorm=True, strategy="ddp", devices=2)
    run.strategy.connect(module)
    run.state.fn = TrainerFn.FITTING
    module.trainer = run
    with pytest.raises(InputError, match="sync_batchnorm=True"):
        check_trainer(module)


def test_a_hook_of_the_learner_that_is_never_called(tmp_path):
    class Mine(MetaLearner):
        def configure_gradient_clipping(self, *_):
            raise AssertionError

    module = Mine(FewShot(MLP([1, 2, 1])), SGD(0.1), Unrolled(1))
    with pytest.raises(InputError, match=r"Mine\.configure_gradient_clipping would never be called"):
        bare(tmp_path).fit(module, DATA["meta"]())


def test_early_stopping_heeds_the_least_number_of_steps(tmp_path):
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    run = bare(tmp_path, 40, callbacks=[stop], min_steps=7, val_check_interval=2)
    run.fit(LEARNERS["bilevel"](), DATA["bilevel"]())
    assert run.global_step == 7


def test_the_learning_rate_is_monitored_at_every_step(tmp_path):
    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    run = bare(tmp_path, STEPS, callbacks=[monitor], logger=logger)
    halved = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    run.fit(LEARNERS["supervised"](scheduler=halved), DATA["supervised"]())
    logger.save()
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv")["lr-Adam"].dropna()
    assert logged.tolist() == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_an_average_of_weights_is_of_every_step(tmp_path):
    seen, average = [], EMAWeightAveraging(decay=0.5)
    watch = LambdaCallback(on_train_batch_end=lambda run, module, *_: seen.append(parameters(module)))
    module = LEARNERS["supervised"]()
    bare(tmp_path, STEPS, callbacks=[watch, average]).fit(module, DATA["supervised"]())
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.5 * value + 0.5 * now[name] for name, value in expected.items()}
    for name, value in parameters(module).items():
        torch.testing.assert_close(value, expected[name])


def numbers(batch):
    return [leaf.tolist() for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


MAKE = {kind: lambda kind=kind: (LEARNERS[kind](), DATA[kind]()) for kind in LEARNERS}
MAKE["keys"] = lambda: (BilevelLearner(ThetaPhi([0.7], [0.5]), SGD(0.1), JTg(), draws=3), None)


@pytest.mark.parametrize("asked", [2, 0.25])
@pytest.mark.parametrize("kind", MAKE)
def test_the_same_batches_are_overfitted_again_and_again(kind, asked, tmp_path):
    def batches(steps, **options):
        seen = {"train": [], "val": []}
        watch = LambdaCallback(
            on_train_batch_start=lambda run, module, batch, _: seen["train"].append(numbers(batch)),
            on_validation_batch_start=lambda run, module, batch, *_: seen["val"].append(numbers(batch)),
        )
        run = bare(tmp_path, steps, callbacks=[watch], val_check_interval=1.0, num_sanity_val_steps=0, **options)
        run.limit_val_batches = 1
        run.fit(*MAKE[kind]())
        return seen

    plain, found = batches(2), batches(8, overfit_batches=asked)
    assert found["train"] == plain["train"] * 4
    assert plain["train"][0] != plain["train"][1]
    assert found["val"] == plain["val"] * 4


# ---- with data that has an end


EPOCHS = {
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2}, [4, 8]),
    "every_n_epochs": ({"callbacks": lambda: [ModelCheckpoint(every_n_epochs=2, save_top_k=-1)]}, [2, 4, 6, 8]),
    "early stopping": ({"callbacks": lambda: [EarlyStopping("val/loss", patience=1, min_delta=1e9)]}, [2, 4]),
    "timer": ({"callbacks": lambda: [Timer(timedelta(microseconds=1), interval="epoch")]}, [2]),
    "finetuning": ({"callbacks": lambda: [Unfreezing()]}, [2, 4, 6, 8]),
    "max_epochs": ({"max_epochs": 3, "max_steps": -1}, [2, 4, 6]),
    "own callback": ({"callbacks": lambda: [Epoch()]}, [2, 4, 6, 8]),
}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", EPOCHS)
def test_what_counts_epochs_works_where_there_are_some(name, cut, tmp_path):
    options, validated = EPOCHS[name]
    if cut and name == "max_epochs":
        options = {"max_epochs": 3}
    options = {key: value() if callable(value) else value for key, value in options.items()}
    seen = []
    watch = LambdaCallback(on_validation_end=lambda run, _: run.sanity_checking or seen.append(run.global_step))
    options["callbacks"] = [watch, *options.get("callbacks", [])]
    if cut:
        options["limit_train_batches"] = 2
    module = LEARNERS["supervised"]()
    run = bare(tmp_path, 8, **{"val_check_interval": 1.0, "enable_checkpointing": True, **options})
    rows = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    data = {"datamodule": DATA["supervised"]()} if cut else {"train_dataloaders": DataLoader(rows, batch_size=4)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is called once")
        run.fit(module, **data, **({} if cut else {"val_dataloaders": DataLoader(rows, batch_size=4)}))
    assert seen == validated
    if name == "every_n_epochs":
        assert len(list(tmp_path.rglob("*.ckpt"))) == 2


@pytest.mark.parametrize("cut", [False, True])
def test_weights_are_averaged_over_epochs(cut, tmp_path):
    class Watch(Callback):
        def on_train_epoch_start(self, run, module):
            seen.append(parameters(module))
            rates.append(run.optimizers[0].param_groups[0]["lr"])

    seen, rates = [], []
    average = StochasticWeightAveraging(0.5, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear")
    limits = {"max_steps": 8, "limit_train_batches": 2} if cut else {"max_steps": -1}
    run = bare(tmp_path, callbacks=[average, Watch()], max_epochs=4, val_check_interval=1.0, **limits)
    module = LEARNERS["supervised"](optimizer=partial(torch.optim.SGD, lr=0.1))
    rows = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    run.fit(module, **({"datamodule": DATA["supervised"]()} if cut else {"train_dataloaders": DataLoader(rows, 4)}))
    assert run.global_step == 8
    for name, value in parameters(module).items():
        torch.testing.assert_close(value, sum(epoch[name] for epoch in seen[1:]) / 3)
    assert rates == pytest.approx([0.1, 0.1, 0.3, 0.5])


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        ([nn.Linear(4, 4), nn.BatchNorm1d(4)], {"max_epochs": 2}, "once more over the data for BatchNorm"),
        ([nn.Linear(4, 3)], {"max_steps": 4}, r"swa_epoch_start=0\.8 is a share of trainer\.max_epochs"),
        (
            [nn.Linear(4, 3)],
            {"max_steps": 3, "max_epochs": 2},
            r"max_steps=3 ends before .*at least trainer\.max_steps=4",
        ),
    ],
)
def test_weights_that_would_never_be_averaged(network, options, told, tmp_path):
    run = bare(tmp_path, callbacks=[StochasticWeightAveraging(0.5)], **{"max_steps": -1, **options})
    rows = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    with pytest.raises(InputError, match=told):
        run.fit(SupervisedLearner(nn.Sequential(*network)), DataLoader(rows, batch_size=4))
    assert run.global_step == 0


def test_a_loader_of_ones_own_without_an_end_has_no_epochs(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(4), 0

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=4)

        def val_dataloader(self):
            return DataLoader([(torch.randn(4), 0)] * 4, batch_size=4)

    for data in ({"datamodule": Data()}, {"train_dataloaders": Data().train_dataloader()}):
        run = bare(tmp_path, STEPS, check_val_every_n_epoch=2, val_check_interval=1.0)
        with pytest.raises(InputError, match="check_val_every_n_epoch=2 counts epochs"):
            run.fit(LEARNERS["supervised"](), **data)
        assert run.global_step == 0
