"""A whole outer step of hyperparameter learning by an implicit gradient, as in ``configs/bilevel_logistic.yaml``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Contender, Missing, Race, check_same, one_core, rounds, say, section
from metalit.compiling.compiled import Compiled
from metalit.data import SplitsDataModule
from metalit.data.rows import SklearnTable
from metalit.hypergradients import Implicit
from metalit.hypergradients.base import over_tasks
from metalit.inner import SGD
from metalit.linsolve import CG
from metalit.problem import Splits
from metalit.problems import Logistic
from metalit.tree import tree_map

FEATURES, LOG_PENALTY, STEPS, LR, ITERATIONS, OUTER_LR, TOLERANCE = 30, -4.0, 50, 0.2, 31, 0.05, 1e-10
CHECKED = (1, 20)  # after so many outer steps everybody is compared
PRECISION = 1e-9
Pair = tuple[Tensor, ...]


class Learner(ABC):
    """Takes outer steps by Adam; the inner variable goes on where the last step left it."""

    name: str

    def __init__(self, task: Splits) -> None:
        self.task = task  # with a leading dimension of one task
        self.log_penalty = torch.full((FEATURES,), LOG_PENALTY, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.log_penalty], lr=OUTER_LR, fused=True)

    @abstractmethod
    def gradient(self) -> Tensor:
        """Move the inner variable, and return the hypergradient."""

    @abstractmethod
    def weights(self) -> Tensor:
        """The inner variable, flat."""

    def advance(self, steps: int) -> None:
        """Take outer steps."""
        for _ in range(steps):
            self.log_penalty.grad = self.gradient()
            self.adam.step()

    def state(self) -> tuple[Tensor, Tensor]:
        """What is compared: the last hypergradient and the inner variable."""
        return self.log_penalty.grad, self.weights()


class Loop(Learner):
    """Every derivative by a call of ``torch.autograd.grad``."""

    name = "torch, a loop of `autograd.grad`"

    def __init__(self, task: Splits) -> None:
        super().__init__(task)
        (self.x,), (self.y,) = task.train.x, task.train.y
        (self.val_x,), (self.val_y,) = task.val.x, task.val.y
        self.inner: Pair = (torch.zeros(FEATURES, dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    def inner_loss(self, inner: Pair) -> Tensor:
        """The training loss and the penalty."""
        return _loss(inner, self.x, self.y) + 0.5 * (self.log_penalty.exp() * inner[0].square()).sum()

    def gradient(self) -> Tensor:
        inner = tuple(value.requires_grad_() for value in self.inner)
        for _ in range(STEPS):
            slopes = torch.autograd.grad(self.inner_loss(inner), inner)
            inner = tuple(
                (value.detach() - LR * slope).requires_grad_() for value, slope in zip(inner, slopes, strict=True)
            )
        slopes = torch.autograd.grad(self.inner_loss(inner), inner, create_graph=True)
        right = torch.autograd.grad(_loss(inner, self.val_x, self.val_y), inner)
        solution = _solve(lambda v: torch.autograd.grad(slopes, inner, v, retain_graph=True), right)
        (product,) = torch.autograd.grad(slopes, self.log_penalty, solution)
        self.inner = tuple(value.detach() for value in inner)
        return -product

    def weights(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.inner])


class Eager(Learner):
    """metalit's step as a function that is not compiled."""

    name = "metalit, step not compiled"

    def __init__(self, task: Splits) -> None:
        super().__init__(task)
        self.problem = Logistic(FEATURES, LOG_PENALTY).double()
        hypergradient = Implicit(steps=STEPS, solver=CG(ITERATIONS, TOLERANCE))
        self.step: Callable[..., Any] = partial(over_tasks, hypergradient, self.problem, SGD(LR))
        init = self.problem.init({"log_penalty": self.log_penalty.detach()}, task)
        self.inner = tree_map(lambda value: value.unsqueeze(0), init)

    def gradient(self) -> Tensor:
        outer = {"problem": {"log_penalty": self.log_penalty.detach()}, "optimizer": {}}
        estimate = self.step(outer, self.task, self.inner)
        self.inner = estimate.inner
        return estimate.gradient["problem"]["log_penalty"]

    def weights(self) -> Tensor:
        return torch.cat([self.inner["weight"].reshape(-1), self.inner["bias"].reshape(-1)])


class CompiledStep(Eager):
    """metalit's step as ``fit`` compiles it, without anything of ``fit``."""

    name = "metalit, compiled step"

    def __init__(self, task: Splits) -> None:
        super().__init__(task)
        self.step = Compiled(self.step, self.problem, tell=say)


def _loss(inner: Pair, x: Tensor, y: Tensor) -> Tensor:
    output = x @ inner[0] + inner[1]
    return (F.softplus(output) - y * output).mean()


def _solve(product: Callable[[Pair], Pair], right: Pair) -> Pair:
    """Conjugate gradients, that stop where there is nothing left to do."""

    def dot(one: Pair, other: Pair) -> Tensor:
        return sum((a * b).sum() for a, b in zip(one, other, strict=True))

    def add(scale: Tensor, one: Pair, other: Pair) -> Pair:
        return tuple(scale * a + b for a, b in zip(one, other, strict=True))

    solution: Pair = tuple(torch.zeros_like(value) for value in right)
    residual = direction = right
    square = dot(residual, residual)
    enough = TOLERANCE**2 * square
    for _ in range(ITERATIONS):
        if square <= enough:
            break
        image = product(direction)
        step = square / dot(direction, image)
        solution, residual = add(step, direction, solution), add(-step, image, residual)
        before, square = square, dot(residual, residual)
        direction = add(square / before, direction, residual)
    return solution


def _task() -> Splits:
    data = SplitsDataModule(SklearnTable("breast_cancer"))
    data.prepare()
    return data.draw("train", torch.arange(1))


def contenders(task: Splits, kinds: Sequence[type[Learner]]) -> tuple[list[Contender], list[Missing]]:
    """Those that were seen to agree with the first one."""
    expected, found, missing = [], [], []
    for kind in kinds:
        learner, taken, states = kind(task), 0, []
        for steps in CHECKED:
            learner.advance(steps - taken)
            taken = steps
            states += [value.clone() for value in learner.state()]
        expected = expected or states
        for mine, right in zip(states, expected, strict=True):
            check_same(kind.name, mine, right, PRECISION)
        if isinstance(learner, CompiledStep) and learner.step.failed:
            missing.append(Missing(kind.name, "it cannot be compiled here"))
        else:
            found.append(Contender(kind.name, learner.advance))
    return found, missing


def run(quick: bool) -> str:
    """Measure."""
    one_core()
    ready, missing = contenders(_task(), (Loop, Eager, CompiledStep))
    race = Race(ready, seconds=0.1 if quick else 0.5).run(rounds(quick))
    heads = {"÷ loop": Loop.name, "÷ not compiled": Eager.name}
    about = (
        f"One outer step of `bilevel_logistic`: {STEPS} warm-started inner steps on scikit-learn's breast_cancer, the "
        f"implicit gradient by {ITERATIONS} steps of conjugate gradients, and Adam, in double precision on one core. "
        "Hypergradients and weights agree after 1 and after 20 outer steps, to 1e-9 of the largest; the loop stops "
        "conjugate gradients early where it can."
    )
    table = race.table([contender.name for contender in ready], heads, missing, "outer step")
    return section("bilevel: an outer step by an implicit gradient", about, table)
