"""A module or a function as a function of one row, and its derivatives for all rows at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vjp, vmap

from metalit.autodiff.attention import plain_attention
from metalit.autodiff.draws import OtherGenerators, drawing_by, draws, generators
from metalit.autodiff.exact import ExactSecondDerivatives
from metalit.autodiff.functional import With, evaluated
from metalit.autodiff.names import matching, of_module
from metalit.autodiff.reached import Bypass
from metalit.autodiff.refusals import OTHER_DRAWS, refusals
from metalit.autodiff.untouched import untouched
from metalit.autodiff.usable import check_network
from metalit.errors import InputError
from metalit.keys import fold
from metalit.private_torch import BatchNorm
from metalit.tree import Tree, leaves, tree_map

By: TypeAlias = Literal["parameters"] | int
Function: TypeAlias = Callable[..., Tensor]
Evaluate: TypeAlias = Callable[[dict[str, Tensor], tuple[Tensor, ...], Tensor | None], Tensor]
Derivative: TypeAlias = Callable[[Callable[[Tree], Tensor], Tree], Tree]


def for_each_row(
    derivative: Derivative,
    fn: Function,
    inputs: tuple[Tensor, ...],
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    parameters: Mapping[str, Tensor] | None,
    names: str | Sequence[str],
    by: By,
    chunk_size: int | None,
    flat: bool,
    key: Tensor | None,
) -> Tree:
    """Take ``derivative(value, point)`` of each row; arguments and errors as for :func:`per_sample_gradients`."""
    count = _check_inputs(inputs, 1 if loss is None else 2)
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size: {chunk_size} must be at least 1, or None for all rows at once")
    evaluate, values = _evaluation(fn, loss, parameters, key)
    if by == "parameters" and parameters is None and not isinstance(fn, nn.Module):
        raise InputError(
            "parameters: a plain function needs those to differentiate by; or give by=0 for its first input"
        )
    chosen = _chosen(values, inputs, names, by)
    position = by if isinstance(by, int) else 0

    def row(*parts: Tensor) -> Tree:
        row_key, parts = (None, parts) if key is None else (parts[-1], parts[:-1])

        def value(at: Tree) -> Tensor:
            state, given = ({**values, **at}, parts) if isinstance(at, dict) else (values, _put(parts, position, at))
            return _differentiable(evaluate(state, given, row_key), "fn" if loss is None else "loss")

        point = parts[position] if chosen is None else chosen
        derivatives = derivative(value, point)
        return _flat(derivatives, point) if flat else derivatives

    # without a row, one of zeros is taken, for the shapes
    given = inputs if count else tuple(part.new_zeros(1, *part.shape[1:]) for part in inputs)
    keys = () if key is None else (fold(key, torch.arange(len(given[0]), device=key.device)),)
    each = _one_after_the_other if _has_no_rule(fn) else partial(vmap, chunk_size=chunk_size)
    with refusals(), untouched(fn), plain_attention():
        found = _watched(each(row), key)(*given, *keys)
    return found if count else tree_map(lambda value: value[:0], found)


def _watched(rows: Callable[..., Tree], key: Tensor | None) -> Callable[..., Tree]:
    """``rows``, with a check that all random numbers follow the key, and a graph for the check of what is reached."""

    def watched(*batches: Tensor) -> Tree:
        grads = torch.is_grad_enabled()
        states = [(generator, generator.get_state()) for generator in generators(batches)]
        # what is reached past the arguments shows in the graph; under inference_mode there is none
        with torch.enable_grad(), OtherGenerators() as others:
            found = rows(*batches)
        drawn = any(not torch.equal(generator.get_state(), state) for generator, state in states)
        if others.drawn or (key is None and drawn):
            raise InputError(OTHER_DRAWS)
        return found if grads else tree_map(Tensor.detach, found)

    return watched


def _has_no_rule(fn: Function) -> bool:
    layers = list(fn.modules()) if isinstance(fn, nn.Module) else []
    quiet = any(isinstance(layer, nn.RReLU) and not layer.training for layer in layers)
    return quiet or any(isinstance(layer, nn.RNNBase | nn.RNNCellBase) for layer in layers)


def _one_after_the_other(row: Callable[..., Tree]) -> Callable[..., Tree]:
    """``vmap`` as a loop: torch's recurrent layers, and RReLU in evaluation, have no batching rule."""

    def rows(*batches: Tensor) -> Tree:
        found = [row(*parts) for parts in zip(*batches, strict=True)]
        return tree_map(lambda *derivatives: torch.stack(derivatives), *found)

    return rows


