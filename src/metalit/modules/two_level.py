"""What the learners with an inner variable share: the outer variable of problem and inner optimiser, and its step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from metalit.adapt import Outer
from metalit.autodiff.blame import told
from metalit.autodiff.draws import Elsewhere
from metalit.checks.trainer import check_counts
from metalit.data.stream import Fused
from metalit.errors import InputError
from metalit.hypergradients.base import Hypergradient, over_tasks
from metalit.hypergradients.tasks import for_each_task
from metalit.inner.base import InnerOptimizer
from metalit.modules.base import OuterLearner
from metalit.modules.complaints import Complaints
from metalit.modules.learned import ParameterTree, alike, brought, updated
from metalit.notices import say
from metalit.private_lightning import add_batches_that_stepped, after_step, before_step, trainer_of
from metalit.private_torch import pytree_map, tree_flatten, tree_unflatten
from metalit.problem import Problem
from metalit.scaled import Scaled
from metalit.training.batches import Estimates, Found, Leaves, packed
from metalit.training.fused_loop import AdamSteps, Taken
from metalit.training.ranks import compile_patience
from metalit.tree import Tree, leaves, norm, tree_map, unflatten


class TwoLevelLearner(OuterLearner):
    """Descends the mean hypergradient over a batch of tasks: φ ← outer optimiser(φ, 1/T Σ d outer_loss(θ(φ)) / dφ).

    Where a log is due it tells of the inner level too: ``inner_grad_norm``, ‖∇θ inner_loss‖ at the inner variable that
    was found, and ``inner_grad_ratio``, its share of what it is at ``init``: is the inner problem solved? Beside them
    the norms of both variables, what the estimator noticed, and what the problem watches.

    Args:
        problem, inner_optimizer, hypergradient: what is learned, how the inner variable moves, and how the outer one
            learns from it.
        compile: compile the outer step (:class:`~metalit.compiled.Compiled`). It starts later and runs up to thirty
            times as fast; what the compiler takes grows with the number of inner steps.
        fused_steps: how many outer steps are taken on each call of the Trainer, whose own work small networks would
            otherwise wait for. Each is an outer step like any other; logs, validations and saves come after the last,
            a ``val_check_interval`` that is a share of the steps is rounded down to whole calls, one at least, and a
            run is resumed with the number that it began with.
            Compiled on one CPU rank, Adam's step is part of the program
            (:class:`~metalit.training.fused_loop.AdamSteps`).
        tasks_per_chunk: how many tasks at most are evaluated at once on each rank, to save memory; all if not given.
        compile_seconds: how long compiling may take before it is given up, and the run goes on uncompiled; with several
            ranks at most half of the time after which they give each other up.
        options: those of :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: an argument of another kind, or a number that is not positive; when training starts: numbers of
            steps that are no multiples of ``fused_steps``.
    """

    def __init__(
        self,
        problem: Problem,
        inner_optimizer: InnerOptimizer,
        hypergradient: Hypergradient,
        compile: bool = False,
        fused_steps: int = 1,
        tasks_per_chunk: int | None = None,
        compile_seconds: float = 300.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value, kind in (
            ("problem", problem, Problem),
            ("inner_optimizer", inner_optimizer, InnerOptimizer),
            ("hypergradient", hypergradient, Hypergradient),
        ):
            if not isinstance(value, kind):
                raise InputError(f"{name}={value!r} must be an object of a class that derives from {kind.__name__}")
        for name, number in (("fused_steps", fused_steps), ("tasks_per_chunk", tasks_per_chunk)):
            if number is not None and number < 1:
                raise InputError(f"model.{name}={number} must be at least 1")
        if not compile_seconds > 0:
            raise InputError(
                f"model.compile_seconds={compile_seconds} must be a positive number of seconds, such as 300"
            )
        self.problem = problem
        self.inner_optimizer = inner_optimizer
        self.hypergradient = hypergradient
        self.fused_steps = fused_steps
        self.compile_seconds = compile_seconds
        self._estimates, self._diagnoses = (
            Estimates(fn, problem, compile, tasks_per_chunk, name, say, seconds=compile_seconds)
            for fn, name in ((self._estimate, "the outer step"), (self._diagnosis, "what is logged of it"))
        )
        self._row: AdamSteps | None = None
        self.learned = ParameterTree(brought(problem, inner_optimizer), brought(problem, inner_optimizer, exact=True))
        self._tried = False
        self.complaints = Complaints(hypergradient)
        self._unjudged: tuple[Any, Tensor] | None = None

    def outer(self) -> Outer:
        """``{"problem": …, "optimizer": …}``"""
        return {"problem": self.problem.outer(), "optimizer": self.learned.tree}

    def _bring(self) -> None:
        """Learn the inner optimiser's parameters of what adapts now, which may have been frozen when it was made."""
        present = brought(self.problem, self.inner_optimizer)
        if not alike(present, self.learned.tree):
            self.learned = ParameterTree(updated(present, self.learned.tree))

    def constants(self) -> Outer:
        """The outer variable, detached: autograd would else record every operation again, outside ``torch.func``."""
        return {level: tree_map(Tensor.detach, branch) for level, branch in self.outer().items()}

    def on_fit_start(self) -> None:
        """Try everything out anew."""
        super().on_fit_start()
        self._tried = False
        self.complaints.forget()
        self._unjudged = None

    def try_out(self, tasks: Any, start: Tree | None = None) -> None:
        """Check problem, inner optimiser and hypergradient on the first tasks that come, before anything is trained.

        Raises:
            InputError: what :meth:`~metalit.problem.Problem.check` and
                :meth:`~metalit.hypergradients.base.Hypergradient.check` raise; a loss or a network that fails.
        """
        if self._tried:
            return
        self._tried = True
        few, begun = _few(tasks), _few(start)
        task, first = (pytree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, t) for t in (few, begun))
        with self.told(tasks):
            self.problem.check(task)
            if self.trainer.state.fn == "fit":
                self.hypergradient.check(self.problem, self.inner_optimizer, self.constants(), task, first)
                self._try_a_step(few, begun)
                # a warm start is not solved yet, and need not be
                if begun is None and self.complaints.are_asked_early(self.trainer.log_every_n_steps):
                    self._judge(few, begun)

    def _check_still_fits(self, task: Any, start: Tree | None) -> None:
        """Check that what was made for the inner variable fits it still, when others are trainable than before."""
        if not alike(brought(self.problem, self.inner_optimizer), self.learned.tree):
            raise InputError(
                f"inner_optimizer {type(self.inner_optimizer).__name__} learns parameters for what adapts, which a "
                "callback froze or unfroze in mid-training; do so before training, or use SGD inside"
            )
        begin = self.problem.init(self.constants()["problem"], task)
        if start is not None and not alike(begin, _taken(start, 0)):
            raise InputError(
                "model.warm_start: a callback froze or unfroze in mid-training what adapts, and so there is nowhere to "
                "go on from; do so before training, or leave it out"
            )

    def _try_a_step(self, tasks: Any, start: Tree | None) -> None:
        """Find out what only a whole outer step shows: derivatives that are missing, tasks that go one by one alone."""
        try:
            outer = self.constants()
            with Elsewhere() as elsewhere:
                found = over_tasks(self.hypergradient, self.problem, self.inner_optimizer, outer, tasks, start)
        except torch.OutOfMemoryError:  # training makes its chunks as small as they must be
            return
        if elsewhere.drawn:
            raise InputError(
                "model.problem: it, or its network, draws from the generators of Python or numpy, so nothing could be "
                "resumed or repeated; draw by metalit.keys from the task's key"
            )
        if self._damped_by and not bool(torch.isfinite(packed(found.loss, found.gradient)).all()):
            raise InputError(f"model: the outer loss or its gradient is not finite from the start. {self._singular}")
        if self.problem.vectorised is False and self._estimates.compiled is not None:
            self._estimates.compiled = None
            say("the outer step is not compiled, since its tasks are evaluated one after the other")

    @property
    def _damped_by(self) -> str:
        return self.inner_optimizer.damped_by or self.hypergradient.damped_by

    @property
    def _singular(self) -> str:
        return (
            f"The Hessian of the inner loss, which is inverted, may be singular: raise {self._damped_by}, such as to "
            "1e-3, or regularise the inner loss"
        )

    @property
    def if_not_finite(self) -> str:
        """What to try, where a matrix is inverted too."""
        rates = super().if_not_finite
        return f"{self._singular}. Otherwise {rates[0].lower()}{rates[1:]}" if self._damped_by else rates

    def told(self, tasks: Any) -> AbstractContextManager[None]:
        """Tell in one line what is wrong with the user's code, which is tried on tasks."""
        return told("model.problem", self.problem)

    def start(self, tasks: Any) -> Tree | None:
        """Where the inner variables of an outer step start, with a leading dimension of tasks; None for ``init``."""
        return None

    def check_batch(self, batch: Any) -> None:
        """Check the number of steps and the first task.

        Raises:
            InputError: tasks that are not fused in ``fused_steps`` steps; what :meth:`try_out` raises.
        """
        self._checked(*(batch if isinstance(batch, Fused) else (batch, 1)))

    def _checked(self, tasks: Any, steps: int) -> Tree | None:
        """Where the first of the steps starts, for tasks that are checked."""
        if steps != self.fused_steps:
            raise InputError(
                f"model.fused_steps={self.fused_steps}: the data gives the tasks of {steps} step(s) at once; leave it "
                "out with a DataLoader of your own, or yield metalit.data.Fused"
            )
        first = _part(tasks, steps, 0)
        changed = self.follow(self.outer())
        start = self.start(first)
        if changed:
            self._tried = False
            self._check_still_fits(_taken(first, 0), start)
        self.try_out(first, start)
        return start

    def steps_on(self, batch: Any) -> Tree:
        """Take the outer steps of a batch: one on its tasks, or as many as are :class:`~metalit.data.stream.Fused`.

        The first one begins at :meth:`start`, each further one there too, or, if that is not None, where the one before
        it ended.

        Returns:
            The inner variables that the last step found.

        Raises:
            InputError: tasks that are not fused in ``fused_steps`` steps; what :meth:`try_out` raises.
        """
        tasks, steps = batch if isinstance(batch, Fused) else (batch, 1)
        start = self._checked(tasks, steps)
        # by which Lightning draws what callbacks log
        add_batches_that_stepped(self.trainer, steps - 1)
        taken = self._steps_in_a_row(tasks, steps, start) if self._fuses() else None
        return self._step_by_step(tasks, steps, start) if taken is None else taken

    def _step_by_step(self, tasks: Any, steps: int, start: Tree | None) -> Tree:
        values, form = tree_flatten(tasks)
        each = list(zip(*(_split(value, steps) for value in values), strict=True))
        outer = self.constants()
        estimate = self._estimates.bind((outer, self.scale), tree_unflatten(each[0], form), start)
        for values in each[:-1]:
            found, _ = self.step_outer(partial(estimate, [*values, *tree_flatten(start)[0]]))
            start = None if start is None else found.found().inner
        diagnose = partial(self.diagnose, outer=outer, tasks=tree_unflatten(each[-1], form), start=start)
        found, logged = self.step_outer(
            partial(estimate, [*each[-1], *tree_flatten(start)[0]]), lambda found: diagnose(found.found())
        )
        self._complain(logged, tree_unflatten(each[-1], form), found)
        return found.found().inner

    def _fuses(self) -> bool:
        """Whether Adam can be compiled with the outer step: nothing else has a say in what happens between two."""
        if self.fused_steps == 1 or self._estimates.compiled is None or self._step_is_heard:
            return False
        optimizer = self.optimizers(use_pl_optimizer=False)
        alone = self.trainer.world_size == 1 and self._estimates.tasks_per_chunk is None
        if not (alone and AdamSteps.suits(optimizer)):
            return False
        if self._row is None or self._row.optimizer is not optimizer or not self._row.is_of(self.outer()):
            self._row = AdamSteps(self._unscaled, self.problem, optimizer, self.outer(), say, self.compile_seconds)
        return True

    def _steps_in_a_row(self, tasks: Any, steps: int, start: Tree | None) -> Tree | None:
        taken = self._row(tasks, steps, start, self._schedule)
        if taken is None:
            self._estimates.compiled = None  # one reason, which was told, is enough
            return None
        self._finite.add(taken.not_finite)
        diagnose = partial(self.diagnose, taken.found, taken.outer, _part(tasks, steps, steps - 1), taken.start)
        logged = self._scalars(taken.found.packed, diagnose, steps)
        optimizer = self.optimizers()
        for _ in range(steps):
            before_step(optimizer)
            after_step(optimizer)
        self._schedule()
        self._report(logged)
        self._complain(logged, _part(tasks, steps, steps - 1), taken)
        return taken.found.inner

    def posed(self, scale: Tensor | None) -> Problem:
        """The problem as it is differentiated."""
        return self.problem if scale is None else Scaled(self.problem, scale)

    def _estimate(self, known: tuple[Outer, Tensor | None], tasks: Any, start: Tree | None) -> Found:
        outer, scale = known
        estimate = over_tasks(self.hypergradient, self.posed(scale), self.inner_optimizer, outer, tasks, start)
        loss = estimate.loss if scale is None else estimate.loss / scale
        return Found(packed(loss, estimate.gradient), estimate.inner, estimate.metrics)

    def _unscaled(self, outer: Outer, tasks: Any, start: Tree | None) -> Found:
        return self._estimate((outer, None), tasks, start)

    # ---- what an outer step tells against itself, where a log is due, at the first step and at the end

    @property
    def _advice(self) -> str:
        return "take more inner steps"

    def _complain(self, logged: dict[str, float], tasks: Any, made: Leaves | Taken) -> None:
        if not logged:
            self._unjudged = tasks, made.packed if isinstance(made, Leaves) else made.found.packed
            return
        self._unjudged = None
        inner = (made.found() if isinstance(made, Leaves) else made.found).inner
        self.complaints.tell(self.global_step, logged, partial(self._slope, tasks, inner), self._advice)

    def on_train_end(self) -> None:
        """Judge the last outer step, of which no log was due."""
        super().on_train_end()
        if self._unjudged is None:
            return
        (tasks, made), self._unjudged = self._unjudged, None
        if self.complaints.judges or not bool(made[1:-1].any()):
            start = self.start(tasks)
            with self.trainer.precision_plugin.train_step_context():
                self._judge(*(_few(tree) for tree in (tasks, start)))

    def _judge(self, tasks: Any, start: Tree | None) -> None:
        """Tell what an outer step on a few tasks would."""
        outer, scale = self.constants(), self.scale
        made = self._estimate((outer, scale), tasks, start)
        if bool(made.packed[-1]):
            return
        slopes = made.packed[1:-1] if scale is None else made.packed[1:-1] / scale
        known = outer, unflatten(slopes, outer)["problem"], scale
        values = self._diagnosis(known, tasks, (made.inner, start)).metrics | made.metrics
        values |= {"loss": made.packed[0], "grad_norm": slopes.norm()}
        metrics = {name: float(value) for name, value in values.items()}
        self.complaints.tell(self.global_step, metrics, partial(self._slope, tasks, made.inner), self._advice)

    def _slope(self, tasks: Any, inner: Tree) -> float:
        """The norm of ∂outer_loss/∂θ over tasks."""
        outer = self.constants()

        def one(outer: Outer, given: tuple[Any, Tree]) -> Tensor:
            task, inner = given
            return norm(grad(lambda inner: self.problem.outer_loss(inner, outer["problem"], task))(inner))

        return float(for_each_task(one, outer, (tasks, inner), self.problem).norm())

    def diagnose(self, made: Found, outer: Outer, tasks: Any, start: Tree | None) -> dict[str, Tensor]:
        """What is worth knowing of an outer step beside its loss, as means over the tasks."""
        if self._estimates.compiled is None or self._estimates.compiled.failed:
            self._diagnoses.compiled = None
        scale = self.scale
        gradient = unflatten(made.packed[1:-1] if scale is None else made.packed[1:-1] / scale, outer)
        means = self._diagnoses((outer, gradient["problem"], scale), tasks, (made.inner, start)).metrics
        return {"outer_norm": norm(outer), **means, **made.metrics}

    def _diagnosis(self, known: tuple[Outer, Tree, Tensor | None], tasks: Any, path: tuple[Tree, Tree | None]) -> Found:
        outer, slopes, scale = known
        own, step, posed = outer["problem"], self.hypergradient.steps, self.posed(scale)

        def one(_: Outer, given: tuple[Any, tuple[Tree, Tree | None]]) -> dict[str, Tensor]:
            task, (inner, begun) = given
            init = self.problem.init(own, task)
            slope = partial(posed.inner_grad, outer=own, task=task, step=step)
            values = dict(self.problem.watch(init if begun is None else begun, inner, own, slopes, task))
            if next(leaves(inner), None) is not None:
                left, at_init = norm(slope(inner)), norm(slope(init))
                values |= {
                    "inner_norm": norm(inner),
                    "inner_grad_norm": left,
                    "inner_grad_ratio": left / torch.where(at_init > 0, at_init, 1.0),
                }
            return values

        dtype = next(leaves(outer))[1].dtype
        values = for_each_task(one, outer, (tasks, path), self.problem)
        return Found(torch.empty(0), {}, {name: value.to(dtype).mean() for name, value in values.items()})

    # ---- several outer steps on one call of the Trainer

    def check_request(self) -> None:
        """Check what the Trainer was told, and learn the inner optimiser's parameters of what adapts now.

        Raises:
            InputError: it was told a number of steps that is no multiple of ``fused_steps``, or to limit its calls.
        """
        super().check_request()
        if self.trainer.state.fn == "fit" and self.fused_steps > 1:
            check_counts(self.trainer, self.fused_steps)
        self._bring()

    def setup(self, stage: str) -> None:
        """Let the Trainer, which counts its calls, validate after as many outer steps as it was told."""
        super().setup(stage)
        self._asked_interval = self.trainer.val_check_interval
        if stage == "fit" and self.fused_steps > 1 and isinstance(self._asked_interval, int):
            self.trainer.val_check_interval = self._asked_interval // self.fused_steps
        patience = compile_patience(self.trainer, self.compile_seconds)
        for estimates in (self._estimates, self._diagnoses):
            if estimates.compiled is not None:
                estimates.compiled.seconds = patience

    def on_train_start(self) -> None:
        """Tell the Trainer again what it was told: its loops have made up their minds."""
        super().on_train_start()
        self.trainer.val_check_interval = self._asked_interval

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of steps in each call: the Trainer's counts in the checkpoint are of calls."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fused_steps"] = self.fused_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that training goes on as it began.

        Raises:
            InputError: with another number of steps in each call, of which the Trainer has counted so and so many.
        """
        super().on_load_checkpoint(checkpoint)
        began = checkpoint.get("fused_steps", 1)
        if trainer_of(self) is not None and self.trainer.state.fn == "fit" and began != self.fused_steps:
            raise InputError(
                f"model.fused_steps={self.fused_steps}: the checkpoint is of a run with {began}, and what the Trainer "
                f"counts are such blocks; go on with model.fused_steps: {began}, or load the weights into a new run"
            )


def _taken(tasks: Any, where: int | slice) -> Any:
    return pytree_map(lambda leaf: leaf[where] if isinstance(leaf, Tensor) else leaf, tasks)


def _few(tree: Any) -> Any:
    return pytree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, tree)


def _part(tasks: Any, steps: int, number: int) -> Any:
    def part(value: Any) -> Any:
        size = len(value) // steps if isinstance(value, Tensor) else 0
        return value.narrow(0, size * number, size) if size else value

    return pytree_map(part, tasks)


def _split(value: Any, steps: int) -> Sequence[Any]:
    return value.split(len(value) // steps) if isinstance(value, Tensor) else [value] * steps
