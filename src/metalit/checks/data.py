"""Where the Trainer's batches come from: that there are any, and whose they are."""

from typing import cast

from lightning.pytorch import LightningDataModule, LightningModule

from metalit.errors import InputError
from metalit.private_lightning import data_source


def check_source(module: LightningModule, takes: str) -> None:
    """Check that there is data for what the Trainer is about to do.

    A learner that brings training data of its own validates on its own too, and only then.

    Args:
        module: the learner.
        takes: what data it takes, for the message.

    Raises:
        InputError: there is none.
    """
    trainer = module.trainer
    fit, validate = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    loops = {"fit": fit, "validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    source = data_source(loops[cast(str, trainer.state.fn)])
    if not source.is_defined():
        owner = "" if source.instance is module else f" in {type(source.instance).__name__}"
        raise InputError(f"data: there is no {source.name}{owner}; {type(module).__name__} takes {takes}")
    own = type(module).val_dataloader.__module__.startswith("metalit.")
    if own and data_source(fit).instance is not module and data_source(validate).instance is module:
        data_source(validate).instance = LightningDataModule()  # which has none


def check_one_loader(batches: list[int | float]) -> None:
    """Check that what is evaluated comes from one loader.

    Args:
        batches: of each loader.

    Raises:
        InputError: there are several, whose metrics would be mixed.
    """
    if len(batches) > 1:
        raise InputError(
            f"data: there are {len(batches)} loaders to evaluate, and a learner evaluates one; call trainer.validate "
            "or trainer.test once for each"
        )
