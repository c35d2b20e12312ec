"""A ridge regression on learned features, solved exactly on the support set."""

import math

import torch
from torch import Tensor, nn

from metalit.autodiff.usable import check_network
from metalit.errors import InputError
from metalit.problem import Points, Task
from metalit.problems.heads import (
    QUERY_DRAW,
    SUPPORT_DRAW,
    Head,
    check_positive,
    one_hot,
    product,
    real_rows,
    row_count,
    shifted,
)

_LARGEST = 80.0  # its exponential is finite in single precision


class RidgeHead(Head):
    """Learn features Φ from which a ridge regression, solved exactly, fits a task (R2D2: Bertinetto et al. 2019).

    init: W, b = argmin ½‖ΦW + b − y‖² + ½λ‖W‖² on the support set, whose mean over rows is the inner loss; outer_loss =
    mean squared error on the query set. With centred Φ and y,

    W = (ΦᵀΦ + λI)⁻¹Φᵀy = Φᵀ(ΦΦᵀ + λI)⁻¹y,

    of which the smaller system is solved, in double precision. Features and λ are learned through the solution, by
    :class:`~metalit.hypergradients.direct.Direct`, without an inner step. Further steps descend the same objective.

    Of classes, y is one-hot, and the outer loss is the cross-entropy of αΦW + αb + β, whose scale α and shift β are
    learned too; the shift is one number for all classes, as in the paper, and so moves no probability.

    Args:
        network: any module that maps ``[rows, inputs]`` to ``[rows, features]``.
        log_penalty: where log λ starts.
        intercept: solve for b too, which is not penalised; else it is 0. A bias that ends the network is then without
            effect, and its gradient is rounding: leave it out.
        classes: whether targets are classes, as many as ``Task.classes``.
        scale: where α starts; one-hot answers lie about 0 and 1.

    Raises:
        InputError: no network, a penalty that is not finite, or a scale that is not positive; later: targets of the
            other kind, and features of another shape.

    >>> from metalit.problem import Points
    >>> head = RidgeHead(nn.Identity(), log_penalty=0.0)
    >>> points = Points(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.5]]))
    >>> head.init(head.outer(), Task(points, points, torch.tensor(0)))
    {'weight': tensor([[1.]], grad_fn=<ToCopyBackward0>)}
    """

    def __init__(
        self,
        network: nn.Module,
        log_penalty: float = 0.0,
        intercept: bool = False,
        classes: bool = False,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        check_network("network", network)
        if not -math.inf < log_penalty <= _LARGEST:
            raise InputError(
                f"RidgeHead: log_penalty={log_penalty} must be finite, and {_LARGEST} at most, such as -2: its "
                "exponential is the penalty"
            )
        self.network = network
        self.intercept = intercept
        self.needs_classes = classes
        self.log_penalty = nn.Parameter(self.written("log_penalty", log_penalty))
        if classes:
            check_positive("RidgeHead", "scale", scale, 10.0)
            self.scale = nn.Parameter(self.written("scale", scale))
            self.shift = nn.Parameter(torch.zeros(()))

    def init(self, outer: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The solution on the support set: ``weight``, ``[features, outputs]``, and ``bias``, ``[outputs]``."""
        points = self._fitted(task)
        features = self._features(outer, points.x, task, SUPPORT_DRAW)
        phi, y = real_rows(features, points.mask), real_rows(points.y, points.mask)
        if self.intercept:
            centre, level = phi.sum(0) / row_count(points), y.sum(0) / row_count(points)
            phi, y = real_rows(phi - centre, points.mask), real_rows(y - level, points.mask)
        penalty = outer["log_penalty"].double().exp()
        if phi.shape[0] < phi.shape[1]:
            weight = phi.mT @ _solve(shifted(phi @ phi.mT, penalty), y)
        else:
            weight = _solve(shifted(phi.mT @ phi, penalty), phi.mT @ y)
        found = {"weight": weight, "bias": level - centre @ weight} if self.intercept else {"weight": weight}
        return {name: value.to(outer["log_penalty"].dtype) for name, value in found.items()}

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """½‖ΦW + b − y‖² + ½λ‖W‖² on the support set, divided by its rows: the solution is its minimum."""
        points = self._fitted(task)
        errors = _answers(inner, self._features(outer, points.x, task, step)) - points.y
        squares = errors.square().sum(1)
        squares = squares if points.mask is None else squares.where(points.mask, 0.0)
        penalty = outer["log_penalty"].exp() * inner["weight"].square().sum()
        return 0.5 * (squares.sum() + penalty) / row_count(points)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The mean squared error on the query set, or the cross-entropy of classes."""
        return self.judge(self._said(inner, outer, self._features(outer, task.query.x, task, QUERY_DRAW)), task.query)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """ΦW + b at ``x``; of classes the logits α(ΦW + b) + β."""
        return self._said(inner, outer, self._features(outer, x))

    def _fitted(self, task: Task) -> Points:
        """The rows that are solved for: classes are one-hot."""
        points = task.support
        if not self.needs_classes:
            return points
        members = one_hot(points, task)
        return Points(points.x, members.to(self.log_penalty.dtype), members.any(1))

    def _said(self, inner: dict[str, Tensor], outer: dict[str, Tensor], features: Tensor) -> Tensor:
        answers = _answers(inner, features)
        return outer["scale"] * answers + outer["shift"] if self.needs_classes else answers

    def _features(self, outer: dict[str, Tensor], x: Tensor, task: Task | None = None, draw: int = 0) -> Tensor:
        return self.called("network", outer, x, task, draw)


def _answers(inner: dict[str, Tensor], features: Tensor) -> Tensor:
    return product(features, inner["weight"]) + inner.get("bias", 0.0)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    # _ex: nothing is checked, for which a GPU would have to wait
    return torch.linalg.solve_ex(matrix, right)[0]
