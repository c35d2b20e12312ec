"""What the learners with an inner variable share: the outer variable of problem and inner optimiser, and its step."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from metalit.adapt import Iterate, Outer, Start
from metalit.autodiff.blame import as_input_error
from metalit.checks.trainer import check_counts
from metalit.data.stream import Fused
from metalit.errors import InputError
from metalit.hypergradients.base import Hypergradient, over_tasks
from metalit.inner.base import InnerOptimizer
from metalit.modules.base import OuterLearner
from metalit.modules.diagnosis import Diagnosis
from metalit.modules.first_task import check_first_task, check_still_fits, damping_of, few_of, first_of, if_singular
from metalit.modules.learned import alike, brought, updated
from metalit.notices import say
from metalit.problem import Problem
from metalit.scaled import Scaled
from metalit.training.batches import Batches, StepResult
from metalit.training.context import StepContext
from metalit.training.counters import FusedCounters
from metalit.training.outer_gradient import OuterGradient
from metalit.training.outer_loop import OuterLoop, items_of_step
from metalit.training.ranks import compile_patience
from metalit.tree import Tree, tree_map
from metalit.unrounded import ParameterTree


class TwoLevelLearner(OuterLearner):
    """Descends the mean hypergradient over a batch of tasks: φ ← outer optimiser(φ, 1/T Σ d outer_loss(θ(φ)) / dφ).

    Where a log is due it tells of the inner level too: ``inner_grad_norm``, ‖∇θ inner_loss‖ at the inner variable that
    was found, and ``inner_grad_ratio``, its share of what it is at ``init``, or at 0 where ``init`` adapts: is the
    inner problem solved? Beside them the norms of both variables, what the estimator noticed, and what the problem
    watches.

    Args:
        problem, inner_optimizer, hypergradient: what is learned, how the inner variable moves, and how the outer one
            learns from it.
        compile: compile the outer step (:class:`~metalit.compiling.compiled.Compiled`). It starts later and runs up to
            thirty times as fast; what the compiler takes grows with the number of inner steps.
        fused_steps: how many outer steps are taken on each call of the Trainer, whose own work small networks would
            otherwise wait for. Each is an outer step like any other; logs, validations and saves come after the last,
            a ``val_check_interval`` that is a share of the steps is rounded down to whole calls, one at least, and a
            run is resumed with the number that it began with.
            Compiled on one CPU rank, the step of Adam, or of SGD with momentum, is part of the program
            (:class:`~metalit.training.fused_loop.FusedLoop`).
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
        problem.trained_for(hypergradient.steps)
        if any(begin % fused_steps for begin in hypergradient.begins):
            raise InputError(
                f"model.fused_steps={fused_steps} steps are taken as one, and from outer step "
                f"{hypergradient.begins[-1]} on hypergradient {type(hypergradient).__name__} has another form: let "
                "that number be a multiple of fused_steps"
            )
        self.problem = problem
        self.inner_optimizer = inner_optimizer
        self.hypergradient = hypergradient
        self.fused_steps = fused_steps
        self.compile_seconds = compile_seconds
        self._batches = Batches(
            self._step_result, problem, compile, tasks_per_chunk, "the outer step", say, seconds=compile_seconds
        )
        self._diagnosis = Diagnosis(self, self._batches)
        given = problem, say, compile_seconds, hypergradient.begun
        self._loop = OuterLoop(self.stepper, self._batches, self._diagnosis, *given)
        self.learned = ParameterTree(self._brought(), self._brought(exact=True))
        self._first_is_checked = False
        self._last: tuple[Any, int, OuterGradient] | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether outer steps are compiled, as far as it is known: not if it failed, or was not asked for."""
        return self._batches.is_compiled

    @property
    def tasks_per_chunk(self) -> int | None:
        """How many tasks at most are evaluated at once on each rank: fewer than asked for where memory was short."""
        return self._batches.per_chunk

    def outer(self) -> Outer:
        """``{"problem": …, "optimizer": …}``"""
        return {"problem": self.problem.outer(), "optimizer": self.learned.tree}

    def _brought(self, exact: bool = False) -> Tree:
        return brought(self.problem, self.inner_optimizer, self.hypergradient.steps, exact)

    def _bring(self) -> None:
        """Learn the inner optimiser's parameters of what adapts now, which may have been frozen when it was made."""
        present = self._brought()
        if not alike(present, self.learned.tree):
            self.learned = ParameterTree(updated(present, self.learned.tree))

    def constants(self) -> Outer:
        """The outer variable, detached: autograd would else record every operation again, outside ``torch.func``."""
        return {level: tree_map(Tensor.detach, branch) for level, branch in self.outer().items()}

    # ---- what is checked before the first step

    def on_fit_start(self) -> None:
        """Check everything anew."""
        super().on_fit_start()
        self._first_is_checked = False
        self._diagnosis.begin()
        self._last = None

    def check_first_task(self, tasks: Any, start: Start = None) -> None:
        """Check problem, inner optimiser and hypergradient on the first tasks that come, before anything is trained.

        Raises:
            InputError: what :meth:`~metalit.problem.Problem.check` and
                :meth:`~metalit.hypergradients.base.Hypergradient.check` raise; a loss or a network that fails.
        """
        if self._first_is_checked:
            return
        self._first_is_checked = True
        with self.told(tasks):
            self.problem.check(first_of(tasks))
            if self.trainer.state.fn == "fit":
                context = self._context()
                check_first_task(self.hypergradient, self.problem, self.inner_optimizer, context, tasks, start)
                if self.problem.vectorised is False and self._batches.is_compiled:
                    self._batches.stay_uncompiled()
                    say("the outer step is not compiled, since its tasks are evaluated one after the other")
                # a warm start is not solved yet, and need not be
                if start is None and self._diagnosis.warnings.are_wanted_early(self.trainer.log_every_n_steps):
                    self._warn_of(few_of(tasks), None)

    def if_not_finite(self) -> str:
        """What to try, where a matrix is inverted too."""
        rates = super().if_not_finite()
        damping = damping_of(self.hypergradient, self.inner_optimizer)
        return f"{if_singular(damping)}. Otherwise {rates[0].lower()}{rates[1:]}" if damping else rates

    def told(self, tasks: Any) -> AbstractContextManager[None]:
        """Tell in one line what is wrong with the user's code, which is tried on tasks."""
        return as_input_error("model.problem", self.problem)

    def start(self, tasks: Any) -> Iterate | None:
        """Where the inner loops of an outer step start, with a leading dimension of tasks; None for ``init``."""
        return None

    # ---- outer steps

    def check_batch(self, batch: Any) -> None:
        """Check the number of steps and the first task.

        Raises:
            InputError: tasks that are not fused in ``fused_steps`` steps; what :meth:`check_first_task` raises.
        """
        self._checked(*(batch if isinstance(batch, Fused) else (batch, 1)))

    def _checked(self, tasks: Any, steps: int) -> Iterate | None:
        """Where the first of the steps starts, for tasks that are checked."""
        if steps != self.fused_steps:
            raise InputError(
                f"model.fused_steps={self.fused_steps}: the data gives the tasks of {steps} step(s) at once; leave it "
                "out with a DataLoader of your own, or yield metalit.data.Fused"
            )
        first = items_of_step(tasks, steps, 0)
        changed = self.follow(self.outer())
        start = self.start(first)
        if changed:
            self._first_is_checked = False
            outer = self.constants()
            parts = self.hypergradient, self.problem, self.inner_optimizer
            check_still_fits(*parts, self.learned, outer, first_of(first), start)
        self.check_first_task(first, start)
        return start

    def steps_on(self, batch: Any) -> Tree | Iterate:
        """Take the outer steps of a batch: one on its tasks, or as many as are :class:`~metalit.data.stream.Fused`.

        The first one begins at :meth:`start`, each further one there too, or, if that is not None, where the one before
        it ended.

        Returns:
            The inner variables that the last step found; if they did not start at ``init``, with their states.

        Raises:
            InputError: tasks that are not fused in ``fused_steps`` steps; what :meth:`check_first_task` raises.
        """
        tasks, steps = batch if isinstance(batch, Fused) else (batch, 1)
        start = self._checked(tasks, steps)
        found, logged = self._loop.take(self.constants(), tasks, steps, start)
        self._warn(logged, tasks, steps, found)
        return found.per_item

    def scaled_problem(self, scale: Tensor | None) -> Problem:
        """The problem as it is differentiated."""
        return self.problem if scale is None else Scaled(self.problem, scale)

    def _context(self) -> StepContext:
        """What the next outer step is taken at."""
        form = self.hypergradient.begun(self.outer_step)
        return self.stepper.context(self.constants(), self.outer_step)._replace(form=form)

    def _step_result(self, context: StepContext, items: tuple[Any, Start]) -> StepResult:
        """The mean hypergradient over tasks and their starts: what is compiled."""
        (outer, scale, progress, form), (tasks, start) = context, items
        problem = self.scaled_problem(scale)
        found = over_tasks(self.hypergradient.at(form), problem, self.inner_optimizer, outer, tasks, start, progress)
        loss = found.loss if scale is None else found.loss / scale
        last = Iterate(found.inner, found.state) if isinstance(start, Iterate) else found.inner
        return StepResult(OuterGradient.of(loss, found.gradient), found.metrics, last)

    # ---- warnings: where a log is due, at the first step and at the end

    @property
    def _advice(self) -> str:
        return "take more inner steps"

    def _warn(self, logged: dict[str, float], batch: Any, steps: int, found: StepResult) -> None:
        """Warn of the last of the outer steps of a batch, if it was logged."""
        self._last = None if logged else (batch, steps, found.gradient)
        if logged:
            tasks, outer = items_of_step(batch, steps, steps - 1), self.constants()
            self._diagnosis.warn(self.global_step, logged, outer, tasks, found.per_item, self._advice)

    def on_train_end(self) -> None:
        """Warn of the last outer step, of which no log was due."""
        super().on_train_end()
        if self._last is None:
            return
        (batch, steps, gradient), self._last = self._last, None
        if self._diagnosis.warnings.has_own or not bool(gradient.gradient.any()):
            tasks = items_of_step(batch, steps, steps - 1)
            start = self.start(tasks)
            with self.trainer.precision_plugin.train_step_context():
                self._warn_of(few_of(tasks), few_of(start))

    def _warn_of(self, tasks: Any, start: Start) -> None:
        """Warn of what an outer step on a few tasks would find."""
        context = self._context()
        found = self._step_result(context, (tasks, start))
        if bool(found.gradient.not_finite):
            return
        metrics = self._diagnosis.as_logged(context, found, tasks, start)
        self._diagnosis.warn(self.global_step, metrics, context.outer, tasks, found.per_item, self._advice)

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
        """Let the Trainer count outer steps, and the compiler take as long as ranks wait for each other."""
        super().setup(stage)
        FusedCounters.attach(self.trainer, self.fused_steps)
        patience = compile_patience(self.trainer, self.compile_seconds)
        for batches in (self._batches, self._diagnosis.batches):
            batches.wait_at_most(patience)
