"""The gradient of ready-made networks at perturbed weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalit.autodiff.functional import drawing_by
from metalit.autodiff.names import of_module
from metalit.autodiff.perturbations import Perturbation
from metalit.autodiff.untouched import untouched
from metalit.errors import InputError
from metalit.keys import fold

Loss: TypeAlias = Callable[[Callable[..., Any]], Tensor]
DROPOUT = -1  # apart from the numbers by which perturbations fold a key


class PerturbedGradient(NamedTuple):
    """``L(w + α)``, its gradient by w, and α; the last two by parameter name."""

    loss: Tensor
    gradient: dict[str, Tensor]
    perturbation: dict[str, Tensor]


def gradient_at(
    module: nn.Module,
    loss: Loss,
    parameters: Mapping[str, Tensor] | None = None,
    key: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    rows: range | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of ``module`` and its gradient at other parameters; the module is left exactly as it was.

    BatchNorm follows its mode: the statistics of the batch in training, the running ones in evaluation. What a forward
    pass does to buffers is lost with the clones of them that it sees, unless ``buffers`` are given. Gradients are
    computed whatever the surrounding mode (``no_grad``, ``inference_mode``), and no ``.grad`` is read or written.

    Args:
        module: any network.
        loss: a scalar function of the network, which it can call as often as it needs, with any inputs.
        parameters: the point, by parameter name; the module's own values for names that are not given.
        key: a key of :mod:`metalit.keys`, from which dropout then draws; else from torch's global generator.
        buffers: what the forward pass sees and changes as buffers, by name, such as the module's own in training.
        rows: the numbers of the rows that the network sees, where its batch is part of a larger one: each row drops
            what it would drop there, where rows come first in the inputs of dropout.

    Returns:
        The loss, and the gradient by all trainable parameters; zero for one that the loss does not use.

    Raises:
        InputError: a name or shape that is not of the module; no trainable parameter; a loss that is no scalar, or
            does not depend on the network that it is given.

    >>> layer = nn.Linear(1, 1)
    >>> weights = {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([1.0])}
    >>> gradient_at(layer, lambda network: network(torch.tensor([2.0])).square().sum(), weights)
    (tensor(49.), {'weight': tensor([[28.]]), 'bias': tensor([14.])})
    """
    given = of_module(module, parameters or {})
    with torch.inference_mode(False), torch.enable_grad(), untouched(module):
        own = dict(module.named_parameters())
        point = {name: _constant(given.get(name, value)) for name, value in own.items()}
        free = {name: point[name].requires_grad_() for name, value in own.items() if value.requires_grad}
        if not free:
            raise InputError(f"module: {type(module).__name__} has no trainable parameter to differentiate by")
        if buffers is None:
            buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        state = {**point, **buffers}

        def network(*inputs: Any, **options: Any) -> Any:
            return functional_call(module, state, inputs, options)

        with drawing_by(None if key is None else fold(key, DROPOUT), module, rows):
            value = _scalar(loss(network))
        used = value.requires_grad and torch.autograd.grad(value, list(free.values()), allow_unused=True)
        if not used or all(slope is None for slope in used):
            raise InputError("loss: it does not depend on the network it is given; call that, not the module itself")
        slopes = [
            torch.zeros_like(at) if slope is None else slope for slope, at in zip(used, free.values(), strict=True)
        ]
    return value.detach(), dict(zip(free, slopes, strict=True))


def perturbed_gradient(
    module: nn.Module,
    loss: Loss,
    perturbation: Mapping[str, Tensor] | Iterable[Tensor | None] | Perturbation,
    *,
    gradient: Mapping[str, Tensor | None] | None = None,
    key: Tensor | None = None,
) -> PerturbedGradient:
    """``∇_w L(w + α)`` of a ready-made network: the gradient of the loss, taken at ``w + α``.

    α does not depend on w for differentiation, so that ∂(w + α)/∂w is the identity. For the rest see
    :func:`gradient_at`.

    Args:
        module: any network.
        loss: a scalar function of the network, which it can call as often as it needs, with any inputs.
        perturbation: α by parameter name, or in the order of ``module.named_parameters()`` with None for what stays
            as it is, or a :class:`Perturbation` such as ``SAM()``.
        gradient: ∇L(w) by name where it is known already, with None for a zero; else a perturbation that asks for it,
            as SAM does, costs one more evaluation.
        key: a key of :mod:`metalit.keys` for perturbations and dropout; with it, both evaluations drop the same.

    Returns:
        ``L(w + α)``, the gradient by all trainable parameters, and α.

    Raises:
        InputError: a perturbation or gradient whose names or shapes are not those of the module; those of
            :func:`gradient_at`.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 3.0)
    >>> alpha = {"weight": torch.tensor([[0.5]])}
    >>> found = perturbed_gradient(layer, lambda network: network(torch.tensor([2.0])).square().sum(), alpha)
    >>> found.loss, found.gradient, layer.weight.item()
    (tensor(49.), {'weight': tensor([[28.]])}, 3.0)
    """
    with torch.inference_mode(False), torch.no_grad():
        own = dict(module.named_parameters())
        alpha = _alpha(module, loss, perturbation, gradient, key)
        alpha = {name: value.detach().to(own[name]) for name, value in of_module(module, alpha, "perturbation").items()}
        value, slopes = gradient_at(module, loss, {name: own[name] + alpha[name] for name in alpha}, key)
    return PerturbedGradient(value, slopes, alpha)


def _alpha(
    module: nn.Module,
    loss: Loss,
    perturbation: Mapping[str, Tensor] | Iterable[Tensor | None] | Perturbation,
    gradient: Mapping[str, Tensor | None] | None,
    key: Tensor | None,
) -> Mapping[str, Tensor]:
    own = dict(module.named_parameters())
    if isinstance(perturbation, Perturbation):
        free = {name: value.detach() for name, value in own.items() if value.requires_grad}
        known = None if gradient is None else _known(module, free, gradient)
        return perturbation(free, cache(lambda: gradient_at(module, loss, key=key)[1] if known is None else known), key)
    if isinstance(perturbation, Mapping):
        return perturbation
    if isinstance(perturbation, Tensor) or not isinstance(perturbation, Iterable):
        raise InputError(
            f"perturbation: a {type(perturbation).__name__} is neither tensors by name, nor a sequence of tensors, nor "
            "a Perturbation such as SAM()"
        )
    values = list(perturbation)
    if len(values) != len(own):
        raise InputError(
            f"perturbation: {len(values)} tensors for {len(own)} parameters; give None for what stays as it is"
        )
    return {name: value for name, value in zip(own, values, strict=True) if value is not None}


def _known(module: nn.Module, free: dict[str, Tensor], gradient: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    if missing := free.keys() - gradient.keys():
        raise InputError(f"gradient: {sorted(missing)} missing; give None for a gradient of zero")
    given = of_module(module, {name: value for name, value in gradient.items() if value is not None}, "gradient")
    return {name: given[name].detach() if name in given else torch.zeros_like(at) for name, at in free.items()}


def _constant(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value.detach()


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise InputError(f"loss: it returned {found}, not a scalar tensor; take its mean or sum")
    return value.reshape(())