def _put(parts: tuple[Tensor, ...], position: int, part: Tensor) -> tuple[Tensor, ...]:
    return *parts[:position], part, *parts[position + 1 :]


def jacobian(value: Callable[[Tree], Tensor], point: Tree) -> Tree:
    """``∂value/∂point``, ``[*outputs, *shape]``, in reverse mode unless there are more outputs than entries."""
    output, pull_back = vjp(value, point)[:2]
    if output.numel() > sum(leaf.numel() for _, leaf in leaves(point)):
        return forward(value, point)
    if output.numel() == 1:  # cheaper than a batch of one
        (derivatives,) = pull_back(torch.ones_like(output))
    else:
        basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
        (derivatives,) = vmap(pull_back)(basis.reshape(-1, *output.shape))
    if isinstance(point, Tensor):
        return derivatives.reshape(output.shape + point.shape)
    return {name: derivatives[name].reshape(output.shape + leaf.shape) for name, leaf in point.items()}


def forward(value: Callable[[Tree], Tree], point: Tree) -> Tree:
    """``∂value/∂point`` in forward mode, where the operations have one."""
    try:
        return jacfwd(value)(point)
    except NotImplementedError:  # the LSTM, for one, has none
        return jacrev(value)(point)


def scalar(value: Tensor, owner: str) -> Tensor:
    """The value of a row as a scalar; an :class:`InputError` unless it is a single number."""
    if value.numel() != 1:
        way_out = "use per_sample_jacobian, or give loss=, a scalar of each row" if owner == "fn" else "take its sum"
        raise InputError(f"{owner}: its value for a row has shape {list(value.shape)} and so no gradient; {way_out}")
    return value.reshape(())


def _evaluation(
    fn: Function,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
    parameters: Mapping[str, Tensor] | None,
    key: Tensor | None,
) -> tuple[Evaluate, dict[str, Tensor]]:
    """``evaluate(parameters, row, key)`` and the parameters at which the derivatives are taken."""
    if not isinstance(fn, nn.Module):
        return _of_function(fn, loss, dict(parameters or {}))
    check_network("fn", fn)
    mixes = [layer for layer in fn.modules() if isinstance(layer, BatchNorm)]
    if any(layer.training or layer.running_mean is None for layer in mixes):
        raise InputError(
            "fn: its BatchNorm mixes the rows, so no row has a gradient of its own; call .eval(), where it takes its "
            "running statistics, or use GroupNorm"
        )
    if key is None and draws(fn):
        raise InputError(
            "key: None, but the dropout is active (or another layer that draws); give a key of metalit.keys, or call "
            ".eval()"
        )
    own = {name: value.detach() for name, value in fn.named_parameters()}
    trainable = {name: own[name] for name, value in fn.named_parameters() if value.requires_grad}
    bypass = Bypass(trainable if parameters is None else of_module(fn, parameters), own)
    whole = With(fn, partial(_of_row, loss))

    def evaluate(state: dict[str, Tensor], row: tuple[Tensor, ...], key: Tensor | None) -> Tensor:
        given = {f"module.{name}": value for name, value in (own | state).items()}
        with drawing_by(key, fn):
            value = evaluated(whole, given, row, as_torch=True)
        bypass.check(value, "fn" if loss is None else "loss")
        return value

    return evaluate, bypass.parameters


