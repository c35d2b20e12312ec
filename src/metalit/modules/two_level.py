"""What the learners with an inner variable share: the outer variable of problem and inner optimiser, and its step."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.func import grad
from torch.utils._pytree import tree_map as pytree_map

from metalit.adapt import Outer, outer_variable
from metalit.errors import InputError
from metalit.hypergradients.base import Estimate, Hypergradient, for_each_task, over_tasks
from metalit.inner.base import InnerOptimizer
from metalit.modules.base import OuterLearner
from metalit.problem import Problem
from metalit.tree import Tree, leaves, norm, tree_map


class TwoLevelLearner(OuterLearner):
    """Descends the mean hypergradient over a batch of tasks: φ ← outer optimiser(φ, 1/T Σ d outer_loss(θ(φ)) / dφ).

    Where a log is due it tells of the inner level too: ``inner_grad_norm``, ‖∇θ inner_loss‖ at the inner variable that
    was found, and ``inner_grad_ratio``, its share of what it is at ``init``: is the inner problem solved? Beside them
    the norms of both variables, what the estimator noticed, and what the problem watches.

    Args:
        problem, inner_optimizer, hypergradient: what is learned, how the inner variable moves, and how the outer one
            learns from it.
        options: those of :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: an argument of another kind.
    """

    def __init__(
        self, problem: Problem, inner_optimizer: InnerOptimizer, hypergradient: Hypergradient, **options: Any
    ) -> None:
        super().__init__(**options)
        for name, value, kind in (
            ("problem", problem, Problem),
            ("inner_optimizer", inner_optimizer, InnerOptimizer),
            ("hypergradient", hypergradient, Hypergradient),
        ):
            if not isinstance(value, kind):
                raise InputError(f"{name}={value!r} must be an object of a class that derives from {kind.__name__}")
        self.problem = problem
        self.inner_optimizer = inner_optimizer
        self.hypergradient = hypergradient
        self.learned = ParameterTree(_brought(problem, inner_optimizer))
        self._tried = False
        self._told: set[str] = set()

    def outer(self) -> Outer:
        """``{"problem": …, "optimizer": …}``"""
        return {"problem": self.problem.outer(), "optimizer": self.learned.tree}

    def constants(self) -> Outer:
        """The outer variable, detached: autograd would else record every operation again, outside ``torch.func``."""
        return {level: tree_map(Tensor.detach, branch) for level, branch in self.outer().items()}

    def on_fit_start(self) -> None:
        """Try everything out anew."""
        super().on_fit_start()
        self._tried = False
        self._told = set()

    def try_out(self, tasks: Any, start: Tree | None = None) -> None:
        """Check problem, inner optimiser and hypergradient on the first task that comes, before anything is trained.

        Raises:
            InputError: what :meth:`~metalit.problem.Problem.check` and
                :meth:`~metalit.hypergradients.base.Hypergradient.check` raise.
        """
        if self._tried:
            return
        self._tried = True
        task, first = (
            pytree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, t) for t in (tasks, start)
        )
        self.problem.check(task)
        if self.trainer.state.fn == "fit":
            self.hypergradient.check(self.problem, self.inner_optimizer, self.constants(), task, first)

    def step_on(self, tasks: Any, start: Tree | None = None) -> Tree:
        """Take one outer step on a batch of tasks, and return the inner variables that it found."""
        outer = self.constants()
        self.try_out(tasks, start)
        estimate = over_tasks(self.hypergradient, self.problem, self.inner_optimizer, outer, tasks, start)
        diagnose = partial(self.diagnose, estimate, outer, tasks, start)
        logged = self.step_outer(estimate.loss, estimate.gradient, diagnose)
        if logged:
            complaints = self.hypergradient.complaints(logged)
            if logged["grad_norm"] == 0:
                complaints["zero"] = (
                    "the outer gradient is exactly 0: where the inner loop starts, the inner gradient does not depend "
                    "on the outer variable (zero weights under a penalty?); take more inner steps, or set "
                    "model.warm_start"
                )
            for kind, complaint in complaints.items():
                if kind not in self._told:
                    self._told.add(kind)
                    rank_zero_warn(f"outer step {self.global_step}: {complaint}")
        return estimate.inner

    def diagnose(self, estimate: Estimate, outer: Outer, tasks: Any, start: Tree | None) -> dict[str, Tensor]:
        """What is worth knowing of an outer step beside its loss, as means over the tasks."""
        own, slopes, step = outer["problem"], estimate.gradient["problem"], self.hypergradient.steps

        def one(_: Outer, given: tuple[Any, Tree, Tree | None]) -> dict[str, Tensor]:
            task, inner, begun = given
            init = self.problem.init(own, task)
            slope = grad(lambda inner: self.problem.inner_loss(inner, own, task, step))
            values = dict(self.problem.watch(init if begun is None else begun, inner, own, slopes, task))
            if next(leaves(inner), None) is not None:
                left, at_init = norm(slope(inner)), norm(slope(init))
                values |= {
                    "inner_norm": norm(inner),
                    "inner_grad_norm": left,
                    "inner_grad_ratio": left / torch.where(at_init > 0, at_init, 1.0),
                }
            return values

        means = {
            name: value.to(estimate.loss.dtype).mean()
            for name, value in for_each_task(one, outer, (tasks, estimate.inner, start)).items()
        }
        return {"outer_norm": norm(outer), **means, **estimate.metrics}


def _brought(problem: Problem, optimizer: InnerOptimizer) -> Tree:
    try:
        return outer_variable(problem, optimizer)["optimizer"]
    except (AttributeError, IndexError, TypeError) as error:
        raise InputError(
            f"inner_optimizer {type(optimizer).__name__} learns parameters of the inner variable's shape, for which "
            f"{type(problem).__name__}.init is called before there is any task, with None: {error}; use SGD inside, or "
            "let init do without its task"
        ) from error


class ParameterTree(nn.Module):
    """A tree whose leaves are parameters, saved by their dotted names."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self.tree = tree_map(lambda value: nn.Parameter(value.detach().clone()), tree)
        for name, parameter in leaves(self.tree):
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, parameter)
