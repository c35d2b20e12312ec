"""Attention that can be vectorised, and differentiated twice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention by its formula: the fused kernels have neither batching rules nor second derivatives."""
    before = torch.backends.mha.get_fastpath_enabled()
    if not before and not torch.backends.cuda.flash_sdp_enabled():  # within this very context
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
