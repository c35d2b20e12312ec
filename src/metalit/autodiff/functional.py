"""Modules as functions of their parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from metalit.autodiff.draws import drawing_by
from metalit.autodiff.exact import exact_for
from metalit.autodiff.untouched import Kept
from metalit.autodiff.watch import ModuleFacts, Writes
from metalit.errors import InputError
from metalit.private_torch import BatchNorm, InstanceNorm, buffers_of

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_WRITES = ModuleFacts()  # whether a module writes to tensors that it holds or is given


def call(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: Tensor, key: Tensor | None = None) -> Tensor:
    """Evaluate ``module`` with other parameters, leaving it and all tensors exactly as they were.

    Tied weights follow the name that is given; parameters that are not given keep the module's own values.
    Normalisation layers use the statistics of the batch that they see: running buffers are neither read nor written.
    What else a forward pass changes, in tensors or attributes, it changes for itself. All that is random follows
    ``key`` alone, so a draw depends neither on what was drawn before nor on who draws beside it.

    Args:
        module: any network.
        parameters: tensors by the module's parameter names.
        inputs: what ``module.forward`` takes.
        key: a key of :mod:`metalit.keys`; without one, active dropout draws from torch's global generator.

    Raises:
        InputError: a name that is no parameter of the module; ``InstanceNorm`` with running statistics.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> call(layer, {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.zeros(1)}, torch.tensor([3.0, 4.0]))
    tensor([11.])
    """
    unknown = parameters.keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unknown:
        raise InputError(f"parameters: {sorted(unknown)} are no parameters of {type(module).__name__}")
    with drawing_by(key, module):
        return evaluated(module, parameters, inputs)


class With(nn.Module):
    """``fn(module, *inputs)`` as a module, so that it can be :func:`evaluated` with other parameters of ``module``.

    Args:
        module: registered under the name ``module``, by which its parameters are given.
        fn: ``fn(module, *inputs)``.
    """

    def __init__(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.fn = (fn,)  # not as a submodule, if it is one

    def forward(self, *inputs: Any) -> Any:
        """Evaluate."""
        return self.fn[0](self.module, *inputs)


def evaluated(
    module: nn.Module, parameters: Mapping[str, Tensor], inputs: tuple[Any, ...], as_torch: bool = False
) -> Any:
    """``module(*inputs)`` with other parameters, leaving it and all tensors exactly as they were.

    Args:
        module: any module.
        parameters: tensors by its parameter names.
        inputs: of its forward.
        as_torch: normalisation layers use their running statistics where torch does, and update those in training.
    """
    kept = Kept(module)
    try:
        # what is made for one derivative alone, or may do more than under call(), is always taken to write
        writes_to_any = True if as_torch or isinstance(module, With) else _WRITES.get(kept.layers)
        clones: dict[int, Tensor] = {}
        if writes_to_any is not False:
            clones = kept.lend_clones()
            parameters, inputs = _cloned(module, parameters, inputs, clones)
        for layer in kept.layers:
            if isinstance(layer, BatchNorm | InstanceNorm) and not as_torch:
                _leave_out_running_statistics(layer, module)
            elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                layer.sparse = False  # torch.func has no sparse gradients; their values are the same
        with exact_for(kept.layers):
            if writes_to_any is not None:
                return functional_call(module, dict(parameters), inputs)
            with Writes() as writes:
                found = functional_call(module, dict(parameters), inputs)
            _WRITES.set(kept.layers, writes.of_any([*clones.values(), *parameters.values(), *inputs]))
            return found
    finally:
        kept.restore()


def _cloned(
    module: nn.Module, parameters: Mapping[str, Tensor], inputs: tuple[Any, ...], clones: dict[int, Tensor]
) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """Clones of all parameters and inputs; a tensor that stands at two places has one clone."""

    def clone(value: Any) -> Any:
        if id(value) not in clones:
            clones[id(value)] = value.clone()
        return clones[id(value)]

    names = dict(module.named_parameters(remove_duplicate=False))
    given = {id(names[name]) for name in parameters}
    others = {name: value for name, value in module.named_parameters() if id(value) not in given}
    state = {name: clone(value) for name, value in (others | dict(parameters)).items()}
    return state, tuple(clone(value) if isinstance(value, Tensor) else value for value in inputs)


def _leave_out_running_statistics(layer: nn.Module, module: nn.Module) -> None:
    if isinstance(layer, InstanceNorm) and layer.track_running_stats:
        named = (module.module if isinstance(module, With) else module).named_modules()
        path = next((path for path, part in named if part is layer), "")
        raise InputError(f"network: the running statistics of {path!r} cannot adapt; set track_running_stats=False")
    buffers = buffers_of(layer)
    for name in _RUNNING:
        if name in buffers:
            buffers[name] = None


def sees_other_rows(module: nn.Module) -> bool:
    """Whether ``module`` holds BatchNorm, by which what :func:`call` says of one row depends on the others."""
    return any(isinstance(layer, BatchNorm) for layer in module.modules())
