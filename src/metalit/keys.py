"""Random numbers as a pure function of a key: no state, so the order and place of a draw change nothing.

A key is an ``int64`` tensor of any shape. :func:`fold` derives a key from a key and integers; :func:`uniform`,
:func:`permutation` and :func:`distinct` draw from a key. The numbers are those of SplitMix64, the finaliser of a
counter (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 15); in-range integer
arithmetic only, so they are the same on every device, under ``vmap`` and in compiled code.

>>> import torch
>>> key = fold(torch.tensor(7), 1)
>>> torch.equal(uniform(key, 3), uniform(fold(torch.tensor([7, 8]), 1), 3)[0])
True
"""

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _xor_shift(z: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically; masking the sign's copies makes it a logical shift
    return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))


def _mix(z: Tensor) -> Tensor:
    return _xor_shift(_xor_shift(_xor_shift(z, 30) * _MIX_1, 27) * _MIX_2, 31)


def fold(key: Tensor, *data: int | Tensor) -> Tensor:
    """Derive a new key from ``key`` and integers (tensors broadcast)."""
    for number in data:
        other = _mix(number * _GAMMA + 1) if isinstance(number, Tensor) else _mixed(number * _GAMMA + 1)
        key = _mix(_mix(key + _GAMMA) ^ other)
    return key


def folded(key: int, *data: int) -> int:
    """:func:`fold` of a single key that is at hand as a number, which takes a tenth of the time.

    >>> folded(7, 1) == int(fold(torch.tensor(7), 1))
    True
    """
    for number in data:
        key = _mixed(_mixed(key + _GAMMA) ^ _mixed(number * _GAMMA + 1))
    return key


def _mixed(z: int) -> int:
    """``_mix(z)`` in whole numbers: a program would overflow on constants, which C++ leaves undefined."""
    z, low = z % 2**64, 2**64 - 1
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        z = (z ^ (z >> shift)) * factor & low
    return _signed(z ^ (z >> 31))


def uniform(key: Tensor, *shape: int, dtype: torch.dtype = torch.float64, first: int = 0) -> Tensor:
    """Draw from the uniform distribution on [0, 1).

    Args:
        key: ``[*batch]`` keys.
        shape: the shape of the draw for each key.
        dtype: ``float64`` (53 random bits) or ``float32`` (24 random bits; the same number, rounded down).
        first: the number of its first entry, where the draw is part of a longer one.

    Returns:
        ``[*batch, *shape]``
    """
    count = 1
    for size in shape:
        count *= size
    # adding a zero that is no constant keeps a compiler from multiplying indices, which overflows likewise
    zero = (key.reshape(-1)[:1] & 0).sum()
    counter = torch.arange(first + 1, first + count + 1, device=key.device) + zero
    bits = _mix(key.unsqueeze(-1) + counter * _GAMMA)
    kept = 24 if dtype == torch.float32 else 53
    fraction = ((bits >> (64 - kept)) & ((1 << kept) - 1)).to(dtype) * 2.0**-kept
    return fraction.reshape((*key.shape, *shape))


def normal(key: Tensor, *shape: int) -> Tensor:
    """Draw from the standard normal distribution by inversion, in ``float64``; shapes as in :func:`uniform`."""
    return torch.special.ndtri(uniform(key, *shape).clamp(min=2.0**-54))  # the quantile of 0 is −∞


def permutation(key: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Draw a random order of ``0 … count − 1`` for each key.

    Args:
        key: ``[*batch]`` keys.
        count: how many positions there are.
        allowed: ``[*batch, count]`` boolean; positions that are not allowed come last.

    Returns:
        ``[*batch, count]`` positions.
    """
    rank = uniform(key, count)
    if allowed is not None:
        rank = rank + (~allowed).to(rank.dtype)
    return rank.argsort(dim=-1, stable=True)


def distinct(key: Tensor, count: int, below: int | Tensor) -> Tensor:
    """Draw ``count`` different whole numbers from 0 to ``below − 1`` in random order, whatever their number costs.

    Args:
        key: ``[*batch]`` keys.
        count: how many, at most the least of ``below``.
        below: how many there are to draw from, a number or ``[*batch]``.

    Returns:
        ``[*batch, count]`` numbers; every such sequence is as likely.
    """
    chance = uniform(key, count)
    drawn = key.new_empty((*key.shape, 0))
    for position in range(count):
        # the n-th of those that are left: it lies beyond each taken one whose own place among them is no later
        rank = (chance[..., position] * (below - position)).long().unsqueeze(-1)
        places = drawn.sort(-1).values - torch.arange(position, device=key.device)
        drawn = torch.cat([drawn, rank + (places <= rank).sum(-1, keepdim=True)], -1)
    return drawn
