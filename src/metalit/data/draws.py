"""What our DataModules share: training data without an end, drawn by index and divided among the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from metalit.checkpoints import LoadedSafely
from metalit.data.base import Split, task_keys
from metalit.data.stream import Draw, EvalStream, TrainStream, fused_steps, overfitted
from metalit.errors import InputError
from metalit.private_torch import pytree_map
from metalit.problem import Matrix, Splits

Data = TypeVar("Data", Splits, Matrix)


class Ranks(NamedTuple):
    """Which rank this is, and of how many."""

    rank: int
    number: int


class StreamDataModule(LoadedSafely, LightningDataModule, ABC):  # type: ignore[misc]  # its load_from_checkpoint
    """Draws for training, validation and test, a pure function of (seed, split, index).

    Training takes the indices of :class:`~metalit.data.stream.TrainStream`, shared by the ranks.

    Args:
        number: how many indices an outer step takes, over all ranks.
        argument: the argument by which the user gives that number; None if it is not the user's to choose.
        seed: the seed of every draw; independent of ``seed_everything``.
    """

    def __init__(self, number: int, argument: str | None, seed: int) -> None:
        super().__init__()
        self.save_given()
        self.number = number
        self.argument = argument
        self.seed = seed

    @abstractmethod
    def draw(self, split: Split, index: Tensor) -> Any:
        """Return what these global indices, ``[n]``, stand for, with a leading dimension of n."""

    @abstractmethod
    def eval_stream(self, split: Split) -> EvalStream | Sequence[Any]:
        """This rank's share of what is validated or tested."""

    @property
    def ranks(self) -> Ranks:
        """Which rank this is, and of how many."""
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Ranks(0, 1)

    def check_divisible(self) -> None:
        """Check that the ranks can share each outer step.

        Raises:
            InputError: they do not divide the number of draws.
        """
        ranks = self.ranks.number
        if self.number % ranks:
            raise InputError(
                f"{self.argument}={self.number} in each outer step cannot be shared by {ranks} processes; "
                f"choose a multiple of {ranks}"
                if self.argument
                else f"{type(self).__name__} makes one draw in each outer step, which {ranks} processes cannot share; "
                "use one, with trainer.devices=1"
            )

    def train_stream(self, draw: Draw) -> TrainStream:
        """This rank's share of ``draw`` in every outer step, from the step that the trainer is at.

        Raises:
            InputError: no ``max_steps``.
        """
        trainer = cast(Trainer, self.trainer)
        steps = trainer.max_steps
        if steps < 1:
            raise InputError(
                f"trainer.max_steps={steps}: draws have no last one, so give the number of outer steps, such as 10000"
            )
        draw, fused = overfitted(draw, self.number, trainer), fused_steps(trainer)
        return TrainStream(draw, self.number, steps, lambda: trainer.global_step, *self.ranks, fused)

    def train_dataloader(self) -> Any:
        """What is drawn in every outer step."""
        return self.train_stream(partial(self.draw, "train"))

    def val_dataloader(self) -> EvalStream | Sequence[Any]:
        """The same data in every validation."""
        return self.eval_stream("val")

    def test_dataloader(self) -> EvalStream | Sequence[Any]:
        """The same data in every test."""
        return self.eval_stream("test")


class DrawsDataModule(StreamDataModule):
    """Draws that are all of the same data, each with a key of its own, for bilevel problems.

    Validation and test take index 0 alone, on every rank.

    Args:
        number, argument, seed: see :class:`StreamDataModule`.

    Raises:
        InputError: from :meth:`setup`, whatever cannot be used; no ``max_steps``; prediction.
    """

    @abstractmethod
    def prepare(self) -> None:
        """Read and check what the draws are made from."""

    def setup(self, stage: str) -> None:
        """Check everything before anything is trained."""
        if stage == "predict":
            self.predict_dataloader()
        if not (isinstance(self.number, int) and self.number >= 1):
            raise InputError(f"{self.argument}={self.number!r} must be a whole number, at least 1")
        self.prepare()
        if stage == "fit":
            self.check_divisible()

    def predict_dataloader(self) -> NoReturn:
        """There is nothing to predict."""
        raise InputError(
            f"predict answers for few-shot learners, on the points of data.predict_file, and {type(self).__name__} "
            "has none; use validate or test"
        )

    def eval_stream(self, split: Split) -> EvalStream:
        """One draw."""
        return EvalStream(partial(self.draw, split), tasks=1, batch=1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move each tensor, an expanded one as the one that it repeats."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.ndim == 0 or leaf.stride(0):
                return leaf.to(device)
            return leaf[:1].to(device).expand(leaf.shape)

        return pytree_map(moved, batch)


class KeysDataModule(DrawsDataModule):
    """Keys alone (:mod:`metalit.keys`), for problems that hold their own data.

    Args:
        draws: how many keys an outer step takes, over all ranks.
        seed: the seed of the keys.
    """

    def __init__(self, draws: int, seed: int) -> None:
        super().__init__(draws, "model.draws", seed)

    def prepare(self) -> None:
        """There is nothing to read."""

    def draw(self, split: Split, index: Tensor) -> Tensor:
        """Return the keys of (seed, split, index), ``[n]``."""
        return task_keys(self.seed, split, index)


def expanded(data: Data, key: Tensor) -> Data:
    """Repeat one task for each of ``[n]`` keys: every tensor gets a dimension of n, without a copy."""
    repeated = pytree_map(lambda leaf: None if leaf is None else leaf.expand(len(key), *leaf.shape), data)
    return repeated._replace(key=key)
