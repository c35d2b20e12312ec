"""The stages of the benchmark of a GPU, each run as ``python -m benchmarks.gpu_stages NAME FILE``."""

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

Found = dict[str, Any]
SIZES = {"few": [1, 40, 40, 1], "large": [1, 4096, 4096, 4096, 1]}


class Run:
    """How a stage is run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        quick: tiny sizes.
        warm: compile, and measure nothing.
        add: takes one more result, and writes it.
    """

    def __init__(self, device: str, quick: bool, warm: bool, file: Path) -> None:
        self.device = device
        self.quick = quick
        self.warm = warm
        self.file = file
        self.found: Found = {"rows": []}

    def add(self, **row: Any) -> None:
        """Write one more row."""
        self.found["rows"].append(row)
        self.write()

    def note(self, **values: Any) -> None:
        """Write what holds for all rows."""
        self.found.update(values)
        self.write()

    def write(self) -> None:
        """Write what there is: the stage may be ended at any time."""
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self.file)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def seconds(self, fn: Callable[[], object], least: float = 0.3) -> float:
        """What one call takes: the median of five bursts, after a warm-up."""
        for _ in range(3):
            fn()
        self.synchronize()
        if self.quick:
            least = 0.02
        begun = time.perf_counter()
        fn()
        self.synchronize()
        count = max(1, round(least / 5 / (time.perf_counter() - begun)))
        bursts = []
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(count):
                fn()
            self.synchronize()
            bursts.append((time.perf_counter() - begun) / count)
        return sorted(bursts)[2]


# ---- the card


def card(run: Run) -> None:
    """Its name, what is installed, and its two ceilings: bytes and matrix products."""
    import torch

    from benchmarks.harness import machine

    run.note(machine=machine(), python=sys.version.split()[0], compiler=shutil.which("gcc") or shutil.which("cc"))
    run.note(triton=find_spec("triton") is not None, jax=find_spec("jax") is not None)
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        run.note(card=properties.name, memory=properties.total_memory, cuda=torch.version.cuda)
        run.note(capability=".".join(map(str, torch.cuda.get_device_capability(0))))
    bytes_, side = (2**32, 8192) if run.device == "cuda" else (2**22, 128)
    source = torch.empty(bytes_, dtype=torch.uint8, device=run.device).random_()
    target = torch.empty_like(source)
    run.note(copy=2 * bytes_ / run.seconds(partial(target.copy_, source)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=run.device, dtype=dtype) for _ in range(2))
        run.note(
            **{f"product, {str(dtype).removeprefix('torch.')}": 2 * side**3 / run.seconds(partial(torch.matmul, a, b))}
        )


# ---- fits of small networks: launches, and how busy the card is


def small(run: Run, compiled: bool) -> None:
    """MAML on sine curves, 10 + 10 points, second order, one inner step, under the Trainer."""
    drawn, lying = ((4,), (8,)) if run.quick else ((25, 1000), (1000, 20000))
    for count in drawn:
        for fused in (1,) if run.warm or run.quick else (1, 100):
            learner = maml(SIZES["few"], compiled, fused)
            found = timed_fit(run, learner, sine(count, 10), block=64)
            if found is not None:
                run.add(tasks=count, drawn=True, compiled=compiled, fused_steps=fused, **found)
    for count in lying:
        found = timed_fit(run, maml(SIZES["few"], compiled), Same(there(run.device, sine(count, 10), count)))
        if found is not None:
            run.add(tasks=count, drawn=False, compiled=compiled, fused_steps=1, **found)


def maml(sizes: list[int], compiled: bool, fused: int = 1) -> Any:
    """A learner with one inner step."""
    import torch

    from metalit.hypergradients import Unrolled
    from metalit.inner import SGD
    from metalit.modules import MetaLearner
    from metalit.networks import MLP
    from metalit.problems import FewShot

    torch.manual_seed(0)
    return MetaLearner(FewShot(MLP(sizes)), SGD(0.01), Unrolled(1), compile=compiled, fused_steps=fused)


def sine(count: int, rows: int) -> Any:
    """So many sine curves for each step."""
    from metalit.data import Episodes, Sine, TaskDataModule

    few = Episodes(2, rows, rows)
    return TaskDataModule(Sine(), Episodes(count, rows, rows), few, few)


