"""Metrics that callbacks and schedulers wait for: the best one is kept, and one that never comes is told at once."""

from functools import partial

import pytest
import torch
from fits import bare, trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from tiny import DATA, bilevel, meta, supervised

from metalit.callbacks import BestCheckpoint
from metalit.errors import InputError
from metalit.modules import SupervisedLearner


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        *(("val/accuracy", "max"), ("val/r2", "max"), ("val/F1_macro", "max"), ("val/auroc", "max")),
        *(("val/loss", "min"), ("val/loss_step_3", "min"), ("val/relative_error", "min"), ("val/RMSE", "min")),
    ],
)
def test_the_name_tells_which_value_is_best(monitor, mode):
    assert BestCheckpoint(monitor).mode == mode
    other = "min" if mode == "max" else "max"
    assert BestCheckpoint(monitor, mode=other).mode == other


@pytest.mark.parametrize("monitor", ["val/size", "val/f1_loss", "val/lossless"])
def test_a_name_that_does_not_tell_needs_a_mode(monitor):
    with pytest.raises(InputError, match=rf"monitor='{monitor}'.*best_checkpoint\.mode: max, or min"):
        BestCheckpoint(monitor)
    assert BestCheckpoint(monitor, "max").mode == "max"
    with pytest.raises(InputError, match="mode='largest' must be 'min' or 'max'"):
        BestCheckpoint(monitor, "largest")


def test_the_best_accuracy_is_kept(tmp_path):
    found = []
    watch = LambdaCallback(
        on_validation_end=lambda run, module: run.sanity_checking or found.append(module.scores["learned"]["accuracy"])
    )
    best = BestCheckpoint("val/accuracy")
    # it learns, and then unlearns
    rate = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0 if step < 10 else -5.0)
    module = supervised(optimizer=partial(torch.optim.SGD, lr=0.5), scheduler=rate)
    trainer(tmp_path, 20, callbacks=[watch, best], val_check_interval=2).fit(module, DATA["supervised"]())
    assert found[-1] < max(found) > found[0]
    assert float(best.best_model_score) == pytest.approx(max(found))
    # the first of those that are as good
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["global_step"] == 2 * (1 + found.index(max(found)))


WAITING = {
    "early stopping": {"callbacks": lambda: [EarlyStopping("val_loss")]},
    "checkpoint": {"callbacks": lambda: [ModelCheckpoint(monitor="val_acc")], "enable_checkpointing": True},
    "best": {"callbacks": lambda: [BestCheckpoint("val/accuracy")], "enable_checkpointing": True},
    "training": {"callbacks": lambda: [EarlyStopping("train_loss")]},
}


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize("name", WAITING)
def test_a_metric_that_never_comes(name, sanity, tmp_path):
    options = {key: value() if callable(value) else value for key, value in WAITING[name].items()}
    run = bare(tmp_path, 8, val_check_interval=2, num_sanity_val_steps=sanity, **options)
    with pytest.raises(InputError, match=r"\.monitor='.*there are .*val/loss"):
        run.fit(bilevel(), DATA["bilevel"]())
    # before training where a validation came before it, and else at the first one
    assert run.global_step == (0 if sanity and name != "training" else 2)


def test_a_scheduler_that_waits_for_a_metric_that_never_comes(tmp_path):
    run = bare(tmp_path, 4)
    with pytest.raises(InputError, match=r"model\.scheduler\.monitor='val_loss'.*val/loss, val/loss_step_0"):
        run.fit(meta(scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val_loss")), DATA["meta"]())
    assert run.global_step == 0


def test_metrics_that_do_come_are_waited_for(tmp_path):
    class More(SupervisedLearner):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.log("val/mine", 1.0)

    callbacks = [EarlyStopping("train/loss"), EarlyStopping("nowhere", strict=False)]
    run = bare(tmp_path, 4, val_check_interval=2, callbacks=callbacks)
    run.fit(supervised(), DATA["supervised"]())
    assert run.global_step == 4
    run = bare(tmp_path, 4, val_check_interval=2, callbacks=[EarlyStopping("val/mine")])
    run.fit(More(supervised().network), DATA["supervised"]())
    assert run.global_step == 4


def test_nothing_validated_stops_nothing(tmp_path):
    run = bare(tmp_path, 4, limit_val_batches=0, val_check_interval=2, callbacks=[EarlyStopping("val/loss")])
    with pytest.raises(InputError, match="limit_val_batches=0 validates nothing"):
        run.fit(bilevel(), DATA["bilevel"]())
