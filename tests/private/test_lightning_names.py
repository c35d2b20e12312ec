"""What Lightning's private names mean to metalit. Each test says what to do where Lightning changes one."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from metalit import private_lightning as private


class Plain(LightningModule):
    """Optimises by hand, by what a test does in each training step."""

    def __init__(self, note=lambda module: None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))
        self.note = note

    def training_step(self, batch, index):
        self.note(self)
        self.log("train/x", 1.0)

    def validation_step(self, batch, index):
        self.log("val/x", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def loader(batches=4):
    return torch.utils.data.DataLoader(torch.zeros(batches, 1))


def trainer(tmp_path, *callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | {"devices": 1} | options)


def test_a_module_without_a_trainer_is_told(tmp_path):
    """Elsewhere: ``module.trainer`` raises ``RuntimeError`` without one; catch that."""
    module = Plain()
    assert private.trainer_of(module) is None
    fit = trainer(tmp_path)
    fit.fit(module, loader())
    assert private.trainer_of(module) is fit


def test_the_environment_that_starts_processes_is_known(tmp_path):
    """Elsewhere: ``trainer.strategy.cluster_environment`` of parallel strategies, and of one device none."""
    assert isinstance(private.cluster_environment(trainer(tmp_path)), LightningEnvironment)


def test_processes_that_lightning_has_started_are_known(tmp_path):
    """Elsewhere: the children of this process, as the system lists them."""
    assert private.started_processes(trainer(tmp_path).strategy) == []
    several = trainer(tmp_path, devices=2, strategy="ddp").strategy
    several._configure_launcher()
    assert private.started_processes(several) == []
    several.launcher.procs = ["one"]
    assert private.started_processes(several) == ["one"]


def test_where_batches_come_from_is_known_before_any_loader_is_made(tmp_path):
    """Elsewhere: ``trainer.datamodule``, and the loaders that ``trainer.fit`` was given, kept by a hook."""
    seen = []

    class Sees(Callback):
        def setup(self, trainer, pl_module, stage):
            fit = trainer.fit_loop
            seen.extend(map(private.data_source, (fit, fit.epoch_loop.val_loop)))

    given, fit = loader(), trainer(tmp_path, Sees())
    fit.fit(Plain(), given)
    training, validation = seen
    assert (training.instance, training.name, training.is_defined()) == (given, "train_dataloader", True)
    assert validation.name == "val_dataloader"

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    data = Data()
    fit = trainer(tmp_path)
    fit.fit(Plain(), data)
    assert private.data_source(fit.fit_loop).instance is data
    private.data_source(fit.validate_loop).instance = LightningDataModule()
    assert not private.data_source(fit.validate_loop).is_defined()


def test_an_interval_by_the_clock_is_known(tmp_path):
    """Elsewhere: ``trainer.val_check_interval`` where it stays a time or a string."""
    assert private.validation_interval_by_clock(trainer(tmp_path)) is None
    clock = trainer(tmp_path, val_check_interval=timedelta(seconds=90), check_val_every_n_epoch=None)
    assert private.validation_interval_by_clock(clock) == 90.0


def test_a_validation_that_is_due_is_known_at_the_end_of_a_batch(tmp_path):
    """Elsewhere: decide by ``trainer.val_check_interval`` and ``check_val_every_n_epoch``."""
    due = []

    class Asks(Callback):
        def on_train_batch_end(self, trainer, *_):
            due.append(private.validation_is_due(trainer))

    trainer(tmp_path, Asks(), val_check_interval=2, num_sanity_val_steps=0).fit(Plain(), loader(), loader())
    assert due == [False, True, False, True]


def test_steps_between_its_halves_count_as_global_steps_and_are_seen(tmp_path):
    """Elsewhere: ``LightningOptimizer.step`` with a closure that does nothing; it costs microseconds an outer step."""
    steps, seen = [], []

    def step_twice(module):
        optimizer = module.optimizers()
        for _ in range(2):
            private.before_step(optimizer)
            private.after_step(optimizer)
        private.add_batches_that_stepped(module.trainer, 1)
        steps.append(module.global_step)

    class Logs(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    fit = trainer(tmp_path, Logs())
    fit.fit(Plain(step_twice), loader())
    assert steps == [2, 4, 6, 8]
    assert fit.global_step == 8
    progress = fit.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    assert (progress.ready, progress.completed) == (8, 8)
    assert fit.fit_loop.epoch_loop._batches_that_stepped == 8


def test_what_callbacks_log_is_drawn_over_the_batches_that_stepped(tmp_path):
    """Elsewhere: a logger that replaces its ``step`` by the outer one."""
    drawn = []

    class Notes(CSVLogger):
        def log_metrics(self, metrics, step=None):
            drawn.append(step)

    logger = Notes(tmp_path)
    note = lambda module: private.add_batches_that_stepped(module.trainer, 2)  # noqa: E731
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(Plain(note), loader(2))
    assert [step for step in drawn if step is not None][:2] == [2, 5]


def test_what_an_evaluation_returns_is_filled_from_outside(tmp_path):
    """Elsewhere: ``trainer.callback_metrics``, and tell users to read those."""

    class Fills(Callback):
        kept = ()

        def on_validation_epoch_end(self, trainer, pl_module):
            self.kept = list(private.returned_metrics(trainer.validate_loop))

        def on_validation_end(self, trainer, pl_module):
            for returned in self.kept:
                returned["own"] = 3.0

    (found,) = trainer(tmp_path, Fills()).validate(Plain(), loader(), verbose=False)
    assert found == {"val/x": 1.0, "own": 3.0}


def test_what_a_strategy_was_told_is_known(tmp_path):
    """Elsewhere: ``trainer.sync_batchnorm`` and the strategy's constructor, before the Trainer is built (``cli``)."""
    one, many = trainer(tmp_path).strategy, DDPStrategy(timeout=timedelta(seconds=7))
    assert private.process_group_timeout(one) is None
    assert private.process_group_timeout(many) == timedelta(seconds=7)
    assert not private.synchronises_batch_norm(one)
    asked = trainer(tmp_path, strategy="ddp", devices=2, sync_batchnorm=True).strategy
    assert private.synchronises_batch_norm(asked)


