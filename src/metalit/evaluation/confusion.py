"""Which classes are taken for which others: counts over all queries of a test, on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from metalit.judging import chosen, real_rows
from metalit.problem import Task

_SHOWN = 5


@dataclass(frozen=True)
class Confusion:
    """How often which class was taken for which.

    Args:
        names: of the classes.
        true, taken: ``[pairs]`` numbers of classes, by rising numbers.
        counts: ``[pairs]``, how often the one was taken for the other; at least once.
        steps: after how many inner steps.
    """

    names: Sequence[str]
    true: np.ndarray
    taken: np.ndarray
    counts: np.ndarray
    steps: int

    def frame(self) -> pd.DataFrame:
        """A row for each true class that was asked, a column for each class that was asked or predicted."""
        rows, row = np.unique(self.true, return_inverse=True)
        columns, column = np.unique(np.concatenate([self.true, self.taken]), return_inverse=True)
        table = np.zeros((len(rows), len(columns)), dtype=np.int64)
        table[row, column[len(self.true) :]] = self.counts
        names = np.array(self.names, dtype=object)
        frame = pd.DataFrame(table, columns=pd.Index(names[columns]))
        frame.insert(0, "true class", names[rows], allow_duplicates=True)
        return frame

    def lines(self) -> list[str]:
        """The most frequent confusions, in words.

        >>> Confusion(["1", "7"], np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([8, 2, 10]), 0).lines()
        ['most often taken for another class:', '  1 taken for 7: 2 of 10 (20 %)']
        """
        wrong = np.flatnonzero(self.true != self.taken)
        # a stable order, so that several ranks tell the same
        most = wrong[np.argsort(-self.counts[wrong], kind="stable")][:_SHOWN]
        after = f" after {self.steps} inner step{'s' if self.steps > 1 else ''}" if self.steps else ""
        if not len(most):
            return [f"no class was taken for another{after}"]
        found = [f"most often taken for another class{after}:"]
        for true, taken, count in zip(self.true[most], self.taken[most], self.counts[most], strict=True):
            asked = self.counts[self.true == true].sum()
            share = f"{count} of {asked} ({count / asked:.0%})".replace("%", " %")
            found.append(f"  {self.names[true]} taken for {self.names[taken]}: {share}")
        return found


class Confusions(nn.Module):
    """Collects, batch after batch of tasks whose classes have names, what each query was taken for.

    Only pairs that occur are counted: a matrix of all that there may be would fill the memory.

    Args:
        names: of all classes.
        steps: after how many inner steps the predictions are taken.
        device: where they are.
    """

    def __init__(self, names: Sequence[str], steps: int, device: torch.device) -> None:
        super().__init__()
        self.names = names
        self.steps = steps
        self._pairs = CatMetric(nan_strategy="disable").to(device)
        self._pairs.set_dtype(torch.float64)  # whole numbers up to 2⁵³

    def add(self, loss: nn.Module | None, predictions: Tensor, tasks: Task) -> None:
        """Take what was predicted for the queries of a batch of tasks.

        Args:
            loss: the criterion, which tells how a prediction answers.
            predictions: ``[tasks, steps, rows, outputs]``.
            tasks: with ``classes``.
        """
        assert tasks.classes is not None
        query, prediction = tasks.query, predictions[:, self.steps]
        answers = chosen(loss, prediction.flatten(0, 1), query.y.flatten())
        if answers is None:
            return
        # what is ignored has no class
        labels = query.y.clamp(min=0), answers.view_as(query.y)
        true, taken = (tasks.classes.gather(1, each).flatten() for each in labels)
        real = real_rows(loss, query.y.flatten(), None if query.mask is None else query.mask.flatten())
        pairs = (true * len(self.names) + taken).double()
        self._pairs.update(pairs if real is None else pairs[real])

    def finish(self) -> Confusion | None:
        """Gather those of all ranks; None where it is not known how a prediction answers."""
        found = self._pairs.compute()
        self._pairs.reset()
        pairs, counts = np.unique(torch.as_tensor(found).long().cpu().numpy(), return_counts=True)
        return Confusion(self.names, *np.divmod(pairs, len(self.names)), counts, self.steps) if len(pairs) else None
