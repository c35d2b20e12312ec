"""Modules as functions of their parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.random import fork_rng

from metalit.autodiff.untouched import untouched
from metalit.errors import InputError
from metalit.keys import fold, uniform


def call(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: Tensor, key: Tensor | None = None) -> Tensor:
    """Evaluate ``module`` with other parameters, leaving it exactly as it was.

    Tied weights follow the name that is given; parameters that are not given keep the module's own values.
    Normalisation layers use the statistics of the batch that they see: running buffers are neither read nor written.
    Dropout draws from ``key`` alone, so a draw depends neither on what was drawn before nor on who draws beside it.

    Args:
        module: any network.
        parameters: tensors by the module's parameter names.
        inputs: what ``module.forward`` takes.
        key: a key of :mod:`metalit.keys`; without one, active dropout draws from torch's global generator.

    Raises:
        InputError: a name that is no parameter of the module; ``InstanceNorm`` with running statistics.

    >>> layer = torch.nn.Linear(2, 1)
    >>> call(layer, {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.zeros(1)}, torch.tensor([3.0, 4.0]))
    tensor([11.])
    """
    unknown = parameters.keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unknown:
        raise InputError(f"parameters: {sorted(unknown)} are no parameters of {type(module).__name__}")
    state: dict[str, Tensor | None] = {**_without_running_statistics(module), **parameters}
    with untouched(module), nullcontext() if key is None else _KeyedDropout(key):
        return functional_call(module, state, inputs)


def _without_running_statistics(module: nn.Module) -> dict[str, None]:
    state: dict[str, None] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise InputError(f"network: the running statistics of {path!r} cannot adapt; set track_running_stats=False")
        if isinstance(layer, _BatchNorm):
            state |= {f"{path}.{name}" if path else name: None for name in layer._buffers}
    return state


def draws(module: nn.Module) -> bool:
    """Whether ``module`` holds active dropout, for which :func:`call` needs a key."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.modules.dropout._DropoutNd))
    return any(layer.training and layer.p > 0 for layer in layers)


@contextmanager
def drawing_by(key: Tensor | None, module: nn.Module, rows: range | None = None) -> Iterator[None]:
    """Let the dropout of ``module`` draw from a key, of the rows with these numbers; without one, as torch does."""
    if key is None:
        yield
        return
    layers = (layer for layer in module.modules() if isinstance(layer, nn.MultiheadAttention))
    with ExitStack() as stack:
        stack.enter_context(_KeyedDropout(key, rows))
        if any(layer.training and layer.dropout > 0 for layer in layers):
            # no mode sees what it calls: the generator that it draws from is a function of the key then
            stack.enter_context(fork_rng([key.device] if key.is_cuda else []))
            torch.manual_seed(int(fold(key, rows.start if rows else 0)))
        yield


def sees_other_rows(module: nn.Module) -> bool:
    """Whether ``module`` holds BatchNorm, by which what it says of one row depends on the others."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


class _KeyedDropout(TorchFunctionMode):
    """Replaces the random masks of dropout by masks drawn from a key.

    Where the batch is part of a larger one, ``rows`` are its numbers there. Each row then drops what it would drop in
    the whole, where rows come first in what is dropped from, also as ``[rows · tokens, …]``; elsewhere, as in
    ``[tokens, rows, …]``, every part draws by itself.
    """

    MASK_DIMS: ClassVar = {F.dropout: None, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}

    def __init__(self, key: Tensor, rows: range | None = None) -> None:
        super().__init__()
        self.key = key
        self.rows = rows
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if func not in self.MASK_DIMS:
            return func(*args, **(kwargs or {}))
        return self.dropout(self.MASK_DIMS[func], *args, **(kwargs or {}))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention whose weights drop: softmax(QKᵀ · scale + mask) written down; without dropout, torch's own."""
        if dropout_p == 0.0:
            options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self.dropout(None, scores.softmax(-1), dropout_p) @ value

    def dropout(
        self, spatial: int | None, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Drop single entries, or whole channels of inputs with ``spatial`` trailing dimensions."""
        if not training or p == 0.0:
            return x
        if p == 1.0:
            return x * 0.0
        self.calls += 1
        shape = x.shape
        if spatial is not None:
            # as torch reads it: an input without a batch is [channels, ...], but never for dropout2d
            kept = 1 if x.dim() == spatial + 1 and spatial != 2 else 2
            shape = (*x.shape[:kept], *[1] * (x.dim() - kept))
        key, before = fold(self.key, self.calls), 0
        if self.rows:
            each, over = divmod(shape[0], len(self.rows))
            key, before = (fold(key, self.rows.start), 0) if over else (key, self.rows.start * each)
        keep = uniform(key, *shape, dtype=torch.float32, first=before * math.prod(shape[1:])) >= p
        return x * keep.to(x.dtype) / (1.0 - p)