def test_the_rank_is_read_from_the_environment(monkeypatch):
    """Elsewhere: ``RANK``, ``LOCAL_RANK``, ``SLURM_PROCID``, the first that is there."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not private.rank_of_process()
    monkeypatch.setenv("RANK", "3")
    assert private.rank_of_process() == 3


def test_what_callbacks_were_made_with_is_known():
    """Elsewhere: their ``state_key`` holds most of it; else do without the check that reads it."""
    assert private.every_n_epochs(ModelCheckpoint()) == 1
    assert private.every_n_epochs(ModelCheckpoint(every_n_epochs=3)) == 3
    assert private.every_n_train_steps(ModelCheckpoint(every_n_train_steps=4)) == 4
    assert private.train_time_interval(ModelCheckpoint()) is None
    assert private.train_time_interval(ModelCheckpoint(train_time_interval=timedelta(1))) == timedelta(1)
    for asked in (None, True, False):
        assert private.checks_at_epoch_end(EarlyStopping("val/x", check_on_train_epoch_end=asked)) is asked
    assert private.timer_interval(Timer(interval="epoch")) == "epoch"
    assert private.timer_interval(Timer(interval="step")) == "step"
    assert private.average_start(StochasticWeightAveraging(0.1, swa_epoch_start=0.5)) == 0.5


def test_a_saver_saves_once_after_a_step_unless_it_is_told_to_forget(tmp_path):
    """Elsewhere: ``trainer.save_checkpoint(path)``, and keep ``best_model_path`` and the last step by hand."""
    saved = []

    class Saver(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            """Overridden by ``LastCheckpoint``: where it is no longer called, its clock never starts anew."""
            super()._save_checkpoint(trainer, filepath)
            saved.append((trainer.global_step, filepath == self.best_model_path))

        def on_train_batch_end(self, trainer, *_):
            private.save_unless_saved(self, trainer)
            private.save_unless_saved(self, trainer)
            if trainer.global_step == 2:
                private.forget_saved_step(self)
                private.save_unless_saved(self, trainer)

    def step(module):
        module.optimizers().step()

    saver = Saver(dirpath=tmp_path, filename="last", enable_version_counter=False, save_on_train_epoch_end=False)
    trainer(tmp_path, saver, num_sanity_val_steps=0).fit(Plain(step), loader(2))
    assert saved == [(1, True), (2, True), (2, True)]
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_the_configuration_that_is_given_is_what_an_object_saves():
    """Elsewhere: hand the configuration to ``save_hyperparameters`` by a context of one's own."""

    class Configured(LightningModule):
        def __init__(self, size=1):
            super().__init__()
            self.given = private.has_given_hyperparameters()
            if self.given:
                self.save_hyperparameters(logger=False)

    assert not Configured().given
    with private.given_hyperparameters({"size": 7, private.CLASS_PATH: "a.B"}):
        module = Configured()
    assert not private.has_given_hyperparameters()
    kept = dict(module.hparams)
    assert kept.pop(private.INSTANTIATOR) == "lightning.pytorch.cli.instantiate_module"
    assert kept == {"size": 7, private.CLASS_PATH: "a.B"}


