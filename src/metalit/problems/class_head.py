"""What heads of classes share that say something of each row by its features alone."""

from abc import abstractmethod

from torch import Tensor, nn

from metalit.autodiff.usable import check_network
from metalit.problem import Task
from metalit.problems.heads import QUERY_DRAW, SUPPORT_DRAW, Head


class ClassHead(Head):
    """A problem of classes whose ``init`` reads the features of the support set; the cross-entropy judges its logits.

    Args:
        network: any module that maps ``[rows, ...]`` to ``[rows, features]``.

    Raises:
        InputError: no network; later: targets that are no classes, and features of another shape.
    """

    needs_classes = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        check_network("network", network)
        self.network = network

    @abstractmethod
    def logits(self, inner: dict[str, Tensor], features: Tensor) -> Tensor:
        """Return the logits of ``[rows, features]``, ``[rows, ways]``."""

    def support_features(self, outer: dict[str, Tensor], task: Task) -> Tensor:
        """Those that ``init`` reads, ``[rows, features]``."""
        return self.called("network", outer, task.support.x, task, SUPPORT_DRAW)

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """The cross-entropy on the support set."""
        return self.judge(self.logits(inner, self.called("network", outer, task.support.x, task, step)), task.support)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The cross-entropy on the query set."""
        return self.judge(self.logits(inner, self.called("network", outer, task.query.x, task, QUERY_DRAW)), task.query)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The logits at ``x``, ``[rows, ways]``."""
        return self.logits(inner, self.called("network", outer, x))
