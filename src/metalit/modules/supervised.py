"""The supervised learner: trains any network plainly, with noise on its weights, or for flat minima."""

from math import isnan
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from metalit.adapt import Outer
from metalit.autodiff import Perturbation, per_sample_gradients, sees_other_rows
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
from metalit.modules.perturbed_step import Perturbed, PerturbedStep, RowsContext
from metalit.problem import Points
from metalit.tree import norm

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
        self._step = PerturbedStep(self, rows_per_chunk)
        if next(network.parameters(), None) is None:
            raise InputError(f"model.network {type(network).__name__} has no parameter that could be trained")
        self.collected = RowScores()
        self.scores: Scores = {}

    @property
    def rows_per_chunk(self) -> int | None:
        """How many rows at most are evaluated at once on each rank: fewer than asked for where memory was short."""
        return self._step.batches.per_chunk

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
                context.restore()
            again = True
            return self._step(context, items, self.mean_over_ranks)

        def diagnose(found: Perturbed) -> dict[str, Tensor]:
            norms = {"weight_norm": norm(weights)}
            norms |= {"perturbation_norm": norm(found.alpha)} if found.alpha else {}
            return norms if found.sharpness is None else norms | {"sharpness": found.sharpness}

        self.stepper.take(evaluate, diagnose)

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

        gradients = per_sample_gradients(self.network, points.x, points.y, loss=loss, chunk_size=256, flat=True)
        return cast(Tensor, gradients).norm(dim=1), data.splits.corrupted.to(self.device)

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
