"""The supervised learner: trains any network plainly, with noise on its weights, or for flat minima."""

from functools import cache
from math import isnan
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from metalit.adapt import Outer
from metalit.autodiff import Perturbation, gradient_at, per_sample_gradients, sees_other_rows
from metalit.autodiff.blame import told
from metalit.autodiff.perturbed import gradient_in_training
from metalit.autodiff.untouched import Kept
from metalit.autodiff.usable import check_network
from metalit.data.base import Split
from metalit.data.batches import BatchDataModule
from metalit.errors import InputError
from metalit.evaluation.report import Report
from metalit.evaluation.row_scores import RowScores
from metalit.evaluation.score_report import score_report
from metalit.evaluation.scores import LEARNED, Scores
from metalit.judging import real_rows, right_rows
from metalit.keys import folded
from metalit.losses import check_loss, row_losses
from metalit.modules.base import OuterLearner
from metalit.modules.buffers import adopt_buffers, buffer_names
from metalit.modules.first_rows import check_first_rows
from metalit.modules.rows_step import Perturbed, RowsContext, restore
from metalit.notices import say
from metalit.problem import Points
from metalit.training.batches import Batches, StepResult
from metalit.training.outer_gradient import OuterGradient
from metalit.tree import norm, unflatten

Batch = Points | tuple[Tensor, Tensor] | list[Tensor]