def test_an_object_is_built_from_a_checkpoint_of_weights():
    """Elsewhere: build it, ``load_state_dict``, and call ``on_load_checkpoint`` of it."""
    weights = {"weight": torch.tensor([5.0])}
    found = private.load_state(Plain, {"state_dict": weights}, strict=True)
    assert float(found.weight) == 5.0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        private.load_state(Plain, {"state_dict": {**weights, "more": torch.zeros(1)}}, strict=True)


def test_tensors_of_a_checkpoint_go_to_the_cpu_where_their_device_is_missing():
    """Elsewhere: ``map_location="cpu"``, and move the object afterwards."""
    storage = torch.zeros(1).untyped_storage()
    assert (
        private.default_map_location(storage, "cpu") is storage or private.default_map_location(storage, "cpu") is None
    )
    if not torch.cuda.is_available():
        assert private.default_map_location(storage, "cuda:0").device.type == "cpu"


def test_a_restricted_class_method_is_refused_to_objects():
    """Elsewhere: ``classmethod``, which lets an object pass in silence."""

    class Loads(LightningModule):
        @private.restricted_classmethod
        def load(cls):
            return cls

    assert Loads.load() is Loads
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Loads().load()


def test_the_command_line_hands_out_its_parsers_and_its_configuration(tmp_path):
    """Elsewhere: ``cli.parser`` holds the parsers of subcommands; ``parser.dump`` makes the configuration."""
    seen = {}

    class Notes(LightningCLI):
        def _parse_ckpt_path(self):
            """Overridden by ``MetalitCLI``: where it is not called, a checkpoint's values win over the config's."""
            seen["asked"] = True

        def before_instantiate_classes(self):
            private.fill_config_dump(self)
            seen["dump"] = self.config_dump
            seen["parsers"] = private.subcommand_parsers(self)
            seen["fit"] = private.parser_of(self, "fit")

        def fit(self, model, **_):
            """Train nothing."""

    options = ["fit", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=3"]
    Notes(Small, args=options, save_config_callback=None)
    assert seen["asked"]
    assert seen["fit"] is seen["parsers"]["fit"]
    assert isinstance(seen["fit"].callback_keys, list)
    assert seen["dump"]["trainer"]["max_steps"] == 3


class Small(Plain):
    def __init__(self, size: int = 1):
        super().__init__()


def test_the_progress_bar_asks_for_the_name_of_an_epoch(tmp_path):
    """Overridden by ``Progress``: where it is no longer asked, the bar says "Epoch 0/-2" again, and no more."""
    asked = []

    class Bar(RichProgressBar):
        def _get_train_description(self, current_epoch):
            asked.append(current_epoch)
            return "Training"

    trainer(tmp_path, Bar(), enable_progress_bar=True).fit(Plain(), loader(1))
    assert asked == [0]