class Same:
    """A loader that gives one batch again and again."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 10**5

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.batch, len(self))


def there(device: str, data: Any, count: int, first: int = 0) -> Any:
    """Tasks in single precision that lie on the device."""
    import torch

    data.setup("fit")
    return moved_to(device, data.draw("train", torch.arange(first, first + count)))


def moved_to(device: str, tree: Any) -> Any:
    """The tensors of a tree on a device, real numbers in single precision."""
    import torch
    from torch.utils._pytree import tree_map

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, torch.float32 if leaf.is_floating_point() else None)

    return tree_map(moved, tree)


def timed_fit(run: Run, learner: Any, data: Any, precision: str = "32-true", block: int = 1) -> Found | None:
    """Fit until the clock has seen enough; None where it was only to compile."""
    import torch
    from lightning.pytorch import Trainer

    from benchmarks.gpu_clock import Clock, told

    if run.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(run.device, seconds=0.05 if run.quick else 1.0, block=1 if run.quick else block, only_once=run.warm)
    trainer = Trainer(
        accelerator="gpu" if run.device == "cuda" else "cpu", devices=1, precision=precision, callbacks=[clock],
        max_steps=10**7, max_epochs=-1, limit_val_batches=0, log_every_n_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with told() as lines:
        trainer.fit(learner, data)
    if run.warm:
        return None
    found = {**clock.found(), "told": [line for line in lines if "compil" in line or "memory" in line]}
    if run.device == "cuda":
        found["peak bytes"] = torch.cuda.max_memory_allocated()
    return found


# ---- the step alone: CUDA graphs, and JAX


def alone(run: Run, inner_steps: int) -> None:
    """The outer step of 25 tasks without a Trainer: as it stands, compiled, JAX's, and in a CUDA graph."""
    from benchmarks import meta_step

    work, on_device = works(run, inner_steps)
    kinds = {"as it stands": meta_step.Eager, "compiled": meta_step.CompiledStep}
    if run.warm:
        meta_step.CompiledStep(on_device).advance(1)
        return
    reference = meta_step.Reference(work).after(5)
    peers = {"JAX, jitted step": meta_step.Jax, "JAX, 100 steps in a scan": meta_step.JaxScan}
    for name, kind in {**kinds, **(peers if with_jax(run) else {})}.items():
        learner = kind(work if name in peers else on_device)
        learner.advance(5)
        error = apart(learner.moments(), reference)
        steps = meta_step.BATCHES if name in peers else 1  # JAX's learners wait at the end of each call
        taken = run.seconds(partial(learner.advance, steps)) / steps
        told = ["`compiled` is not compiled here"] if getattr(getattr(learner, "step", None), "failed", False) else []
        run.add(name=name, inner_steps=inner_steps, seconds=taken, error=error, told=told)
    if run.device == "cuda":  # last: a capture that fails may leave the device in a bad state
        for name, kind in kinds.items():
            try:
                row = graphed(run, partial(kind, on_device))
            except Exception as error:  # whatever cannot be captured
                row = {"failed": str(error).splitlines()[0]}
            run.add(name=f"{name}, CUDA graph", inner_steps=inner_steps, **row)


def with_jax(run: Run) -> bool:
    """Whether JAX is there; says which."""
    if find_spec("jax") is None:
        run.note(jax="not installed, so there is no row of it")
        return False
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # torch takes no TF32 by default either
    run.note(jax=f"{jax.__version__} on {jax.devices()[0].platform}")
    return True


def works(run: Run, inner_steps: int) -> tuple[Any, Any]:
    """The work of the benchmark meta_step, on the CPU and on the device."""
    import torch

    from benchmarks.meta_step import BATCHES, Work
    from metalit.networks import MLP

    torch.manual_seed(0)
    network = MLP(SIZES["few"])
    batches = [there("cpu", sine(25, 10), 25, 25 * number) for number in range(BATCHES)]
    on_device = Work(network, [moved_to(run.device, tasks) for tasks in batches], inner_steps)
    on_device.network.to(run.device)
    return Work(network, batches, inner_steps), on_device


