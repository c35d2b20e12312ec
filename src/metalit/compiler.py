"""The compiler of torch: how it is imported, kept quiet, and asked whether it had anything to do."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what the compiler warns of, which is no fault of the user's; what ``fn`` itself warns of, it will again."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "TORCH_LOGS" not in os.environ:
            logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


def import_compiler() -> None:
    """Import the compiler, which is slow, and which another attempt could not repair were it ended half done."""
    for part in ("_dynamo.utils", "_inductor.compile_fx", "_inductor.standalone_compile", "_inductor.async_compile"):
        import_module(f"torch.{part}")
    for part in ("cpp", "cpp_wrapper_cpu", "wrapper", "common"):
        import_module(f"torch._inductor.codegen.{part}")


def found_in_cache() -> int:
    """How many programs this process has found in the cache."""
    counters = import_module("torch._dynamo.utils").counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
