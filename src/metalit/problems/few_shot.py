"""Few-shot learning with any network: its weights are the outer variable, adapted copies of them the inner one."""

from collections.abc import Iterable, Sequence
from copy import copy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from metalit.autodiff import call, draws
from metalit.autodiff.names import matching
from metalit.autodiff.usable import check_network
from metalit.errors import InputError, check_not_negative
from metalit.judging import real_rows
from metalit.keys import fold
from metalit.losses import check_loss, mean_of_rows, row_losses
from metalit.problem import FewShotProblem, Points, Task
from metalit.problems.heads import check_no_padding
from metalit.problems.rows import check_task
from metalit.problems.step_copies import StepCopies
from metalit.tree import axpy, dot

_OUTER_DRAW = -1  # the dropout key of the outer loss; inner step k uses k


class FewShot(FewShotProblem):
    """Learn an initialisation φ of a network from which a few inner steps fit a task (Finn et al. 2017).

    inner_loss(θ) = mean loss on the support set + ½ proximal ‖θ − θ₀‖²,  outer_loss(θ) = mean loss on the query set,
    init: θ₀ = φ[adapt], and 0 where it is reset.

    The parameters that ``adapt`` names are copied and adapted to each task; the other trainable parameters are learned
    over all tasks and stay as they are within one. So ``adapt=["*"]`` is MAML, the head alone ANIL (Raghu et al. 2020),
    the body alone BOIL (Oh et al. 2021). Frozen parameters are never touched.

    Args:
        network: any module that maps ``[rows, inputs]`` to ``[rows, outputs]``. Tied weights, unused and frozen
            parameters are fine. BatchNorm uses the statistics of the set before it, in both levels.
        loss: any criterion of ``torch.nn`` with ``reduction="none"``, or a module that returns one value for each row
            (trailing dimensions are averaged); else the squared error of real targets, the cross-entropy of classes.
        adapt: shell-style patterns of the parameters that are adapted, of those that train when training starts.
        proximal: λ of iMAML (Rajeswaran et al. 2019, eq. 3), with which the hypergradient ``Implicit`` is valid.
        reset: patterns of adapted parameters that start at 0 in every task, such as CAVIA's context (Zintgraf et al.
            2019); nothing of them is learned over tasks.
        per_step: patterns of parameters that are not adapted, and of which each inner step has its own: MAML++'s scales
            and shifts (Antoniou et al. 2019, section 4). Those of the last step that was taken predict; beyond the
            trained steps the last stay. Without a learner, :meth:`trained_for` makes them.

    Raises:
        InputError: a pattern that matches no parameter, or when training starts no trainable one; a network without
            any, or whose parameters cannot be replaced; a loss with some; a negative ``proximal``; later: predictions
            and real targets of different shapes, a loss without a value for each row.
    """

    inner_term = "a positive proximal="

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | None = None,
        adapt: Sequence[str] = ("*",),
        proximal: float = 0.0,
        reset: Sequence[str] = (),
        per_step: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_network("network", network)
        self.network = network
        check_loss(loss)
        self.loss = loss
        self.patterns = (adapt,) if isinstance(adapt, str) else tuple(adapt)
        check_not_negative("FewShot", "proximal", proximal)
        self.proximal = proximal
        names = [name for name, _ in network.named_parameters()]
        self.copies = StepCopies(matching(names, per_step, "per_step", "parameter") if per_step else ())
        self.of_each_step = self.copies.names
        # which of them are trainable is asked when training starts
        adapted = self._adapted(names)
        self.reset = matching(adapted, reset, "reset", "adapted parameter") if reset else []
        self.steps_taken = 0

    def outer(self) -> dict[str, Tensor]:
        """The network's trainable parameters by their own names, a row for each step of those that are ``per_step``."""
        own = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        learned = {name: self.copies.outer().get(name, value) for name, value in own.items() if name not in self.reset}
        return {name: value for name, value in learned.items() if value.requires_grad}

    @property
    def adapted(self) -> list[str]:
        """The names of the parameters that are adapted now."""
        return self._adapted([*self.outer(), *self.reset])

    def trained_for(self, steps: int) -> None:
        """Make the rows of what is ``per_step``, one for each of the inner steps that are trained."""
        self.copies.make(self.network, steps)

    def after(self, steps: int) -> "FewShot":
        """Return the problem with the rows of inner step ``steps − 1``, the last that was taken."""
        if not self.copies.names:
            return self
        found = copy(self)
        found.steps_taken = steps
        return found

    def init(self, outer: dict[str, Tensor], task: Task | None = None) -> dict[str, Tensor]:
        """Hand over the adapted part of the outer variable, and zeros for what is ``reset``."""
        start = {**outer, **{name: torch.zeros_like(attrgetter(name)(self.network)) for name in self.reset}}
        return {name: start[name] for name in self._adapted(start)}

    def check(self, task: Any) -> None:
        """Raise an :class:`InputError` if it is data of another kind."""
        check_task(self, task, Task, "TaskDataModule")

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """The mean loss on the support set, and the proximal term."""
        loss = self._mean_loss({**self.copies.at(outer, step), **inner}, task.support, task.key, step)
        if not self.proximal:
            return loss
        moved = axpy(-1.0, self.init(outer, task), inner)
        return loss + 0.5 * self.proximal * dot(moved, moved)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The mean loss on the query set."""
        given = {**self.copies.at(outer, self.steps_taken - 1), **inner}
        return self._mean_loss(given, task.query, task.key, _OUTER_DRAW)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The adapted network's outputs at ``x``."""
        return self.answers({**self.copies.at(outer, self.steps_taken - 1), **inner}, x)

    def answers(self, parameters: dict[str, Tensor], x: Tensor, key: Tensor | None = None) -> Tensor:
        """What is said of ``x`` with these parameters; dropout follows the key."""
        return call(self.network, parameters, x, key=key)

    def judge(self, prediction: Tensor, points: Points) -> Tensor:
        """The mean of the row losses over the real rows: no padding, nor what the criterion ignores."""
        return mean_of_rows(row_losses(self.loss, prediction, points.y), real_rows(self.loss, points.y, points.mask))

    def _adapted(self, names: Iterable[str]) -> list[str]:
        """Those of the names that match a pattern of ``adapt``."""
        if not (names := list(names)):
            raise InputError("network: it has no trainable parameter; unfreeze one with requires_grad_()")
        own = self.of_each_step
        beside = f"trainable parameter beside per_step={list(own)}" if own else "trainable parameter"
        return matching([name for name in names if name not in own], self.patterns, "adapt", beside)

    def _mean_loss(self, parameters: dict[str, Tensor], points: Points, key: Tensor, draw: int) -> Tensor:
        check_no_padding("network", self.network, points)
        drawing = fold(key, draw) if draws(self.network) else None
        return self.judge(self.answers(parameters, points.x, drawing), points)
