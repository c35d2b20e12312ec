"""What is checked on the first rows of a supervised learner: that its network and its loss can take them."""

from functools import partial

import torch
from torch import Tensor, nn

from metalit.autodiff import gradient_at
from metalit.autodiff.blame import as_input_error
from metalit.autodiff.draws import drawing_by
from metalit.autodiff.functional import evaluated
from metalit.errors import InputError
from metalit.losses import row_losses


def check_first_rows(network: nn.Module, loss: nn.Module | None, x: Tensor, y: Tensor, classes: int, seed: int) -> None:
    """Try a network and a loss on two rows, to no effect.

    Args:
        network: maps ``[rows, ...]`` to ``[rows, outputs]``.
        loss: the user's criterion, if there is one.
        x, y: the rows.
        classes: how many classes there are, 0 for real targets.
        seed: the seed of dropout.

    Raises:
        InputError: the network cannot take the rows, or lacks a score for each class; the loss cannot take what it
            says, or has no gradient by it, or not the whole one.
    """
    with as_input_error("model.network", network, x), torch.no_grad(), drawing_by(torch.tensor(seed), network):
        scores = evaluated(network, {}, (x,), as_torch=True)
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    # one logit may do for two classes, where a criterion of the user's says so
    needed = classes - (classes == 2 and not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss | None))
    if not isinstance(scores, Tensor) or (classes and (scores.dim() < 2 or scores.shape[1] < needed)):
        raise InputError(
            f"model.network returned {shape} for two rows; it must be a tensor [rows, outputs], one output for "
            f"each of {classes} classes"
            if classes
            else f"model.network returned a {shape}; it must be a tensor [rows, outputs]"
        )
    try:
        row_losses(loss, scores, y)
    except RuntimeError as error:
        raise InputError(
            f"model.loss {type(loss).__name__} cannot take predictions {shape} and targets "
            f"{tuple(y.shape)} of {y.dtype}: {str(error).splitlines()[0]}"
        ) from error
    trains = any(parameter.requires_grad for parameter in network.parameters())
    if loss is not None and trains:  # a loss of the user's may reach anything
        with as_input_error("model.network", network):
            gradient_at(network, partial(_mean_loss, loss, x, y), key=torch.tensor(seed))


def _mean_loss(loss: nn.Module, x: Tensor, y: Tensor, network: nn.Module) -> Tensor:
    return row_losses(loss, network(x), y).mean()
