"""What is random in a module, and how it follows a key."""

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metalit.autodiff.watch import ModuleFacts
from metalit.keys import fold, folded, uniform
from metalit.private_torch import Dropout, draws_its_windows, is_batched, is_traced, parameters_of


def draws(module: nn.Module) -> bool:
    """Whether ``module`` holds active dropout, or another layer that draws, for which :func:`call` needs a key."""
    return any(_layer_draws(layer) for layer in module.modules())


def _layer_draws(layer: nn.Module) -> bool:
    if isinstance(layer, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return draws_its_windows(layer)  # in evaluation too
    if not layer.training:
        return False
    if isinstance(layer, Dropout):
        return layer.p > 0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, nn.RReLU) and layer.lower < layer.upper


class DrewError(Exception):
    """A module drew that drew nothing before: evaluate it anew, with masks from the key."""


@contextmanager
def drawing_by(key: Tensor | None, module: object, rows: range | None = None, again: bool = False) -> Iterator[None]:
    """Make all random numbers in ``module`` a function of a key, for the rows with these numbers.

    Without a key, it draws freely. Dropout takes its masks from the key. Other random numbers come from the generators
    of torch, of Python, of numpy, and those that the module holds: they are seeded by the key, and put back afterwards.
    Under ``vmap``, where a key stands for many, and in a program, where it has no value yet, they cannot be seeded:
    torch refuses to draw from them, and :func:`metalit.compiling.compiler.trace` refuses what draws.

    With ``again``, dropout is replaced only in modules that drew before: to watch for it costs more than a small
    network.

    Raises:
        DrewError: with ``again``, where a module draws that did not before.
    """
    if key is None:
        yield
        return
    if is_batched(key) or is_traced(key):
        with KeyedDropout(key, rows):
            yield
        return
    masks = KeyedDropout(key, rows)
    layers = list(module.modules()) if isinstance(module, nn.Module) else []
    drew = _DRAWS.get(layers) if layers else None
    watches = not again or drew is not False
    with _seeded(folded(int(key), rows.start if rows else 0), layers) as drawn:
        with masks if watches else nullcontext():
            yield
        if layers:
            draws = masks.calls > 0 or drawn()
            if draws or drew is None:
                _DRAWS.set(layers, draws)
            if draws and not watches:
                raise DrewError


_DRAWS = ModuleFacts()  # by dropout, or from a generator of torch
_DRAWS_FROM_OTHERS = ModuleFacts()  # by the generators of Python or numpy, which are slow to set


@contextmanager
def _seeded(seed: int, layers: list[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Seed all generators; yields a function that says whether one of torch's was drawn from."""
    own = [value for layer in layers for value in layer.__dict__.values() if isinstance(value, torch.Generator)]
    own += generators(value for layer in layers for value in parameters_of(layer).values() if value is not None)
    states = [generator.get_state() for generator in own]
    drew_from_others = _DRAWS_FROM_OTHERS.get(layers) if layers else None
    try:
        for generator in own:
            generator.manual_seed(seed)
        start_states = [generator.get_state() for generator in own]

        def drawn() -> bool:
            return not all(map(torch.equal, start_states, [generator.get_state() for generator in own]))

        if drew_from_others is False:
            yield drawn
            return
        with OtherGenerators(seed) as others:
            yield drawn
        if layers:
            _DRAWS_FROM_OTHERS.set(layers, others.drawn)
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def generators(tensors: Iterable[Tensor]) -> list[torch.Generator]:
    """Torch's own generators of the devices of these tensors, and that of the CPU."""
    devices = {value.device.index for value in tensors if value.is_cuda}
    return [torch.default_generator, *[torch.cuda.default_generators[index] for index in sorted(devices)]]


class OtherGenerators:
    """Watches the generators of Python and numpy, which ``vmap`` does not; if they are seeded, puts them back.

    Args:
        seed: what they are seeded by; if not given, they go on.

    Attributes:
        drawn: whether one of them was drawn from.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.drawn = False

    def __enter__(self) -> "OtherGenerators":
        """Keep their states, and seed them."""
        self.before = _read()
        if self.seed is not None:
            random.seed(self.seed)
            if numpy := sys.modules.get("numpy"):
                numpy.random.seed(self.seed % 2**32)
        self.at_start = _read() if self.seed is not None else self.before
        return self

    def __exit__(self, *_: object) -> None:
        """Find out whether they were drawn from, and put them back if they were seeded."""
        self.drawn = _read() != self.at_start
        if self.seed is not None:
            random.setstate(self.before[0])
            if len(self.before) > 1:
                numpy, (name, keys, *rest) = sys.modules["numpy"], self.before[1]
                numpy.random.set_state((name, numpy.frombuffer(keys, numpy.uint32), *rest))


def _read() -> list[Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return [random.getstate()]
    name, keys, *rest = numpy.random.get_state()
    return [random.getstate(), (name, keys.tobytes(), *rest)]


class KeyedDropout(TorchFunctionMode):
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
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
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
        shape: tuple[int, ...] = x.shape
        if spatial is not None:
            # as torch reads it: an input without a batch is [channels, ...], but never for dropout2d
            kept = 1 if x.dim() == spatial + 1 and spatial != 2 else 2
            shape = (*x.shape[:kept], *[1] * (x.dim() - kept))
        key, before = fold(self.key.to(x.device), self.calls), 0
        if self.rows:
            each, over = divmod(shape[0], len(self.rows))
            key, before = (fold(key, self.rows.start), 0) if over else (key, self.rows.start * each)
        keep = uniform(key, *shape, dtype=torch.float32, first=before * math.prod(shape[1:])) >= p
        return x * keep.to(x.dtype) / (1.0 - p)
