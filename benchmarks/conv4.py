"""An outer step of MAML with convolutions, by metalit and by its peers: time, memory, and where the time goes."""

import ctypes
import gc
import importlib
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    Contender,
    DifferentWorkError,
    Missing,
    Race,
    check_same,
    markdown,
    not_installed,
    one_core,
    rounds,
    say,
    section,
)
from benchmarks.jax_step import arrays
from metalit.compiling.compiled import Compiled
from metalit.hypergradients import Unrolled
from metalit.hypergradients.base import over_tasks
from metalit.inner import SGD
from metalit.networks import Conv4
from metalit.problem import Points, Task
from metalit.problems import FewShot

TASKS, WAYS, QUERIES, WIDTH, SIZE = 4, 5, 15, 32, 28
INNER_STEPS, LR = 5, 0.01
SHOTS = (1, 5)
COMPILED, EAGER, LOOP, HIGHER, JAX = (
    "metalit, compiled",
    "metalit, not compiled",
    "torch, loop over tasks",
    "higher",
    "JAX, jitted `vmap`",
)
# in double precision; in single, a unit at a kink of ReLU falls to either side, and nobody's rounding is the right one
ROUNDING = 1e-9
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # support x and y, query x and y, each with a task dimension
Weights = dict[str, Tensor]


def drawn(shots: int) -> Batch:
    """Tasks of noisy classes."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(TASKS, WAYS, 1, SIZE, SIZE, generator=random)

    def images(count: int) -> tuple[Tensor, Tensor]:
        rows = means.repeat_interleave(count, 1)
        label = torch.arange(WAYS).repeat_interleave(count).expand(TASKS, -1).contiguous()
        return rows + torch.randn(rows.shape, generator=random), label

    return *images(shots), *images(QUERIES)


def loss_of(network: nn.Module, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return cross_entropy(functional_call(network, weights, (x,)), y)


def loop(network: nn.Module, weights: Weights, batch: Batch) -> Weights:
    """One task after the other, by ``torch.autograd.grad(create_graph=True)``, as learn2learn does."""
    start = {name: value.detach().requires_grad_() for name, value in weights.items()}
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        own = start
        for _ in range(INNER_STEPS):
            slopes = torch.autograd.grad(
                loss_of(network, own, support_x, support_y), list(own.values()), create_graph=True
            )
            own = {name: value - LR * slope for (name, value), slope in zip(own.items(), slopes, strict=True)}
        losses.append(loss_of(network, own, query_x, query_y))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))
    return dict(zip(start, found, strict=True))


def by_higher(network: nn.Module, batch: Batch) -> Weights:
    """The package ``higher``, as its README has it."""
    higher = importlib.import_module("higher")
    inner = torch.optim.SGD(network.parameters(), lr=LR)
    network.zero_grad()
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (copied, optimizer):
            for _ in range(INNER_STEPS):
                optimizer.step(cross_entropy(copied(support_x), support_y))
            (cross_entropy(copied(query_x), query_y) / TASKS).backward()
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


def by_jax(weights: Weights, batch: Batch) -> Callable[[], Any]:
    """JAX, by hand: one compiled function of all tasks."""
    jax = importlib.import_module("jax")
    np, lax = jax.numpy, jax.lax
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_x64", True)  # what is in single precision stays so

    def output(own: Any, x: Any) -> Any:
        for block in range(1, 5):
            x = lax.conv_general_dilated(
                x, own[f"conv{block}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
            x = x * own[f"norm{block}.weight"][:, None, None] + own[f"norm{block}.bias"][:, None, None]
            x = lax.reduce_window(jax.nn.relu(x), -np.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return x.reshape(len(x), -1) @ own["out.weight"].T + own["out.bias"]

    def loss(own: Any, x: Any, y: Any) -> Any:
        return -np.take_along_axis(jax.nn.log_softmax(output(own, x)), y[:, None], 1).mean()

    def task_loss(own: Any, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(INNER_STEPS):
            own = jax.tree.map(lambda value, slope: value - LR * slope, own, jax.grad(loss)(own, x, y))
        return loss(own, query_x, query_y)

    def mean_loss(own: Any, tasks: Any) -> Any:
        return jax.vmap(task_loss, (None, 0, 0, 0, 0))(own, *tasks).mean()

    step, own, tasks = jax.jit(jax.grad(mean_loss)), arrays(jax, weights), arrays(jax, batch)
    return lambda: jax.block_until_ready(step(own, tasks))


def flat(found: Any) -> Tensor:
    """A gradient as one vector, by the names of its parameters."""
    return torch.cat(
        [torch.tensor(value.tolist(), dtype=torch.float64).flatten() for _, value in sorted(found.items())]
    )


def ways_of(network: nn.Module, batch: Batch) -> tuple[dict[str, Callable[[], Any]], list[Missing]]:
    """All contenders as functions that give the outer gradient, and those that cannot run here."""
    weights = {name: value.detach().clone() for name, value in network.named_parameters()}
    problem = FewShot(network)
    step = partial(over_tasks, Unrolled(INNER_STEPS), problem, SGD(LR))
    tasks = Task(Points(*batch[:2]), Points(*batch[2:]), torch.arange(2 * TASKS).reshape(TASKS, 2))
    compiled, outer = Compiled(step, problem, tell=_heard, seconds=1200.0), {"problem": weights, "optimizer": {}}
    found = {
        COMPILED: lambda: compiled(outer, tasks).gradient["problem"],
        EAGER: lambda: step(outer, tasks).gradient["problem"],
        LOOP: lambda: loop(network, weights, batch),
    }
    missing = [Missing("learn2learn", "it cannot be installed with Python 3.11: the loop is its way")]
    if not_installed("higher"):
        missing.append(Missing(HIGHER, "higher is not installed"))
    else:
        found[HIGHER] = lambda: by_higher(network, batch)
    if not_installed("jax"):
        missing.append(Missing(JAX, "jax is not installed"))
    else:
        found[JAX] = by_jax(weights, batch)
    return found, missing


def _heard(line: str) -> None:
    """Show what is told of a compilation; one that failed would be timed uncompiled."""
    if "is not compiled" in line:
        raise DifferentWorkError(line)
    say(line)


def growth(run: Callable[[], Any]) -> str:
    """By how many MiB the process grows while it runs, at most; empty where the system does not tell."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        return ""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _kilobytes(status, "VmRSS")
    peak.write_text("5")  # the peak begins anew
    run()
    return f"{(_kilobytes(status, 'VmHWM') - before) / 1024:.0f}"


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1])


