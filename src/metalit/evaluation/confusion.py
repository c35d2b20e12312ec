"""Which classes are taken for which others: counts over all queries of a test, on all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from metalit.judging import chosen, real_rows
from metalit.problem import Task

_MOST_CLASSES = 5000  # whose counts take 200 MB
_SHOWN = 5


@dataclass(frozen=True)
class Confusion:
    """How often each class was taken for each.

    Args:
        names: of the classes.
        counts: ``[true class, predicted class]``.
        steps: after how many inner steps.
    """

    names: Sequence[str]
    counts: np.ndarray
    steps: int

    def frame(self) -> pd.DataFrame:
        """A row for each true class that was asked, a column for each class that was asked or predicted."""
        asked, predicted = self.counts.any(1), self.counts.any(0)
        rows, columns = np.flatnonzero(asked), np.flatnonzero(asked | predicted)
        names = np.array(self.names, dtype=object)
        frame = pd.DataFrame(self.counts[np.ix_(rows, columns)], columns=pd.Index(names[columns]))
        frame.insert(0, "true class", names[rows], allow_duplicates=True)
        return frame

    def lines(self) -> list[str]:
        """The most frequent confusions, in words.

        >>> counts = np.array([[8, 2], [0, 10]])
        >>> Confusion(["1", "7"], counts, 0).lines()
        ['most often taken for another class:', '  1 taken for 7: 2 of 10 (20 %)']
        """
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        # a stable order, so that several ranks tell the same
        most = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN]
        pairs = [(place // len(wrong), place % len(wrong)) for place in most if wrong.flat[place]]
        after = f" after {self.steps} inner step{'s' if self.steps > 1 else ''}" if self.steps else ""
        if not pairs:
            return [f"no class was taken for another{after}"]
        found = [f"most often taken for another class{after}:"]
        for true, other in pairs:
            times, asked = wrong[true, other], self.counts[true].sum()
            share = f"{times} of {asked} ({times / asked:.0%})".replace("%", " %")
            found.append(f"  {self.names[true]} taken for {self.names[other]}: {share}")
        return found


class Confusions(nn.Module):
    """Counts, batch after batch of tasks whose classes have names.

    Args:
        names: of all classes.
        steps: after how many inner steps the predictions are taken.
    """

    def __init__(self, names: Sequence[str], steps: int) -> None:
        super().__init__()
        self.names = names
        self.steps = steps
        self._counts = MulticlassConfusionMatrix(len(names), validate_args=False)

    @classmethod
    def of(cls, names: Sequence[str] | None, steps: int) -> "Confusions | None":
        """Return none where classes have no names, or are so many that their counts would fill the memory."""
        return cls(names, steps) if names is not None and 2 <= len(names) <= _MOST_CLASSES else None

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
        true, taken = (tasks.classes.gather(1, labels.view_as(query.y)).flatten() for labels in (query.y, answers))
        real = real_rows(loss, query.y.flatten(), None if query.mask is None else query.mask.flatten())
        real = torch.ones_like(true, dtype=torch.bool) if real is None else real
        self._counts.update(taken[real], true[real])

    def finish(self) -> Confusion:
        """Gather the counts of all ranks."""
        counts = self._counts.compute().cpu().numpy()
        self._counts.reset()
        return Confusion(self.names, counts, self.steps)
