"""What the private names of torch's compiler mean to metalit. Each test says what to do where torch changes one."""

import importlib
import logging

import pytest
import torch

from metalit.compiling import cache, compiler
from metalit.compiling.loops import repeated


def traced(fn, *tensors):
    return compiler.trace(fn, tensors)


def operations(graph):
    return {node.target for part in graph.modules() for node in part.graph.nodes if node.op == "call_function"}


def test_a_function_is_traced_to_what_the_compiler_knows():
    """Elsewhere: ``torch.export`` with a table of decompositions, if it learns to go through ``torch.func``."""
    shift = torch.tensor([1.0, 2.0])
    graph = traced(lambda x: [torch.nn.functional.silu(x) + shift], torch.ones(2))
    assert torch.ops.aten.silu.default not in operations(graph)
    torch.testing.assert_close(graph(torch.ones(2))[0], torch.nn.functional.silu(torch.ones(2)) + shift)


def test_nothing_in_a_graph_writes_and_nothing_is_of_no_use():
    """Elsewhere: ``functionalize`` always, if operations no longer tell by their schema that they write."""

    def writes(x):
        y = x.sin()
        y[0] = 3.0
        torch.zeros_like(x.cos())
        return [y.relu_()]

    graph = traced(writes, torch.ones(3))
    assert not any(target._schema.is_mutable for target in operations(graph) if hasattr(target, "_schema"))
    assert torch.ops.aten.cos.default not in operations(graph)
    assert torch.equal(graph(torch.ones(3))[0], writes(torch.ones(3))[0])


def test_nothing_in_a_graph_is_twice_nor_in_a_loop_of_it():
    """Where ``fx_graph_cse`` goes: leave it out; programs are compiled a third longer, and do some work again."""

    def twice(x):
        return [repeated(lambda k, x, a: a.sin() * x + a.sin() * k, torch.tensor(3), x.cos(), x), x.cos() + x]

    graph = traced(twice, torch.ones(2))
    found = [node.target for part in graph.modules() for node in part.graph.nodes]
    assert found.count(torch.ops.aten.sin.default) == found.count(torch.ops.aten.cos.default) == 1
    torch.testing.assert_close(graph(torch.ones(2)), twice(torch.ones(2)))


def test_a_loop_may_find_other_strides_along_one_row():
    """Where torch's loop no longer compares strides: leave ``_with_strides_of`` out."""

    def odd(x):  # strides of 3, 6 and 1 in place of 3, 3 and 1
        return [repeated(lambda k, x, a: (torch.zeros(1, 2, 3) + k).transpose(0, 1), torch.tensor(3), x, x)]

    x = torch.ones(2, 1, 3)
    assert torch.equal(traced(odd, x)(x)[0], 2 * x)


def test_what_draws_is_not_traced_also_in_a_loop():
    """Where the tag has another name: have ``_draws`` ask for that one."""
    with pytest.raises(ValueError, match="draws random numbers that do not follow a key"):
        traced(lambda x: [repeated(lambda k, x, a: x + torch.rand_like(a), torch.tensor(3), x.cos(), x)], torch.ones(2))


def test_the_check_of_a_matrix_is_left_out():
    """Where ``_linalg_check_errors`` has another name: give that one to the table in ``compiler.trace``."""
    graph = traced(lambda a: [torch.linalg.solve(a, a)], torch.eye(2))
    assert not any("check_errors" in str(target) for target in operations(graph))


def test_vectors_are_probed_before_a_program_asks_for_them():
    """Elsewhere: leave ``vectors_probed`` out, and programs ask by themselves, a second later."""
    probe = importlib.import_module("torch._inductor.cpu_vec_isa").valid_vec_isa_list
    probe.cache_clear()
    with compiler.vectors_probed():
        pass
    assert probe.cache_info().currsize == 1
    before = probe.cache_info().hits
    importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
    assert probe.cache_info().hits == before + 1


def test_a_loop_stays_a_loop():
    """Where ``while_loop_op`` goes: ``torch.while_loop``, if it can be traced by ``make_fx`` without Dynamo."""
    count, x = torch.tensor(3), torch.ones(2)
    graph = traced(lambda count, x: [repeated(lambda k, x, a: a * x + k, count, x, x)], count, x)
    assert torch.ops.higher_order.while_loop in operations(graph)


@pytest.mark.parametrize("name", [*compiler._EVERYWHERE, *compiler._ON_CPU, *compiler._ELSEWHERE])
def test_the_compiler_has_the_option(name):
    """Where an option goes: find what it has become, or leave it out and measure again (``docs/performance.md``)."""
    config = importlib.import_module("torch._inductor.config")
    assert name in config.get_config_copy()


def test_a_graph_is_compiled_below_autograd_and_runs_on_a_list(monkeypatch):
    """Where ``compile_fx_inner`` asks for more: ``torch._inductor.standalone_compile``, which traces twice more."""
    compiler.import_compiler()
    x, weight = torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)
    graph = traced(lambda x, y: [(x * y).mT.contiguous(), x], x, weight.detach())
    cache.keep_private(print)
    built = []
    codecache = importlib.import_module("torch._inductor.codecache")
    build = codecache._worker_compile_cpp
    monkeypatch.setattr(codecache, "_worker_compile_cpp", lambda *args: (built.append(args), build(*args))[1])
    with compiler.quiet():
        program = compiler.compile_graph(graph, "cpu")
    arguments = [x, weight.detach()]
    with torch.no_grad():
        product, same = program(arguments)
    assert torch.equal(product, torch.ones(3, 2))
    assert product.is_contiguous()
    assert torch.equal(same, x)
    assert all(isinstance(lock, str) and len(builders) in (1, 3) for lock, builders in built)


def test_what_is_found_in_the_cache_is_counted():
    """Where the counter goes: time alone tells whether a program was found; ``durations`` may then keep all."""
    assert isinstance(compiler.found_in_cache(), int)


def test_the_folders_of_the_cache_are_those_that_torch_asks_for(monkeypatch, tmp_path):
    """Where torch takes its folder from elsewhere: replace it there, in ``cache.keep_private``."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    folder = cache.keep_private(print)
    assert folder == tmp_path / "own" == cache.keep_private(print)
    codecache = importlib.import_module("torch._inductor.codecache")
    for name in ("_inductor.codecache", "_inductor.runtime.cache_dir_utils", "_inductor.runtime.runtime_utils"):
        assert importlib.import_module(f"torch.{name}").default_cache_dir() == str(folder)
    assert codecache.cache_dir() == str(folder)
    assert codecache._HEADER_DIR.startswith(str(folder))
    assert codecache._HEADER_LOCK_DIR.startswith(codecache._HEADER_DIR)


def test_quiet_hides_logs_of_the_compiler(caplog):
    """``logging.root.manager.disable`` is what ``logging.disable`` sets; it is in Python's own documentation."""
    with compiler.quiet():
        logging.getLogger("torch._inductor").warning("noise")
    assert caplog.records == []


def test_views_in_a_loop_that_writes_are_no_calls_of_torch():
    """Where ``functionalize`` makes other copies of views in loops: give them to the table in ``compiler.trace``."""

    def writes(count, x):
        return [repeated(lambda k, x, _: (x[0] + x[1:].sin().relu_()).repeat(2)[:3].clone(), count, x, ())]

    given = torch.tensor(2), torch.tensor([0.5, 1.0, -2.0])
    graph = traced(writes, *given)
    copies = {target for target in operations(graph) if "_copy" in str(target)}
    assert copies == set()
    assert torch.equal(graph(*given)[0], writes(*given)[0])