def where(run: Callable[[], Any]) -> Counter[str]:
    """Milliseconds by kind of work, of one run."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        name = event.key
        kind = "all else: norm, ReLU, pool, sums, the calls between"
        if "convolution" in name.lower():
            kind = "convolutions and their gradients"
        elif name in ("aten::mm", "aten::addmm", "aten::bmm") or "_mm_out" in name:
            kind = "matrix products"
        spent[kind] += event.self_cpu_time_total / 1e3
    return spent


def matrix_rate() -> float:
    """GFLOP/s of a plain product of the shape of a second block's convolution of all support images."""
    one, other = torch.randn(25 * 14 * 14, 9 * WIDTH), torch.randn(9 * WIDTH, WIDTH)
    best = min(_seconds(lambda: one @ other) for _ in range(20))
    return 2e-9 * one.numel() * WIDTH / best


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measured(shots: int, quick: bool) -> list[str]:
    """The tables of one number of shots."""
    torch.manual_seed(0)
    network, batch = Conv4(channels=1, size=SIZE, width=WIDTH, ways=WAYS), drawn(shots)
    exact = Conv4(channels=1, size=SIZE, width=WIDTH, ways=WAYS).double()
    exact.load_state_dict(network.state_dict())
    doubles = (batch[0].double(), batch[1], batch[2].double(), batch[3])
    expected = flat(loop(exact, dict(exact.named_parameters()), doubles))
    for name, run in ways_of(exact, doubles)[0].items():
        say(f"{WAYS}-way {shots}-shot in double precision: {name}")
        check_same(name, flat(run()), expected, ROUNDING)
    ways, missing = ways_of(network, batch)
    took = {}
    for name, run in ways.items():
        say(f"{WAYS}-way {shots}-shot: {name}")
        begun = time.perf_counter()
        run()
        took[name] = time.perf_counter() - begun
    memory = {name: growth(run) for name, run in ways.items()}
    race = Race([Contender(name, partial(_often, run)) for name, run in ways.items()], 0.1 if quick else 1.0)
    race.run(rounds(quick))
    asked = [
        [f"{other} ÷ {COMPILED}", f"{race.ratio(other, COMPILED):.3g}", bar]
        for other, bar in ((JAX, "1 or more"), (LOOP, "2 or more"))
        if other in ways
    ]
    first = [[name, f"{took[name]:.0f}", memory[name]] for name in ways]
    return [
        f"### {WAYS}-way {shots}-shot",
        markdown(["", "ratio", "asked"], asked),
        race.table(list(ways), {"÷ metalit, compiled": COMPILED, "÷ loop": LOOP}, missing, "outer step"),
        markdown(
            ["", "first step, compiled or from the cache, s", "memory of a step beside what lives on, MiB"], first
        ),
        _profile(ways),
    ]


def _often(run: Callable[[], Any], steps: int) -> None:
    for _ in range(steps):
        run()


def _profile(ways: dict[str, Callable[[], Any]]) -> str:
    with FlopCounterMode(display=False) as counted:
        ways[LOOP]()
    columns = {name: where(ways[name]) for name in (COMPILED, LOOP)}
    kinds = sorted({kind for column in columns.values() for kind in column})
    rows = [[kind, *(f"{column[kind]:.1f}" for column in columns.values())] for kind in kinds]
    products = [
        sum(spent for kind, spent in column.items() if not kind.startswith("all else")) for column in columns.values()
    ]
    rates = [f"{counted.get_total_flops() / 1e6 / each:.0f}" for each in products]
    rows.append(["GFLOP/s of convolutions and products", *rates])
    rows.append(["GFLOP/s of a plain product of torch", *[f"{matrix_rate():.0f}"] * len(columns)])
    return markdown(["ms of one step", *columns], rows)


def run(quick: bool) -> str:
    """Measure 1 and 5 shots."""
    one_core()
    kernels: Sequence[str] = ("cpp.enable_kernel_profile",)  # so that the profile tells kernels apart
    with importlib.import_module("torch._inductor.config").patch(dict.fromkeys(kernels, True)):
        parts = [part for shots in SHOTS for part in measured(shots, quick)]
    about = (
        f"The outer gradient of MAML, second order, in single precision, on one thread: {TASKS} tasks, {QUERIES} "
        f"queries of each class, {INNER_STEPS} inner steps of SGD, Conv4 of {WIDTH} filters on {SIZE}×{SIZE} pixels, "
        "BatchNorm with the batch's statistics in both levels. In double precision, every gradient is that of the loop "
        f"to {ROUNDING:g} of the largest entry."
    )
    return section("conv4: an outer step of MAML with convolutions", about, *parts)
