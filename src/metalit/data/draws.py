"""What every DataModule of bilevel problems and of supervised training shares: a stream of outer steps without end."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor
from torch.utils._pytree import tree_map

from metalit.checkpoints import LoadedSafely
from metalit.data.base import Split
from metalit.data.stream import Draw, EvalStream, TrainStream, fused_steps, overfitted
from metalit.errors import InputError
from metalit.problem import Matrix, Splits

Posed = TypeVar("Posed", Splits, Matrix)


class DrawsDataModule(LoadedSafely, LightningDataModule, ABC):
    """Draws for training, validation and test, a pure function of (seed, split, index).

    Training takes the indices of :class:`~metalit.data.stream.TrainStream`, shared by the ranks; validation and test
    take index 0 alone, on every rank.

    Args:
        number: how many indices an outer step takes, over all ranks.
        argument: the name that the user gives that number by, if it is the user's to choose.
        seed: the seed of every draw; independent of ``seed_everything``.

    Raises:
        InputError: from :meth:`setup`, whatever cannot be used; no ``max_steps``; prediction.
    """

    def __init__(self, number: int, argument: Literal["draws", "batch_size"] | None, seed: int) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:
            # what the command line gave; what Python code passes are live objects, and no checkpoint may hold those
            self.save_hyperparameters(logger=False)
        self.number = number
        self.argument = argument
        self.seed = seed

    @abstractmethod
    def prepare(self) -> None:
        """Read and check what the draws are made from."""

    @abstractmethod
    def draw(self, split: Split, index: Tensor) -> Any:
        """Return the draws with these global indices, ``[n]``."""

    def setup(self, stage: str) -> None:
        """Check everything before anything is trained."""
        if stage == "predict":
            self.predict_dataloader()
        if not (isinstance(self.number, int) and self.number >= 1):
            raise InputError(f"data.{self.argument}={self.number!r} must be a whole number, at least 1")
        self.prepare()
        ranks = self.ranks[1]
        if stage == "fit" and self.number % ranks:
            raise InputError(
                f"data.{self.argument}={self.number} in each outer step cannot be shared by {ranks} processes; "
                f"choose a multiple of {ranks}"
                if self.argument
                else f"{type(self).__name__} makes one draw in each outer step, which {ranks} processes cannot share; "
                "use one, with trainer.devices=1"
            )

    def train_stream(self, draw: Draw) -> TrainStream:
        """This rank's share of ``draw`` in every outer step, from the step that the trainer is at."""
        steps = self.trainer.max_steps
        if steps < 1:
            raise InputError(
                f"trainer.max_steps={steps}: draws have no last one, so give the number of outer steps, such as 10000"
            )
        draw, here = overfitted(draw, self.number, self.trainer), fused_steps(self.trainer)
        return TrainStream(draw, self.number, steps, lambda: self.trainer.global_step, *self.ranks, here)

    def train_dataloader(self) -> Any:
        """The draws of every outer step."""
        return self.train_stream(partial(self.draw, "train"))

    def val_dataloader(self) -> EvalStream:
        """The same data in every validation."""
        return self.eval_stream("val")

    def test_dataloader(self) -> EvalStream:
        """The same data in every test."""
        return self.eval_stream("test")

    def predict_dataloader(self) -> NoReturn:
        """There is nothing to predict."""
        raise InputError(
            f"predict answers for few-shot learners, on the points of data.predict_file, and {type(self).__name__} "
            "has none; use validate or test"
        )

    def eval_stream(self, split: Split) -> EvalStream:
        """One draw."""
        return EvalStream(partial(self.draw, split), tasks=1, batch=1)

    @property
    def ranks(self) -> tuple[int, int]:
        """Which rank this is, and of how many."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move each tensor, an expanded one as the one that it repeats."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.ndim == 0 or leaf.stride(0):
                return leaf.to(device)
            return leaf[:1].to(device).expand(leaf.shape)

        return tree_map(moved, batch)


def expanded(posed: Posed, key: Tensor) -> Posed:
    """Pose one object once for each of ``[n]`` keys: every tensor gets a dimension of n, without a copy."""
    return tree_map(lambda leaf: None if leaf is None else leaf.expand(len(key), *leaf.shape), posed)._replace(key=key)