def graphed(run: Run, make: Callable[[], Any]) -> Found:
    """A whole outer step on tasks that lie still, Adam's included, as one CUDA graph: its time, and its error."""
    import torch

    plain, learner = make(), make()
    tasks = learner.work.batches[0]
    for each in (plain, learner):
        each.adam = torch.optim.Adam(each.parameters.values(), lr=1e-3, capturable=True)

    def step(each: Any) -> None:
        each.differentiate(tasks)
        each.adam.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(learner)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(learner)
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        step(plain)
    error = apart(learner.moments(), plain.moments())
    return {"seconds": run.seconds(graph.replay), "error": error}


def apart(found: Any, expected: Any) -> float:
    """The largest difference as a share of the largest entry."""
    found, expected = found.detach().cpu().double(), expected.cpu().double()
    return float((found - expected).abs().max() / expected.abs().max())


# ---- large networks: the share of the card's matrix rate


def large(run: Run, compiled: bool) -> None:
    """MAML with three layers of 4096, in bf16-mixed and in single precision."""
    sizes = [1, 64, 64, 1] if run.quick else SIZES["large"]
    count, rows = (2, 8) if run.quick else (4, 2048)
    operations = 0 if run.warm else flops(sizes, count, rows)
    for precision in ("bf16-mixed", "32-true"):
        found = timed_fit(run, maml(sizes, compiled), sine(count, rows), precision)
        if found is not None:
            rate = 1e3 * operations / found["ms per step"]
            run.add(
                what=f"MAML, {count} tasks of {rows} + {rows} rows", precision=precision, compiled=compiled, rate=rate,
                **found,
            )  # fmt: skip


def flops(sizes: list[int], count: int, rows: int) -> int:
    """The operations of the matrix products of an outer step with one inner step, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.meta_step import Eager, Work
    from metalit.networks import MLP
    from metalit.problem import Points, Task

    # the count is a multiple of tasks and rows: counted where they are few
    points = Points(torch.zeros(2, 8, 1), torch.zeros(2, 8, 1))
    learner = Eager(Work(MLP(sizes), [], 1))
    with FlopCounterMode(display=False) as counter:
        learner.differentiate(Task(points, points, torch.arange(2)))
    return counter.get_total_flops() * count * rows // 16


def supervised(run: Run) -> None:
    """Plain training of three layers of 4096, many rows at once."""
    import torch

    from metalit.modules import SupervisedLearner
    from metalit.networks import MLP

    sizes, rows = ([64, 64, 1], 16) if run.quick else ([4096, 4096, 4096, 4096], 16384)
    for precision in ("bf16-mixed", "32-true"):
        torch.manual_seed(0)
        x, y = (torch.randn(rows, width, device=run.device) for width in (sizes[0], sizes[-1]))
        learner = SupervisedLearner(MLP(sizes))
        found = timed_fit(run, learner, Same((x, y)), precision)
        products = sum(a * b for a, b in pairwise(sizes))
        operations = 2 * rows * (3 * products - sizes[0] * sizes[1])  # no gradient goes to the inputs
        rate = 1e3 * operations / found["ms per step"]
        run.add(what=f"supervised, {rows} rows", precision=precision, compiled=False, rate=rate, **found)


# ---- all of them


class Measured(NamedTuple):
    """A stage, the seconds that it may take, and whether it compiles something."""

    fn: Callable[[Run], None]
    seconds: float
    compiles: bool = False


STAGES = {
    "card": Measured(card, 40),
    "small": Measured(partial(small, compiled=False), 70),
    "small, compiled": Measured(partial(small, compiled=True), 70, compiles=True),
    "step alone": Measured(partial(alone, inner_steps=1), 60, compiles=True),
    "step alone, 5 inner steps": Measured(partial(alone, inner_steps=5), 90, compiles=True),
    "large": Measured(partial(large, compiled=False), 50),
    "large, compiled": Measured(partial(large, compiled=True), 50, compiles=True),
    "supervised": Measured(supervised, 40),
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_stages")
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--warm", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    stage = Run(given.device, given.quick, given.warm, given.file)
    warnings.simplefilter("ignore")
    STAGES[given.name].fn(stage)
