"""Few-shot learning with any network: its weights are the outer variable, adapted copies of them the inner one."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from metalit.autodiff import call, draws, sees_other_rows
from metalit.autodiff.names import matching
from metalit.autodiff.usable import check_network
from metalit.errors import InputError
from metalit.judging import real_rows
from metalit.keys import fold
from metalit.losses import check_loss, row_losses
from metalit.problem import FewShotProblem, Points, Task
from metalit.problems.rows import check_task

_OUTER_DRAW = -1  # the dropout key of the outer loss; inner step k uses k


class FewShot(FewShotProblem):
    """Learn an initialisation φ of a network from which a few inner steps fit a task (Finn et al. 2017).

    inner_loss(θ) = mean loss on the support set,  outer_loss(θ) = mean loss on the query set,  init: θ₀ = φ[adapt].

    The parameters that ``adapt`` names are copied and adapted to each task; the other trainable parameters are learned
    over all tasks and stay as they are within one. So ``adapt=["*"]`` is MAML, the head alone ANIL (Raghu et al. 2020),
    the body alone BOIL (Oh et al. 2021). Frozen parameters are never touched.

    Args:
        network: any module that maps ``[rows, inputs]`` to ``[rows, outputs]``. Tied weights, unused and frozen
            parameters are fine. BatchNorm uses the statistics of the set before it, in both levels.
        loss: any criterion of ``torch.nn`` with ``reduction="none"``, or a module of your own that returns one value
            for each row (trailing dimensions are averaged). If not given, the squared error for real targets, and the
            cross-entropy for classes.
        adapt: shell-style patterns of the names of the parameters that are adapted, of those that are trainable when
            training starts.

    Raises:
        InputError: a pattern that matches no parameter, a network without any, a loss with some; a network whose
            parameters cannot be replaced (``DataParallel``, scripted or lazy modules); when training starts: a pattern
            that matches no trainable parameter; later:
            predictions and real-valued targets of different shapes, a loss that does not return a value for each row.
    """

    def __init__(self, network: nn.Module, loss: nn.Module | None = None, adapt: Sequence[str] = ("*",)) -> None:
        super().__init__()
        check_network("network", network)
        self.network = network
        check_loss(loss)
        self.loss = loss
        self.patterns = (adapt,) if isinstance(adapt, str) else tuple(adapt)
        # which of them are trainable is asked when training starts
        _adapted((name for name, _ in network.named_parameters()), self.patterns)

    def outer(self) -> dict[str, Tensor]:
        """The network's trainable parameters by their own names."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}

    @property
    def adapted(self) -> list[str]:
        """The names of the parameters that are adapted now."""
        return _adapted(self.outer(), self.patterns)

    def init(self, outer: dict[str, Tensor], task: Task | None = None) -> dict[str, Tensor]:
        """Hand over the adapted part of the outer variable."""
        return {name: outer[name] for name in _adapted(outer, self.patterns)}

    def check(self, task: Any) -> None:
        """Check that a task is one.

        Raises:
            InputError: it is data of another kind.
        """
        check_task(self, task, Task, "TaskDataModule")

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """The mean loss on the support set."""
        return self._mean_loss({**outer, **inner}, task.support, task.key, step)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The mean loss on the query set."""
        return self._mean_loss({**outer, **inner}, task.query, task.key, _OUTER_DRAW)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The adapted network's outputs at ``x``."""
        return call(self.network, {**outer, **inner}, x)

    def judge(self, prediction: Tensor, points: Points) -> Tensor:
        """The mean of the row losses over the real rows: no padding, nor what the criterion ignores."""
        rows = row_losses(self.loss, prediction, points.y)
        real = real_rows(self.loss, points.y, points.mask)
        if real is None:
            return rows.mean()
        return rows.where(real, 0.0).sum() / real.sum().clamp(min=1)

    def _mean_loss(self, parameters: dict[str, Tensor], points: Points, key: Tensor, draw: int) -> Tensor:
        if points.mask is not None and sees_other_rows(self.network):
            raise InputError(
                "network: BatchNorm would mix the padding of shorter tasks into its statistics; use LayerNorm or "
                "GroupNorm, or give every task the same number of rows"
            )
        drawing = fold(key, draw) if draws(self.network) else None
        return self.judge(call(self.network, parameters, points.x, key=drawing), points)


def _adapted(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of the names that match a pattern."""
    names = list(names)
    if not names:
        raise InputError("network: it has no trainable parameter; unfreeze one with requires_grad_()")
    return matching(names, patterns, "adapt")
