"""The bilevel learner: hyperparameters, weights of examples, factors: any outer variable of any problem."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from metalit.adapt import Iterate, Outer, adapt, inner_of
from metalit.data.base import Split
from metalit.data.draws import KeysDataModule
from metalit.data.stream import EvalStream, TrainStream
from metalit.errors import InputError
from metalit.evaluation.report import Report
from metalit.evaluation.score_report import results_frames, score_report
from metalit.evaluation.scores import LEARNED, Scores, as_numbers, means
from metalit.hypergradients.base import Hypergradient
from metalit.inner.base import InnerOptimizer
from metalit.modules.two_level import TwoLevelLearner
from metalit.modules.warm_start import WarmStart, count_of, like, stacked, task_at
from metalit.private_torch import tree_leaves
from metalit.problem import Problem, Splits
from metalit.problems.rows import RowsProblem
from metalit.training.ranks import items_of_ranks
from metalit.tree import Tree, leaves, tree_map


class BilevelLearner(TwoLevelLearner):
    """Learns the outer variable of any problem: φ ← outer optimiser(φ, hypergradient), θ ← inner optimiser(θ, φ).

    What a DataModule gives in each outer step are the tasks, with a leading dimension of tasks. Without one, a task is
    a key (:mod:`metalit.keys`) of (seed, outer step): all that a problem needs that holds its own data.

    Validation and test judge the inner variable by the problem's ``scores``, beside its ``baselines``.

    Attributes:
        scores: of the last evaluation, by row (the learned outer variable, then baselines) and name.

    Args:
        problem: what is learned.
        inner_optimizer: how the inner variable moves.
        hypergradient: how the outer variable learns from it, and in how many inner steps.
        warm_start: start each outer step where the last one left the inner variable and the inner optimiser's state,
            instead of at ``init``; then they are part of the checkpoint.
        eval_steps: judge the inner variable after so many steps from ``init``, and the baselines likewise. If not
            given, it is judged after as many steps as training takes; if it is warm-started, as training left it, and
            without baselines, which would have seen fewer steps.
        draws: without a DataModule, the number of keys in each outer step, over all ranks.
        seed: without a DataModule, the seed of the keys.
        compile, fused_steps, tasks_per_chunk, compile_seconds: see
            :class:`~metalit.modules.two_level.TwoLevelLearner`.
        optimizer, scheduler, lr_by_name, clip_norm: see :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: numbers out of range; when training starts: what
            :meth:`~metalit.modules.two_level.TwoLevelLearner.check_first_task` raises, or ranks that do not divide
            ``draws``.
    """

    takes = "what its problem is posed on, or no data at all: then keys"

    def __init__(
        self,
        problem: Problem,
        inner_optimizer: InnerOptimizer,
        hypergradient: Hypergradient,
        warm_start: bool = False,
        eval_steps: int | None = None,
        draws: int = 1,
        seed: int = 0,
        compile: bool = False,
        fused_steps: int = 1,
        tasks_per_chunk: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        lr_by_name: dict[str, float] | None = None,
        clip_norm: float | None = None,
        compile_seconds: float = 300.0,
    ) -> None:
        super().__init__(
            problem,
            inner_optimizer,
            hypergradient,
            compile,
            fused_steps,
            tasks_per_chunk,
            optimizer=optimizer,
            scheduler=scheduler,
            lr_by_name=lr_by_name,
            clip_norm=clip_norm,
            compile_seconds=compile_seconds,
        )
        if eval_steps is not None and eval_steps < 0:
            raise InputError(f"model.eval_steps={eval_steps} must not be negative")
        if draws < 1:
            raise InputError(f"model.draws={draws} must be at least 1")
        self.save_given()
        self.warm_start = warm_start
        self.eval_steps = eval_steps
        self.draws = draws
        self.seed = seed
        self._warm = WarmStart(inner_optimizer)
        self.scores: Scores = {}
        self._collected: list[Scores] = []

    # ---- data, where no DataModule gives any

    def train_dataloader(self) -> TrainStream:
        """Keys, a pure function of (seed, outer step)."""
        keys = self._keys()
        keys.setup("fit")
        return keys.train_dataloader()

    def val_dataloader(self) -> EvalStream | Sequence[Any]:
        """One key."""
        return self._keys().val_dataloader()

    def test_dataloader(self) -> EvalStream | Sequence[Any]:
        """One key."""
        return self._keys().test_dataloader()

    def _keys(self) -> KeysDataModule:
        keys = KeysDataModule(self.draws, self.seed)
        keys.trainer = self.trainer
        return keys

    # ---- training

    @property
    def _advice(self) -> str:
        """Starting where the last step ended helps too."""
        return super()._advice + ("" if self.warm_start else ", or set model.warm_start")

    def training_step(self, tasks: Any, batch_idx: int) -> None:
        """Take one outer step, or as many as are fused."""
        last = self.steps_on(self.cast(tasks))
        if isinstance(last, Iterate):
            self._warm.keep(last)

    @property
    def inner(self) -> Tree | None:
        """Where the next outer step's inner variables start, with a leading dimension of tasks, if warm-started.

        They are those of all ranks, which must ask together.
        """
        return inner_of(self._warm.of_all(self.trainer))

    def start(self, tasks: Any) -> Iterate | None:
        """With a warm start, where the last step left this rank's tasks."""
        if not self.warm_start:
            return None
        return self._warm.of_rank(self.trainer, count_of(tasks), lambda: self._initial(tasks))

    def _initial(self, tasks: Any) -> Tree:
        own = self.constants()["problem"]
        if not tree_leaves(self.problem.init(own, task_at(tasks, 0))):
            raise InputError(
                f"model.warm_start: {type(self.problem).__name__} has no inner variable to start from; leave it out"
            )
        return stacked([self.problem.init(own, task_at(tasks, index)) for index in range(count_of(tasks))])

    # ---- evaluation

    def start_evaluation(self) -> None:
        """Collect anew."""
        self._collected = []

    def evaluate(self, batch: Any, batch_idx: int, split: Split) -> None:
        """Judge; beside baselines only where it is not one of the many validations of a fit."""
        self._collected += self.judge(batch, split, baselines=self.trainer.state.fn != "fit")

    def evaluated(self, split: Split) -> dict[str, float]:
        """The scores of the learned outer variable."""
        self.scores = means(items_of_ranks(self.trainer, self._collected))
        return self.scores[LEARNED]

    def report(self, split: Split) -> Report:
        """The scores, beside those of baselines."""
        return score_report(self.scores, split)

    def final_report(self) -> Report | None:
        """The scores of the outer variable as training left it, beside those of baselines, and what it is."""
        trainer = self.trainer
        if not sum(trainer.num_val_batches):  # a loader may not know its length
            return None
        with self.evaluating(), torch.no_grad():
            if trainer.state.fn == "fit":  # whose validations leave baselines out
                self.stepper.check_finite()
                self.start_evaluation()
                for tasks in self.val_batches():
                    self._collected += self.judge(tasks, "val", baselines=True)
                self.evaluated("val")
            results = self.results(next(self.val_batches()))
        frames = results_frames(results, getattr(trainer.datamodule, "columns", None))
        return score_report(self.scores, "val", f" after {self.outer_step} outer steps", frames)

    def histograms(self) -> dict[str, Tensor]:
        """The outer variable."""
        return {f"outer/{name}": value for name, value in leaves(self.constants())}

    def judge(self, tasks: Any, split: Split, baselines: bool) -> list[Scores]:
        """Score the learned outer variable on each task of a batch, and the problem's baselines if they are asked for.

        Raises:
            InputError: ``scores`` without a ``loss``; a problem that fails.
        """
        tasks = self.cast(tasks)
        held = self.inner if self.warm_start else None
        with self.told(tasks):
            self.check_first_task(tasks, self._initial(tasks) if self.warm_start and held is None else held)
            return [self._judged(task_at(tasks, index), index, split, baselines) for index in range(count_of(tasks))]

    def _judged(self, task: Any, index: int, split: Split, baselines: bool) -> Scores:
        outer = self.constants()
        table = {LEARNED: self._scored(self.solve(task, index), outer, task, split)}
        alike = self.eval_steps is not None or not self.warm_start
        others = self.problem.baselines(outer["problem"], task) if baselines and alike else {}
        for name, (own, its_task) in others.items():
            other = {**outer, "problem": {**outer["problem"], **own}}
            table[name] = self._scored(self._from_init(other, its_task), other, its_task, split)
        return table

    def solve(self, task: Any, index: int = 0) -> Tree:
        """The inner variable that is judged: see ``eval_steps``.

        Args:
            task: one task, without a dimension of tasks.
            index: which one it is of a batch, where training is warm-started.

        Raises:
            InputError: warm-started training had fewer tasks.
        """
        outer, held = self.constants(), self.inner
        if self.eval_steps is not None or not self.warm_start or held is None:
            return self._from_init(outer, task)
        if index >= count_of(held):
            raise InputError(
                f"model.warm_start: training left the inner variables of {count_of(held)} task(s), and a batch of more "
                "is judged; set model.eval_steps, to judge each from its init"
            )
        return like(tree_map(lambda value: value[index], held), self.problem.init(outer["problem"], task))

    def _from_init(self, outer: Outer, task: Any) -> Tree:
        return adapt(self.scaled_problem(self.stepper.scale), self.inner_optimizer, outer, task, self._judged_steps)

    @property
    def _judged_steps(self) -> int:
        return self.hypergradient.steps if self.eval_steps is None else self.eval_steps

    def _scored(self, inner: Tree, outer: Outer, task: Any, split: Split) -> dict[str, float]:
        scores = self.problem.after(self._judged_steps).scores(inner, outer["problem"], task, split)
        return as_numbers(scores, f"{type(self.problem).__name__}.scores")

    def check_request(self) -> None:
        """Check what the Trainer was told.

        Raises:
            InputError: to predict.
        """
        if self.trainer.state.fn == "predict":
            name = type(self).__name__
            raise InputError(f"predict adapts a MetaLearner to points, and a {name} does not adapt; use test")
        super().check_request()

    def results(self, tasks: Any) -> Mapping[str, Mapping[str, Tensor]]:
        """The problem's ``results`` on the first task of a batch."""
        task = task_at(self.cast(tasks), 0)
        return self.problem.results(self.solve(task), self.constants()["problem"], task)

    def sample_gradient_norms(self, tasks: Splits) -> tuple[Tensor, Tensor]:
        """The norm of each training row's own loss gradient, ‖∇θ ℓᵢ(θ)‖, and which rows are corrupted, both ``[rows]``.

        Raises:
            InputError: the problem does not fit rows.
        """
        if not isinstance(self.problem, RowsProblem):
            raise InputError(
                f"SampleGradientNorms: {type(self.problem).__name__} does not fit rows; leave the callback out"
            )
        task = task_at(self.cast(tasks), 0)
        return self.problem.sample_gradient_norms(self.solve(task), task.train), task.corrupted

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the inner variables of all ranks, if they are warm-started, and the leaves of the states."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= self._warm.kept(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the inner variables up again.

        Raises:
            InputError: the checkpoint is of another kind of learner, or network.
        """
        super().on_load_checkpoint(checkpoint)
        if "inner" not in checkpoint:
            raise InputError("ckpt_path: the checkpoint is of another kind of learner: it holds no inner variable")
        self._warm.load(checkpoint)