class SupervisedLearner(OuterLearner):
    """Descends ∇L(w + α) of the mean loss L over a batch, at perturbed weights: w ← optimiser(w, ∇L(w + α)).

    Without a perturbation α = 0, plain training. ``WeightNoise`` draws α anew in each step, from (seed, step) alone.
    ``SAM`` and ``AdaptiveSAM`` take α along the gradient at w, which costs a second pass; what a pass changes in the
    network, such as BatchNorm's running statistics, is that of the first, as after an ordinary forward pass. One step
    of either is one outer step. All that is random draws from (seed, step) too, and draws the same in both passes.
    Rows that a mask calls padding, or whose class the criterion ignores, count nowhere.

    Attributes:
        scores: of the last evaluation: ``loss``, and for classes ``accuracy``, where predictions say which
            (:func:`~metalit.judging.right_rows`).

    Args:
        network: any module that maps ``[rows, ...]`` to ``[rows, outputs]``; frozen parameters stay as they are.
        loss: any criterion with ``reduction="none"``; if not given, the squared error for real targets, and the
            cross-entropy for classes.
        perturbation: what is added to the weights before the gradient is taken.
        seed: the seed of noise and dropout.
        rows_per_chunk: how many rows at most are evaluated at once on each rank, to save memory; all if not given. The
            gradient is that of the whole batch all the same; only BatchNorm sees chunks, as it sees each rank's rows
            alone, and dropout from inputs whose first dimension is not that of the rows, and in MultiheadAttention.
        optimizer, scheduler, lr_by_name, clip_norm: see :class:`~metalit.modules.base.OuterLearner`.

    Raises:
        InputError: a network without a parameter, a loss with some; when training starts: none of them trainable, rows
            that the network cannot take, what :func:`~metalit.losses.row_losses` raises.
    """

    shown = ("loss", "accuracy")
    takes = "a BatchDataModule, or loaders of pairs of inputs and targets"

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module | None = None,
        perturbation: Perturbation | None = None,
        seed: int = 0,
        rows_per_chunk: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        lr_by_name: dict[str, float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, lr_by_name, clip_norm)
        check_network("model.network", network)
        check_loss(loss)
        if rows_per_chunk is not None and rows_per_chunk < 1:
            raise InputError(f"model.rows_per_chunk={rows_per_chunk} must be at least 1")
        self.save_given()
        self.network = network
        self.loss = loss
        self.perturbation = perturbation
        self.seed = seed
        chunks = {"per_chunk": rows_per_chunk, "items": "rows", "begin_again": restore}
        self._batches = Batches(self._step_result, network, compiles=False, name="the outer step", tell=say, **chunks)
        if next(network.parameters(), None) is None:
            raise InputError(f"model.network {type(network).__name__} has no parameter that could be trained")
        self.collected = RowScores()
        self.scores: Scores = {}

    @property
    def rows_per_chunk(self) -> int | None:
        """How many rows at most are evaluated at once on each rank: fewer than asked for where memory was short."""
        return self._batches.per_chunk

    def outer(self) -> Outer:
        """``{"network": …}``: its trainable parameters by name."""
        return {"network": {name: value for name, value in self.network.named_parameters() if value.requires_grad}}

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs; the inputs stay as they are, whatever it does to them."""
        return self.network(x.clone())

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one step, on ∇L(w + α)."""
        points = self._points(batch)
        self._check_padding(points)
        # on the CPU: what dropout makes of it goes to the device, and nothing waits for the device
        key = torch.tensor(folded(self.seed, self.global_step))
        count = len(points.x)
        items = points, torch.arange(count) + count * self.trainer.global_rank
        outer = self.outer()
        self.follow(outer)
        weights = {name: value.detach() for name, value in outer["network"].items()}
        context = RowsContext(weights, key, self.stepper.scale, self._real(points), Kept(self.network, values=True))
        again = False

        def evaluate() -> Perturbed:
            nonlocal again
            if again:  # at a smaller scale
                restore(context)
            again = True
            return self._at_perturbed_weights(context, items)

        def diagnose(found: Perturbed) -> dict[str, Tensor]:
            norms = {"weight_norm": norm(weights)}
            norms |= {"perturbation_norm": norm(found.alpha)} if found.alpha else {}
            return norms if found.sharpness is None else norms | {"sharpness": found.sharpness}

        self.stepper.take(evaluate, diagnose)

    def _at_perturbed_weights(self, context: RowsContext, items: tuple[Points, Tensor]) -> Perturbed:
        """The loss at w and its gradient at w + α; where α does not ask for the gradient at w, both at w + α."""
        weights = context.weights
        plain: list[OuterGradient] = []

        @cache
        def gradient() -> dict[str, Tensor]:
            plain.append(self._pass(context, items))
            mean = self.mean_over_ranks(plain[0].gradient)
            return unflatten(mean if context.scale is None else mean / context.scale, weights)

        alpha = self.perturbation(weights, gradient, context.key.to(self.device)) if self.perturbation else {}
        moved = weights | {name: weights[name] + change for name, change in alpha.items()}
        # buffers and all else that the network changes follow the first pass alone
        found = self._pass(context._replace(weights=moved, kept=None if plain else context.kept), items)
        if not plain:
            return Perturbed(found, alpha, None)
        return Perturbed(found.at_loss_of(plain[0]), alpha, found.loss - plain[0].loss)

    def _pass(self, context: RowsContext, items: tuple[Points, Tensor]) -> OuterGradient:
        """Loss and gradient; changes the network as a forward pass does, where a state is kept."""
        with told("model", self, items[0].x):
            return self._batches(context, items).gradient

    def _real(self, points: Points) -> tuple[Tensor, int] | None:
        """How many rows count, as a mean over the ranks, and how many rows there are; None where all do."""
        real = real_rows(self.loss, points.y, points.mask)
        if real is None:
            return None
        count = self.mean_over_ranks(real.sum().to(self.dtype).reshape(1))
        return count.clamp(min=torch.finfo(count.dtype).tiny), len(points.x)

    def _check_padding(self, points: Points) -> None:
        if points.mask is not None and self.network.training and sees_other_rows(self.network):
            raise InputError(
                "model.network: BatchNorm would mix the padding of the batch into its statistics; use LayerNorm or "
                "GroupNorm, or give no rows that are masked"
            )

    def _step_result(self, context: RowsContext, items: tuple[Points, Tensor]) -> StepResult:
        """The mean loss over rows and its gradient; this is what is evaluated chunk by chunk."""
        points, rows = items

        def loss(network: Any) -> Tensor:
            values = row_losses(self.loss, network(points.x), points.y)
            if context.real is None:
                value = values.mean()
            else:
                count, whole = context.real
                real = real_rows(self.loss, points.y, points.mask)
                # a chunk counts by its share of all rows, whatever its share of those that count
                value = values.where(real, 0.0).sum() / (count * (len(values) / whole)).squeeze()
            return value if context.scale is None else context.scale * value

        numbers = range(int(rows[0]), int(rows[-1]) + 1)
        if context.kept is None:
            value, gradient = gradient_at(self.network, loss, context.weights, context.key, rows=numbers)
        else:
            value, gradient = gradient_in_training(self.network, loss, context.weights, context.key, numbers)
        true = value if context.scale is None else value / context.scale
        return StepResult(OuterGradient.of(true, {"network": gradient}), {}, {})

    def on_fit_start(self) -> None:
        """Try the network on two rows, before anything is trained.

        Raises:
            InputError: it cannot take them, or lacks a score for each class; the loss cannot take what it says, or has
                no gradient by it, or not the whole one.
        """
        super().on_fit_start()
        data = self.trainer.datamodule
        if isinstance(data, BatchDataModule):
            train = data.points("train")
            x, y = self.cast((train.x[:2], train.y[:2]))
            check_first_rows(self.network, self.loss, x, y, len(data.classes), self.seed)

    # ---- evaluation

    def start_evaluation(self) -> None:
        """Collect in double precision, which torchmetrics forgets whenever a module moves."""
        self.collected.set_dtype(torch.float64)

    def evaluate(self, batch: Batch, batch_idx: int, split: Split) -> None:
        """Collect losses and right answers."""
        points = self._points(batch)
        prediction = self(points.x)
        losses = row_losses(self.loss, prediction, points.y)
        right = right_rows(self.loss, prediction, points.y)
        self.collected.update(losses, right, real_rows(self.loss, points.y, points.mask))

    def evaluated(self, split: Split) -> dict[str, float]:
        """Loss and accuracy over the rows of all ranks."""
        loss, accuracy = self.collected.compute().tolist()
        self.collected.reset()
        self.scores = {LEARNED: {"loss": loss} | ({} if isnan(accuracy) else {"accuracy": accuracy})}
        return self.scores[LEARNED]

    def report(self, split: Split) -> Report:
        """The scores."""
        return score_report(self.scores, split)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """The network's outputs at a batch of inputs, alone or with their targets."""
        if isinstance(batch, list | tuple) and len(batch) == 1:
            batch = batch[0]
        return self.network(self.cast(batch) if isinstance(batch, Tensor) else self._points(batch).x)

    def sample_gradient_norms(self, _: Any) -> tuple[Tensor, Tensor]:
        """The norm of each training row's own loss gradient, ‖∇w ℓᵢ(w)‖, and which rows are corrupted, both ``[rows]``.

        Raises:
            InputError: the data is none of a :class:`~metalit.data.BatchDataModule`, or a network with BatchNorm.
        """
        data = self.trainer.datamodule
        if not isinstance(data, BatchDataModule):
            raise InputError("SampleGradientNorms: the rows must come from a BatchDataModule; leave the callback out")
        points = self.cast(data.points("train"))

        def loss(prediction: Tensor, target: Tensor) -> Tensor:
            return row_losses(self.loss, prediction.unsqueeze(0), target.unsqueeze(0))[0]

        slopes = per_sample_gradients(self.network, points.x, points.y, loss=loss, chunk_size=256, flat=True)
        return slopes.norm(dim=1), data.splits.corrupted.to(self.device)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which entries are buffers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["buffers"] = buffer_names(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over buffers that the network made, or made larger, in training; see :class:`OuterLearner`."""
        adopt_buffers(self, checkpoint["state_dict"], checkpoint.get("buffers", []))
        super().on_load_checkpoint(checkpoint)

    def _points(self, batch: Batch) -> Points:
        pair = isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if not (isinstance(batch, Points) or pair):
            raise InputError(
                f"data: SupervisedLearner takes batches of inputs and targets, and got a {type(batch).__name__}; use "
                "BatchDataModule, or a DataLoader of pairs"
            )
        return self.cast(batch if isinstance(batch, Points) else Points(*batch))