def _of_row(loss: Callable[[Tensor, Tensor], Tensor] | None, module: nn.Module, *row: Tensor) -> Tensor:
    """What a module says of one row, or its loss."""
    # a batch of one: Flatten and its like count on a batch dimension
    output = _tensor(module(*(part.unsqueeze(0) for part in (row if loss is None else row[:-1]))), "fn")
    if output.dim() and output.shape[0] != 1:
        raise InputError(f"fn: it makes {list(output.shape)} of one row; its output must keep the rows first")
    output = output.squeeze(0) if output.dim() else output
    return output if loss is None else _tensor(loss(output, row[-1]), "loss")


def _of_function(
    fn: Function, loss: Callable[[Tensor, Tensor], Tensor] | None, parameters: dict[str, Tensor]
) -> tuple[Evaluate, dict[str, Tensor]]:
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            raise InputError(f"parameters: {name!r} is {value!r}, not a tensor")
    bypass = Bypass(parameters)

    def evaluate(state: dict[str, Tensor], row: tuple[Tensor, ...], key: Tensor | None) -> Tensor:
        row = tuple(part.clone() for part in row)  # which the function may write to
        inputs = row if loss is None else row[:-1]
        try:
            with drawing_by(key, fn), ExactSecondDerivatives():
                output = _tensor(fn(*inputs, **state), "fn")
        except TypeError:
            _check_arguments(fn, inputs, state)
            raise
        value = output if loss is None else _tensor(loss(output, row[-1]), "loss")
        bypass.check(value, "fn" if loss is None else "loss")
        return value

    return evaluate, bypass.parameters


def _check_arguments(fn: Function, row: tuple[Tensor, ...], parameters: dict[str, Tensor]) -> None:
    """Raise an :class:`InputError` if ``fn`` does not take these; asked when a call failed, as it costs as much."""
    try:
        signature(fn).bind(*row, **parameters)
    except TypeError as error:
        raise InputError(f"parameters: {list(parameters)} and {len(row)} inputs do not fit fn: {error}") from None
    except ValueError:  # functions of C have no signature
        pass


def _chosen(
    values: dict[str, Tensor], inputs: tuple[Tensor, ...], names: str | Sequence[str], by: By
) -> dict[str, Tensor] | None:
    """The parameters to differentiate by, or None for an input."""
    if by == "parameters":
        chosen = {name: values[name] for name in matching(values, names)}
    elif isinstance(by, int) and not isinstance(by, bool) and 0 <= by < len(inputs):
        chosen = {f"input {by}": inputs[by]}
    else:
        raise InputError(f"by: {by!r} is neither 'parameters' nor the position of one of {len(inputs)} inputs")
    for name, value in chosen.items():
        if not value.is_floating_point():
            raise InputError(
                f"by: {name} is of {value.dtype}, and derivatives here are by real numbers; convert it to floating "
                "point, or give torch.view_as_real() of what is complex"
            )
    return chosen if by == "parameters" else None


def _check_inputs(inputs: tuple[Tensor, ...], at_least: int) -> int:
    if len(inputs) < at_least:
        raise InputError(f"inputs: {len(inputs)} given; at least {at_least} needed, with loss= the last is the target")
    for index, value in enumerate(inputs):
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise InputError(f"inputs: input {index} is no tensor with a leading dimension of rows: {value!r}")
    counts = [len(value) for value in inputs]
    if len(set(counts)) > 1:
        raise InputError(f"inputs: their numbers of rows differ: {counts}; what all rows share belongs to parameters=")
    return counts[0]


def _tensor(value: object, owner: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"{owner}: it returns a {type(value).__name__}; wrap it in a function that returns one tensor")
    return value


def _differentiable(value: Tensor, owner: str) -> Tensor:
    if not _tensor(value, owner).is_floating_point():
        raise InputError(f"{owner}: it returns {value.dtype}, which has no derivatives")
    return value


def _flat(derivatives: Tree, point: Tree) -> Tensor:
    pairs = zip(leaves(derivatives), leaves(point), strict=True)
    entries = [part.reshape(*part.shape[: part.dim() - at.dim()], at.numel()) for (_, part), (_, at) in pairs]
    return torch.cat(entries, dim=-1)
