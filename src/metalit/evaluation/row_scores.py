"""Loss and accuracy over the rows of many batches and all ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RowScores(Metric):
    """The mean loss and the share of right answers, every real row counted once, whatever the batches and ranks."""

    full_state_update = False
    loss: Tensor
    rows: Tensor
    right: Tensor
    judged: Tensor
    unjudged: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "rows", "right", "judged", "unjudged"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, right: Tensor | None, real: Tensor | None) -> None:
        """Take in a batch.

        Args:
            losses: ``[rows]``.
            right: the share of right answers in each row, ``[rows]``; None where there are no answers.
            real: which rows count, ``[rows]``; all if None.
        """
        losses = losses if real is None else losses[real]
        self.loss += losses.double().sum()
        self.rows += len(losses)
        if right is None:
            self.unjudged += len(losses)
        else:
            right = right if real is None else right[real]
            self.right += right.double().sum()
            self.judged += len(right)

    def compute(self) -> Tensor:
        """Loss and accuracy; the latter is NaN unless all rows have answers."""
        right = torch.where(self.unjudged == 0, self.right / self.judged, torch.nan)
        return torch.stack([self.loss / self.rows, right])
