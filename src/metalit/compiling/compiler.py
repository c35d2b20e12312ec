"""The compiler of torch: all its private names but those of the cache, which ``tests/private/`` holds one by one."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.while_loop import while_loop_op
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

# torch.while_loop would ask Dynamo to trace its body, which breaks in torch.func; this is the operation itself
while_loop: Any = while_loop_op

_EVERYWHERE = {
    # a program with a loop is kept in the cache as well: what it loops over is part of the graph, and so of its key
    "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": torch.__version__},
}
_HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
_ON_CPU = {
    # the calls between kernels in C++ too: from Python they cost as much as small kernels. They are compiled apart
    # from the kernels, and optimised less: they are most of the code, and there is little to gain in them. Not at all
    # (-O0) would cost a step 4 to 8 % of its time
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "aot_inductor.compile_wrapper_opt_level": "O1",
    # torch's headers compiled beforehand save a second of each program, and take ten: for many programs alone
    "cpp_cache_precompile_headers": os.environ.get(_HEADERS) == "1",
    # the processor's vectors, without programs that show that the compiler knows them, since torch was built with them
    "cpp.vec_isa_ok": True,
    # a value that is used twice is written out twice, until it is of so many operations: a chain that doubles, as a
    # hash does, would otherwise be written out a thousand times
    "realize_opcount_threshold": 20,
}
_ELSEWHERE = {
    # kernels are not tried out against each other: which is fastest would differ from run to run, and so would the last
    # digits of a run that goes on
    "deterministic": True,
}


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
    for part in ("_dynamo.utils", "_inductor.compile_fx", "_inductor.decomposition", "_inductor.async_compile"):
        import_module(f"torch.{part}")
    for part in ("cpp", "cpp_wrapper_cpu", "wrapper", "common"):
        import_module(f"torch._inductor.codegen.{part}")


def found_in_cache() -> int:
    """How many programs this process has found in the cache."""
    return import_module("torch._dynamo.utils").counters["inductor"]["fxgraph_cache_hit"]


@contextmanager
def vectors_probed() -> Iterator[None]:
    """Find out about the processor's vectors in another thread: programs that try them out take a second, once."""

    def probe() -> None:
        with import_module("torch._inductor.config").patch(_ON_CPU):
            import_module("torch._inductor.cpu_vec_isa").valid_vec_isa_list()

    other = Thread(target=probe, daemon=True)
    other.start()
    yield
    other.join()


def trace(fn: Callable[..., list[Tensor]], tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
    """What ``fn`` does to tensors of these forms, as a graph of the operations that the compiler knows.

    Invariant: nothing in the graph writes to a tensor, what does not lead to a result is not in it, and nothing is
    in it twice, as what each inner step makes of the same rows.

    Raises:
        ValueError: it draws from a generator of torch.
    """
    known = import_module("torch._inductor.decomposition").select_decomp_table()
    # a singular matrix gives what is not finite, which stops the run; the check that raises would order the calls
    known = {**known, torch.ops.aten._linalg_check_errors.default: lambda *_, **__: None}
    # what functionalize makes of views in loops; these two are not in the table, and would be calls of torch
    aten: Any = torch.ops.aten
    known[aten.select_copy.int] = lambda *given: aten.select.int(*given).clone()
    known[aten.slice_copy.Tensor] = lambda *given: aten.slice.Tensor(*given).clone()

    def traced(fn: Callable[..., Any]) -> torch.fx.GraphModule:
        return make_fx(fn, known, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)

    graph = traced(fn)
    drawn = [node.target for part in _parts(graph) for node in part.graph.nodes if _draws(node)]
    if drawn:
        raise ValueError(f"{drawn[0]} draws random numbers that do not follow a key")
    if any(_writes(node) for part in _parts(graph) for node in part.graph.nodes):
        graph = traced(functionalize(graph, remove="mutations"))
    for part in _parts(graph):
        part.graph.eliminate_dead_code()
        part.graph = fx_graph_cse(part.graph)
    return graph


def compile_graph(graph: torch.fx.GraphModule, device: str) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Compile what :func:`trace` found. The program takes a list of tensors, which it empties.

    This enters Inductor below ``AOTAutograd``, which would trace the graph twice more, to find out about gradients,
    writes and views: of the first two there are none, and the third go to the kernels as they are.
    """
    inductor = import_module("torch._inductor.compile_fx")
    config, virtualized = inductor.config, inductor.V
    enable_python_dispatcher = import_module("torch._dispatch.python").enable_python_dispatcher
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = graph.graph.find_nodes(op="output")
    mode = detect_fake_mode([*inputs, *[node.meta["val"] for node in output.args[0]]])
    on_cpu = device == "cpu"
    with (
        torch.no_grad(),
        config.patch(_EVERYWHERE | (_ON_CPU if on_cpu else _ELSEWHERE)),
        virtualized.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        enable_python_dispatcher(),
        _compilers_side_by_side(),
    ):
        graph = inductor._recursive_joint_graph_passes(graph, input_device=torch.device(device))
        # results may have any strides, but they are contiguous in the graph, and stay so where it tells them to
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        return inductor.compile_fx_inner(
            graph, inputs, cpp_wrapper=on_cpu, is_inference=True, cudagraphs=inductor.BoxedBool(False)
        )


@contextmanager
def _compilers_side_by_side() -> Iterator[None]:
    """Let the C++ compiler make the kernels and the calls between them at the same time."""
    codecache: Any = import_module("torch._inductor.codecache")
    build = codecache._worker_compile_cpp

    @wraps(build)
    def build_both(lock: str, builders: Sequence[Any]) -> None:
        if len(builders) == 3:
            calls, kernels, _ = builders
            other = Thread(target=build, args=(f"{lock}.kernels", (kernels,)), daemon=True)
            other.start()
            build(f"{lock}.calls", (calls,))
            other.join()
        build(lock, builders)  # the rest, and again what failed, which it tells of

    codecache._worker_compile_cpp = build_both
    try:
        yield
    finally:
        codecache._worker_compile_cpp = build


def _parts(graph: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    """The graph, and those of the loops in it."""
    return (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _draws(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
