"""The learner that a callback is called with."""

from lightning.pytorch import Callback, LightningModule

from metalit.errors import InputError
from metalit.modules.base import OuterLearner


def learner_of(module: LightningModule, callback: Callback) -> OuterLearner:
    """The module as the learner that a callback needs.

    Raises:
        InputError: it is none of metalit's.
    """
    if not isinstance(module, OuterLearner):
        raise InputError(
            f"{type(callback).__name__} asks a learner of metalit, and {type(module).__name__} is none; leave the "
            "callback out"
        )
    return module
