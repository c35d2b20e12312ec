"""Loss and gradient of a network at perturbed weights, ∇L(w + α), row by row where memory is short."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from metalit.autodiff import Perturbation, gradient_at
from metalit.autodiff.blame import as_input_error
from metalit.autodiff.perturbed import gradient_in_training
from metalit.autodiff.untouched import Kept
from metalit.judging import real_rows
from metalit.losses import row_losses
from metalit.notices import say
from metalit.problem import Points
from metalit.training.batches import Batches, StepResult
from metalit.training.outer_gradient import OuterGradient
from metalit.tree import unflatten


class RowsContext(NamedTuple):
    """What a pass over the rows of a batch is taken at.

    Attributes:
        weights: the trainable parameters by name.
        key: what dropout draws from.
        scale: what the gradient is multiplied by in 16-mixed precision.
        real: how many rows count, as a mean over the ranks, and how many rows there are; None where all count.
        kept: the network's state, where the pass may change it as a forward pass does.
    """

    weights: dict[str, Tensor]
    key: Tensor
    scale: Tensor | None
    real: tuple[Tensor, int] | None
    kept: Kept | None

    def restore(self) -> None:
        """Let the network be as it was before a pass that begins again."""
        if self.kept is not None:
            self.kept.restore()


class Perturbed(NamedTuple):
    """What a step found: the gradient at w + α, and by how much the loss there is above that at w, if it is known."""

    gradient: OuterGradient
    alpha: dict[str, Tensor]
    sharpness: Tensor | None


class HasNetwork(Protocol):
    """A learner whose network is trained."""

    network: nn.Module
    loss: nn.Module | None
    perturbation: Perturbation | None


class PerturbedStep:
    """Finds the gradient of a step.

    Args:
        owner: the learner, whose network, loss and perturbation these are, and whose layers are named in messages.
        rows_per_chunk: see :class:`~metalit.modules.supervised.SupervisedLearner`.
    """

    def __init__(self, owner: HasNetwork, rows_per_chunk: int | None) -> None:
        self.owner = owner
        fn, name, begin_again = self._step_result, "the outer step", RowsContext.restore
        self.batches = Batches(fn, owner.network, False, rows_per_chunk, name, say, "rows", begin_again)

    def __call__(
        self, context: RowsContext, items: tuple[Points, Tensor], mean_over_ranks: Callable[[Tensor], Tensor]
    ) -> Perturbed:
        """The loss at w and its gradient at w + α; where α does not ask for the gradient at w, both at w + α.

        Args:
            context: what the step is taken at.
            items: the rows of this rank, and their numbers among those of all ranks.
            mean_over_ranks: takes the mean of a tensor over the ranks.
        """
        weights, perturbation = context.weights, self.owner.perturbation
        plain: list[OuterGradient] = []

        @cache
        def gradient() -> dict[str, Tensor]:
            plain.append(self._pass(context, items))
            mean = mean_over_ranks(plain[0].gradient)
            return unflatten(mean if context.scale is None else mean / context.scale, weights)

        alpha = perturbation(weights, gradient, context.key.to(items[0].x.device)) if perturbation else {}
        moved = weights | {name: weights[name] + change for name, change in alpha.items()}
        # buffers and all else that the network changes follow the first pass alone
        found = self._pass(context._replace(weights=moved, kept=None if plain else context.kept), items)
        if not plain:
            return Perturbed(found, alpha, None)
        return Perturbed(found.at_loss_of(plain[0]), alpha, found.loss - plain[0].loss)

    def _pass(self, context: RowsContext, items: tuple[Points, Tensor]) -> OuterGradient:
        """Loss and gradient; changes the network as a forward pass does, where a state is kept."""
        with as_input_error("model", cast(nn.Module, self.owner), items[0].x):
            return self.batches(context, items).gradient

    def _step_result(self, context: RowsContext, items: tuple[Points, Tensor]) -> StepResult:
        """The mean loss over rows and its gradient; this is what is evaluated chunk by chunk."""
        points, rows = items

        def loss(network: Any) -> Tensor:
            values = row_losses(self.owner.loss, network(points.x), points.y)
            if context.real is None:
                value = values.mean()
            else:
                count, whole = context.real
                real = cast(Tensor, real_rows(self.owner.loss, points.y, points.mask))
                # a chunk counts by its share of all rows, whatever its share of those that count
                value = values.where(real, 0.0).sum() / (count * (len(values) / whole)).squeeze()
            return value if context.scale is None else context.scale * value

        numbers = range(int(rows[0]), int(rows[-1]) + 1)
        if context.kept is None:
            value, gradient = gradient_at(self.owner.network, loss, context.weights, context.key, rows=numbers)
        else:
            value, gradient = gradient_in_training(self.owner.network, loss, context.weights, context.key, numbers)
        true = value if context.scale is None else value / context.scale
        return StepResult(OuterGradient.of(true, {"network": gradient}), {}, {})
