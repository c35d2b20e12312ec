"""Per-sample gradient norms, which tell wrong labels from right ones."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torchmetrics.functional.classification import binary_auroc

from metalit.errors import InputError


class SampleGradientNorms(Callback):
    """Logs the norm of each training row's own loss gradient at every validation, as a histogram in TensorBoard.

    A row that the learner contradicts has a large gradient. Where it is known which labels were corrupted, corrupted
    and clean rows get a histogram each, and ``sample_gradients/auroc`` says how well the norm tells them apart: the
    chance that a corrupted row's is larger than a clean one's.

    Raises:
        InputError: the learner has no rows.
    """

    def on_validation_end(self, trainer: Trainer, learner: LightningModule) -> None:
        """Differentiate row by row, all at once."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not hasattr(learner, "sample_gradient_norms"):
            raise InputError(f"SampleGradientNorms: {type(learner).__name__} has no rows; leave the callback out")
        norms, corrupted = learner.sample_gradient_norms(next(iter(trainer.val_dataloaders)))
        groups = {"all": norms}
        if bool(corrupted.any()):
            groups = {"clean": norms[~corrupted], "corrupted": norms[corrupted]}
            learner.write_scalars({"sample_gradients/auroc": binary_auroc(norms, corrupted.long())})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for name, values in groups.items():
                    logger.experiment.add_histogram(f"sample_gradients/{name}", values, learner.outer_step)
