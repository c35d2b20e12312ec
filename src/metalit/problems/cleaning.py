"""Data hyper-cleaning: a weight for each training example, learned on clean validation examples."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metalit.autodiff import call, draws, sees_other_rows
from metalit.errors import InputError, check_not_negative
from metalit.problem import Inner, Points, Splits
from metalit.problems.rows import Batch, RowsProblem, check_size
from metalit.tree import dot

_CERTAIN = 40.0  # σ of it is 1 to the last digit of float32


class Cleaning(RowsProblem):
    """inner_loss = 1/n Σᵢ σ(φᵢ) · cross-entropy of training row i + ½ decay ‖θ‖², φ a logit for each row.

    Franceschi et al. 2017, section 5.1. An example with a weight below ½ counts as found to be corrupted.

    Args:
        network: any classifier of ``[rows, inputs]``; its own weights are where θ starts.
        examples: the number of training rows.
        decay: the weight of ½‖θ‖² in the inner loss, which makes a linear classifier's strongly convex.
        logit: where every φᵢ starts; 0 is a weight of ½.
        batch, outer_batch: see :class:`~metalit.problems.rows.RowsProblem`.

    Raises:
        InputError: no example, a negative decay, BatchNorm or dropout, a network without a trainable parameter; later:
            data of another number of rows or columns, or without classes.
    """

    def __init__(
        self,
        network: nn.Module,
        examples: int,
        decay: float = 1e-3,
        logit: float = 0.0,
        batch: Batch = "all",
        outer_batch: Batch = "all",
    ) -> None:
        super().__init__(batch, outer_batch)
        if examples < 1:
            raise InputError(f"Cleaning: examples={examples} must be at least 1")
        check_not_negative("Cleaning", "decay", decay)
        if sees_other_rows(network):
            raise InputError("Cleaning: BatchNorm mixes the rows that are to be weighted; use LayerNorm or GroupNorm")
        if draws(network):
            raise InputError("Cleaning: dropout would weight the rows too; leave it out, and use decay")
        self.trained = [name for name, value in network.named_parameters() if value.requires_grad]
        if not self.trained:
            raise InputError("Cleaning: network has no trainable parameter; unfreeze one with requires_grad_()")
        self.network = network.requires_grad_(False)
        self.examples = examples
        self.decay = decay
        self.logit = nn.Parameter(self.written("logit", [logit] * examples))

    def outer(self) -> dict[str, Tensor]:
        """φ alone: the network's weights are the inner variable, even where they are made trainable again."""
        return {"logit": self.logit} if self.logit.requires_grad else {}

    def init(self, outer: dict[str, Tensor], task: Splits) -> dict[str, Tensor]:
        """The network's own weights."""
        return {name: attrgetter(name)(self.network).detach() for name in self.trained}

    def predict(self, inner: dict[str, Tensor], x: Tensor) -> Tensor:
        """The class scores, ``[rows, classes]``."""
        return call(self.network, inner, x)

    def row_losses(self, prediction: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(prediction, y, reduction="none")

    def row_weights(self, outer: dict[str, Tensor], rows: Any) -> Tensor:
        """σ(φ) of these rows."""
        return torch.sigmoid(outer["logit"][rows])

    def penalty(self, inner: Inner, outer: dict[str, Tensor]) -> Tensor:
        """½ decay ‖θ‖²."""
        return 0.5 * self.decay * dot(inner, inner)

    def scores(self, inner: Inner, outer: dict[str, Tensor], task: Splits, split: str) -> dict[str, Tensor]:
        """The scores of the rows, and the F1 of finding the corrupted examples: 2TP / (2TP + FP + FN)."""
        scores = super().scores(inner, outer, task, split)
        found, true = outer["logit"] < 0, task.corrupted
        hits, wrong = (found & true).sum(), (found ^ true).sum()
        if bool(true.any()):
            scores["f1"] = (2 * hits / (2 * hits + wrong)).to(scores["loss"].dtype)
        return scores

    def baselines(self, outer: dict[str, Tensor], task: Splits) -> dict[str, tuple[dict[str, Tensor], Splits]]:
        """Trained on all examples alike, and on the clean ones alone, each by the mean over the rows that it sees."""
        certain, clean = torch.full_like(outer["logit"], _CERTAIN), ~task.corrupted
        found = {"all examples alike": ({"logit": certain}, task)}
        if not bool(clean.all()):
            train = Points(task.train.x[clean], task.train.y[clean])
            alone = task._replace(train=train, corrupted=task.corrupted[clean])
            found["the clean examples alone"] = ({"logit": certain[clean]}, alone)
        return found

    def results(self, inner: Inner, outer: dict[str, Tensor], task: Splits) -> dict[str, dict[str, Tensor]]:
        """``examples``: the weight of each, its label, and whether that was corrupted."""
        weight = torch.sigmoid(outer["logit"])
        return {"examples": {"weight": weight, "label": task.train.y, "corrupted": task.corrupted}}

    def check_targets(self, y: Tensor) -> None:
        """Classes."""
        if y.is_floating_point() or y.dim() != 1:
            raise InputError(
                f"Cleaning: the targets must be classes, [rows], and are {tuple(y.shape)} of {y.dtype}; for a CSV, set "
                "data.rows.classes=true"
            )

    def check(self, task: Splits) -> None:
        """Raise an ``InputError`` for data of another number of rows, or without classes."""
        super().check(task)
        check_size("Cleaning", "examples", self.examples, len(task.train.x), "training rows")
        try:
            scores = self.predict(self.init(self.outer(), task), task.train.x[:2])
        except RuntimeError as error:
            columns = task.train.x.shape[-1]
            raise InputError(
                f"Cleaning: network cannot take rows of {columns} columns: {str(error).splitlines()[0]}"
            ) from error
        classes = 1 + max(int(points.y.max()) for points in (task.train, task.val, task.test))
        if scores.dim() != 2 or scores.shape[1] < classes:
            raise InputError(
                f"Cleaning: network returned shape {tuple(scores.shape)} for two rows; it must be [rows, classes] for "
                f"at least {classes} classes"
            )
