"""The gradient of ready-made networks at perturbed weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalit.autodiff.draws import DrewError, drawing_by
from metalit.autodiff.exact import check_exact
from metalit.autodiff.functional import With
from metalit.autodiff.names import of_module
from metalit.autodiff.perturbations import Perturbation
from metalit.autodiff.untouched import Kept, untouched
from metalit.autodiff.usable import check_network
from metalit.errors import InputError
from metalit.keys import folded
from metalit.private_torch import tree_map_only

Loss: TypeAlias = Callable[[Callable[..., Any]], Tensor]
_INDEPENDENT = "loss: it does not depend on the network it is given; compute it from network(...)"
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

    While the loss is evaluated, the module's parameters are the given ones, by whichever way it reaches them, so that
    a penalty on ``network.parameters()`` counts. BatchNorm follows its mode: the statistics of the batch in training,
    the running ones in evaluation. What a forward pass changes, in tensors or attributes, it changes for itself, unless
    ``buffers`` are given. Gradients are computed whatever the surrounding mode (``no_grad``, ``inference_mode``), and
    no ``.grad`` is read or written.

    Args:
        module: any network.
        loss: a scalar function of the network, which it can call as often as it needs, with any inputs.
        parameters: the point, by parameter name; the module's own values for names that are not given.
        key: a key of :mod:`metalit.keys`, which all that is random then follows; else torch's global generator.
        buffers: what the forward pass sees and changes in place as buffers, by name.
        rows: the numbers of the rows that the network sees, where its batch is part of a larger one: each row drops
            what it would drop there, where rows come first in the inputs of dropout.

    Returns:
        The loss, and the gradient by all trainable parameters; zero for one that the loss does not use.

    Raises:
        InputError: a name or shape that is not of the module; no trainable parameter; a loss that is no scalar, does
            not depend on the network, or reaches a parameter of it that was taken from it before.

    >>> layer = nn.Linear(1, 1)
    >>> weights = {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([1.0])}
    >>> gradient_at(layer, lambda network: network(torch.tensor([2.0])).square().sum(), weights)
    (tensor(49.), {'weight': tensor([[28.]]), 'bias': tensor([14.])})
    """
    check_network("module", module)
    given = of_module(module, parameters or {})

    def found(again: bool) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.inference_mode(False), untouched(module) as kept:
            # clones, as a forward pass may write to them
            point = {name: given.get(name, value).detach().clone() for name, value in module.named_parameters()}
            kept.lend_clones()
            return _gradient(module, loss, point | dict(buffers or {}), key, rows, again)

    try:
        return found(again=not buffers)
    except DrewError:
        return found(again=False)


def gradient_in_training(
    module: nn.Module, loss: Loss, parameters: Mapping[str, Tensor], key: Tensor | None, rows: range | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`gradient_at` as a training step takes it: the module is then as after an ordinary forward pass.

    So are its buffers, its attributes, and the given parameters if it writes to them; but no tensor stays on a graph.
    """
    given = of_module(module, parameters)
    kept = Kept(module, values=True)

    def found(again: bool) -> tuple[Tensor, dict[str, Tensor]]:
        point = {name: _constant(given.get(name, value)) for name, value in module.named_parameters()}
        return _gradient(module, loss, point, key, rows, again)

    try:
        with torch.inference_mode(False):
            try:
                return found(again=True)
            except DrewError:
                kept.restore()
                return found(again=False)
    finally:
        kept.restore_parameters()
        kept.cut()


def _gradient(
    module: nn.Module, loss: Loss, state: dict[str, Tensor], key: Tensor | None, rows: range | None, again: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with ``state`` as parameters and buffers, and its gradient by the trainable ones of the parameters."""
    names = dict(module.named_parameters())
    own = {name: value for name, value in names.items() if value.requires_grad}
    if not own:
        raise InputError(f"module: {type(module).__name__} has no trainable parameter to differentiate by")
    check_exact(module.modules())
    if key is not None:
        key = torch.tensor(folded(int(key), DROPOUT), device=key.device)
    with torch.enable_grad(), drawing_by(key, module, rows, again):
        # as parameters, so that a module can assign them: w /= w.norm() does
        state = {name: nn.Parameter(at, name in own) if name in names else at for name, at in state.items()}
        free = {name: state[name] for name in own}
        inputs = module.register_forward_pre_hook(_cloned, prepend=True, with_kwargs=True)
        try:
            value = functional_call(With(module, loss), {f"module.{name}": at for name, at in state.items()}, ())
        finally:
            inputs.remove()
        value = _scalar(value)
        if not value.requires_grad:
            raise InputError(_INDEPENDENT)
        gradients = torch.autograd.grad(value, [*free.values(), *own.values()], allow_unused=True)
    found, past = gradients[: len(free)], gradients[len(free) :]
    bypassed = [name for name, gradient in zip(own, past, strict=True) if gradient is not None]
    if bypassed:
        raise InputError(
            f"loss: it reaches the module's {bypassed[0]!r} by another way than the network it is given, such as a "
            "list of parameters made before, and would lose that part of the gradient; take network.parameters() "
            "inside the loss, or .detach() what counts as a constant"
        )
    if all(gradient is None for gradient in found):
        raise InputError(_INDEPENDENT)
    pairs = zip(free.items(), found, strict=True)
    return value.detach(), {name: _dense(gradient, at) for (name, at), gradient in pairs}


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _cloned(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a forward pass, which it may then write to."""
    if not options and all(type(value) is Tensor for value in inputs):
        return tuple(value.clone() for value in inputs), options
    return tree_map_only(Tensor, torch.clone, (inputs, options))


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
        value, gradients = gradient_at(module, loss, {name: own[name] + alpha[name] for name in alpha}, key)
    return PerturbedGradient(value, gradients, alpha)


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
        given = None if gradient is None else _given_gradient(module, free, gradient)
        return perturbation(free, cache(lambda: gradient_at(module, loss, key=key)[1] if given is None else given), key)
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


def _given_gradient(
    module: nn.Module, free: dict[str, Tensor], gradient: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
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
