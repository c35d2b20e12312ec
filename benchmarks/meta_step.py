"""An outer step of MAML on sine curves, by metalit and by its peers, in and out of ``metalit fit``."""

import importlib
import io
import statistics
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import mse_loss
from torch.utils._pytree import tree_map

from benchmarks.harness import (
    Contender,
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
from benchmarks.jax_step import arrays, initial, outer_step
from metalit.cli.command_line import MetalitCLI
from metalit.compiling.compiled import Compiled
from metalit.hypergradients import Unrolled
from metalit.hypergradients.base import over_tasks
from metalit.inner import SGD
from metalit.problem import Task
from metalit.problems import FewShot
from metalit.tree import leaves

INNER_STEPS = (1, 5)
BATCHES = 100  # different batches of tasks; the contenders go round them
WARM_UP = 2  # intervals between logs, before a fit is timed
CHECKED = (1, 5)  # after so many outer steps everybody is compared, before anything is timed
# in single precision a point of a task that lies at a kink of ReLU falls to either side: after 50 steps the loop over
# tasks is 4e-4 from itself in double precision, and JAX 3e-3
DRIFT = 1e-2
LR, META_LR = 0.01, 1e-3  # of the inner steps, and of Adam
FIT, FUSED, JAX, SCAN, LOOP, COMPILED = (
    "`metalit fit`",
    "`metalit fit`, `fused_steps: 100`",
    "JAX, jitted step",
    "JAX, 100 steps in one `lax.scan`",
    "torch, loop over tasks",
    "metalit, compiled step alone",
)


class Work:
    """What everybody starts from: a network's initial weights, the batches of tasks, the number of inner steps."""

    def __init__(self, network: nn.Module, batches: Sequence[Task], inner_steps: int) -> None:
        self.network = deepcopy(network)
        self.batches = batches
        self.inner_steps = inner_steps


class Learner(ABC):
    """Takes outer steps from the initial weights, one batch after the other; Adam outside."""

    name: str
    package: str = "torch"

    def __init__(self, work: Work) -> None:
        self.work = work
        self.network = deepcopy(work.network)
        self.parameters = dict(self.network.named_parameters())
        self.adam = torch.optim.Adam(self.parameters.values(), lr=META_LR, fused=True)
        self.number = count()

    @abstractmethod
    def differentiate(self, tasks: Task) -> None:
        """Write the gradient of the mean query loss to the parameters."""

    def advance(self, steps: int) -> None:
        """Take outer steps."""
        for _ in range(steps):
            self.differentiate(self.work.batches[next(self.number) % BATCHES])
            self.adam.step()

    def moments(self) -> Tensor:
        """Adam's first moments: after one step a tenth of the gradient, after several a mean of their gradients."""
        return first_moments(self.adam, self.parameters.values())

    def write(self, gradients: Sequence[Tensor]) -> None:
        """Take these for the gradient."""
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient


class Loop(Learner):
    """One task after the other, by autograd."""

    name = LOOP

    def loss(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The mean squared error."""
        return mse_loss(functional_call(self.network, weights, x), y)

    def differentiate(self, tasks: Task) -> None:
        losses = []
        for support_x, support_y, query_x, query_y in zip(*tasks.support[:2], *tasks.query[:2], strict=True):
            weights = self.parameters
            for _ in range(self.work.inner_steps):
                loss = self.loss(weights, support_x, support_y)
                slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {name: w - LR * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
            losses.append(self.loss(weights, query_x, query_y))
        self.write(torch.autograd.grad(torch.stack(losses).mean(), list(self.parameters.values())))


class Vmap(Loop):
    """All tasks at once, by hand."""

    name = "torch, `vmap` by hand"

    def differentiate(self, tasks: Task) -> None:
        def task_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            for _ in range(self.work.inner_steps):
                slopes = grad(self.loss)(weights, x, y)
                weights = {name: weights[name] - LR * slopes[name] for name in weights}
            return self.loss(weights, query_x, query_y)

        def mean_loss(weights: dict[str, Tensor]) -> Tensor:
            return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(weights, *tasks.support[:2], *tasks.query[:2]).mean()

        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        gradients, _ = grad_and_value(mean_loss)(weights)
        self.write(list(gradients.values()))


class Higher(Learner):
    """The package ``higher``, as its README has it."""

    name = "higher"
    package = "higher"

    def differentiate(self, tasks: Task) -> None:
        higher = importlib.import_module("higher")
        inner = torch.optim.SGD(self.network.parameters(), lr=LR)
        self.adam.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*tasks.support[:2], *tasks.query[:2], strict=True):
            with higher.innerloop_ctx(self.network, inner, copy_initial_weights=False) as (network, optimizer):
                for _ in range(self.work.inner_steps):
                    optimizer.step(mse_loss(network(support_x), support_y))
                (mse_loss(network(query_x), query_y) / len(tasks.key)).backward()


class TorchOpt(Learner):
    """The package TorchOpt, as its example of MAML has it."""

    name = "TorchOpt"
    package = "torchopt"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.torchopt = importlib.import_module("torchopt")
        self.inner = self.torchopt.MetaSGD(self.network, lr=LR)

    def differentiate(self, tasks: Task) -> None:
        keep, put_back = self.torchopt.extract_state_dict, self.torchopt.recover_state_dict
        kept = [(part, keep(part, by="reference")) for part in (self.network, self.inner)]
        losses = []
        for support_x, support_y, query_x, query_y in zip(*tasks.support[:2], *tasks.query[:2], strict=True):
            for _ in range(self.work.inner_steps):
                self.inner.step(mse_loss(self.network(support_x), support_y))
            losses.append(mse_loss(self.network(query_x), query_y))
            for part, state in kept:
                put_back(part, state)
        self.adam.zero_grad()
        torch.stack(losses).mean().backward()


class Eager(Learner):
    """metalit's step as a function that is not compiled."""

    name = "metalit, step not compiled"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.problem = FewShot(self.network)
        self.step: Callable[..., Any] = partial(over_tasks, Unrolled(work.inner_steps), self.problem, SGD(LR))

    def differentiate(self, tasks: Task) -> None:
        own = {name: parameter.detach() for name, parameter in self.parameters.items()}
        estimate = self.step({"problem": own, "optimizer": {}}, tasks)
        self.write(list(estimate.gradient["problem"].values()))


class CompiledStep(Eager):
    """metalit's step as ``fit`` compiles it, without anything of ``fit``."""

    name = COMPILED

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.step = Compiled(self.step, self.problem, tell=say)


class Jax(Learner):
    """JAX, by hand: everything between two batches in one compiled function."""

    name = JAX
    package = "jax"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        jax = importlib.import_module("jax")
        np = jax.numpy
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # faster here: there is one core, and no other thread

        def output(weights: list[Any], x: Any) -> Any:
            for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
                x = jax.nn.relu(x @ weight + bias)
            return x @ weights[-2] + weights[-1]

        def loss(weights: list[Any], x: Any, y: Any) -> Any:
            return np.mean((output(weights, x) - y) ** 2)

        def task_loss(weights: list[Any], x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
            for _ in range(work.inner_steps):
                weights = [w - LR * slope for w, slope in zip(weights, jax.grad(loss)(weights, x, y), strict=True)]
            return loss(weights, query_x, query_y)

        def mean_loss(weights: list[Any], tasks: Sequence[Any], number: Any) -> Any:
            return np.mean(jax.vmap(task_loss, (None, 0, 0, 0, 0))(weights, *tasks))

        weights = [
            np.array(value.detach().mT.numpy() if value.dim() == 2 else value.detach().numpy())
            for value in self.parameters.values()
        ]
        self.state = initial(jax, weights)
        self.batches = [arrays(jax, (*tasks.support[:2], *tasks.query[:2])) for tasks in work.batches]
        self.jax, self.plain = jax, outer_step(jax, mean_loss, [META_LR] * len(weights))
        self.step = jax.jit(self.plain)

    def differentiate(self, tasks: Task) -> None:
        raise NotImplementedError("the compiled function does it, and steps too")

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batches[next(self.number) % BATCHES])
        self.jax.block_until_ready(self.state)

    def moments(self) -> Tensor:
        return torch.cat([torch.tensor(self.jax.numpy.asarray(value.T).tolist()).flatten() for value in self.state[1]])


class JaxScan(Jax):
    """JAX with the loop over outer steps compiled too."""

    name = SCAN

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.scan = self.jax.jit(partial(self.jax.lax.scan, self.plain))
        self.stacked = self._stack(self.batches)

    def advance(self, steps: int) -> None:
        if steps % BATCHES:  # the check alone
            first = next(self.number)
            for _ in range(steps - 1):
                next(self.number)
            self.state, _ = self.scan(self.state, self._stack(self.batches[first : first + steps]))
        for _ in range(steps // BATCHES):
            self.state, _ = self.scan(self.state, self.stacked)
        self.jax.block_until_ready(self.state)

    def _stack(self, batches: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(self.jax.numpy.stack, zip(*batches, strict=True)))


LEARNERS = (JaxScan, Jax, CompiledStep, Eager, Vmap, Loop, TorchOpt, Higher)
BARS = (Jax, CompiledStep, Loop)  # whom a fit is compared with by a ratio that is asked


def first_moments(adam: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """Adam's first moments of all parameters, flat."""
    return torch.cat([adam.state[parameter]["exp_avg"].detach().flatten() for parameter in parameters])


class Reference:
    """Adam's first moments after any number of steps, by the loop over tasks in double precision."""

    def __init__(self, work: Work) -> None:
        batches = [cast(tasks, torch.float64) for tasks in work.batches]
        self.learner = Loop(Work(deepcopy(work.network).double(), batches, work.inner_steps))
        self.found: list[Tensor] = []

    def after(self, steps: int) -> Tensor:
        """Those after so many steps."""
        while len(self.found) < steps:
            self.learner.advance(1)
            self.found.append(self.learner.moments())
        return self.found[steps - 1]


def contenders(
    work: Work, reference: Reference, kinds: Sequence[type[Learner]]
) -> tuple[list[Contender], list[Missing]]:
    """All but the fit, each of which was seen to compute what is expected."""
    found, missing = [], []
    for kind in kinds:
        if not_installed(kind.package):
            missing.append(Missing(kind.name, f"{kind.package} is not installed"))
            continue
        learner, taken = kind(work), 0
        for steps in CHECKED:
            learner.advance(steps - taken)
            check_same(kind.name, learner.moments(), reference.after(steps))
            taken = steps
        if isinstance(learner, CompiledStep) and learner.step.failed:
            missing.append(Missing(kind.name, "it cannot be compiled here"))
            continue
        found.append(Contender(kind.name, learner.advance, BATCHES if kind is JaxScan else 1))
    return found, missing


class Windows(Callback):
    """Lets a fit drive the rounds: after each window of its steps it waits while every other contender takes its turn.

    What a window measures is all that happens between two steps: drawing tasks, every hook, logging, the progress bar.
    Validations, with the pictures and checkpoints that come with them, are timed apart.

    Args:
        name: what the fit is called in the table.
        inner_steps: how many it takes.
        kinds: the other contenders.
        count: how many windows there are.
        seconds: how long a window is, and the burst of every other contender.
    """

    def __init__(self, name: str, inner_steps: int, kinds: Sequence[type[Learner]], count: int, seconds: float) -> None:
        self.name = name
        self.inner_steps = inner_steps
        self.kinds = kinds
        self.count = count
        self.seconds = seconds
        self.validated = 0.0
        self.validations: list[float] = []
        self.race: Race | None = None

    def batches(self, trainer: Trainer) -> list[Task]:
        """The tasks of the first steps, in single precision."""
        size = trainer.datamodule.episodes["train"].tasks
        drawn = cast(trainer.datamodule.draw("train", torch.arange(BATCHES * size)), torch.float32)
        return [part(drawn, slice(first, first + size)) for first in range(0, BATCHES * size, size)]

    def on_train_start(self, trainer: Trainer, learner: LightningModule) -> None:
        """Get everybody ready, from the fit's own weights and tasks."""
        work = Work(learner.problem.network, self.batches(trainer), self.inner_steps)
        self.reference = Reference(work)
        self.checked = max(CHECKED[-1], getattr(learner, "fused_steps", 1))
        self.until = WARM_UP * trainer.log_every_n_steps
        self.others, self.missing = contenders(work, self.reference, self.kinds)

    def on_train_batch_end(self, trainer: Trainer, learner: LightningModule, *_: Any) -> None:
        """Check the first steps, choose the length of a window, then time windows."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step <= min(BATCHES, self.checked):
            trained = [value for _, value in leaves(learner.outer())]
            own = first_moments(learner.optimizers(use_pl_optimizer=False), trained)
            check_same(self.name, own, self.reference.after(step), 1e-4 if step <= CHECKED[-1] else DRIFT)
        if step < self.until:
            return
        if self.until == WARM_UP * every:
            self.until += WARM_UP * every
        elif self.race is None:
            window = every * max(1, round(self.seconds / (self._taken(step) * every)))
            self.race = Race(self.others, self.seconds)
            self.validations.clear()
            self.window, self.until = window, step + window
        else:
            self.race.round({self.name: 1e3 * self._taken(step)})
            trainer.should_stop = len(self.race.milliseconds[self.name]) >= self.count
            self.until += self.window
        self._start(step)

    def on_validation_start(self, trainer: Trainer, learner: LightningModule) -> None:
        """Start the other clock."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, learner: LightningModule) -> None:
        """What a validation took is not the steps'."""
        taken = time.perf_counter() - self.validation_began
        self.validated += taken
        self.validations.append(taken)

    def _start(self, step: int) -> None:
        self.first, self.validated, self.began = step, 0.0, time.perf_counter()

    def _taken(self, step: int) -> float:
        return (time.perf_counter() - self.began - self.validated) / (step - self.first)


class WindowedCLI(MetalitCLI):
    """The command line, with one callback more, after all others."""

    def __init__(self, args: Sequence[str], windows: Windows) -> None:
        self._windows = windows
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer as ever."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self._windows)
        return trainer


class Terminal(io.StringIO):
    """Takes what a terminal would show, so that the fit draws its progress bar."""

    def isatty(self) -> bool:
        """It says so."""
        return True


def fit(windows: Windows, config: Path, options: Sequence[str]) -> Race:
    """Run ``metalit fit`` with everything on as shipped, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(Terminal()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
        WindowedCLI(["fit", f"--config={config}", *options, f"--trainer.default_root_dir={folder}"], windows)
    assert windows.race is not None
    return windows.race


def run(quick: bool) -> str:
    """Measure, for each number of inner steps."""
    one_core()
    parts = []
    for inner_steps in INNER_STEPS:
        asked, tables = [], []
        for name, kinds, options in ((FIT, LEARNERS, []), (FUSED, BARS, ["--model.fused_steps=100"])):
            say(f"{inner_steps} inner step(s): {name}")
            windows = Windows(name, inner_steps, kinds, rounds(quick), seconds=0.1 if quick else 0.5)
            steps = f"--model.hypergradient.steps={inner_steps}"
            race = fit(windows, Path(__file__).with_suffix(".yaml"), [steps, *options])
            asked += [[name, *cells] for cells in _asked(race, name)]
            names = [name, *(contender.name for contender in windows.others)]
            heads = {"÷ fit": name, "÷ JAX, jitted": JAX, "÷ compiled alone": COMPILED}
            tables += [race.table(names, heads, windows.missing, "outer step"), _validation(windows)]
        asked_table = markdown(["", "ratio", "measured", "asked"], asked)
        parts += [f"### {inner_steps} inner step{'s' * (inner_steps > 1)}", asked_table, *tables]
    about = (
        "One outer step of MAML, second order, in single precision: 25 sine tasks of 10 support and 10 query points, "
        "the network 1-40-40-1, inner steps of size 0.01, Adam outside. `metalit fit` is the command, compiled, with "
        "logging, checkpoints and progress bar as shipped; it stops after each window of steps while the others take "
        "their turns, all on one core, from the same initial weights and with the same tasks, and Adam's first moments "
        "after 1 and after 5 steps are those of a loop in double precision, to 1e-4 of the largest (fused, after "
        "100, to 1e-2)."
    )
    return section("meta_step: an outer step of MAML", about, *parts)


def _asked(race: Race, name: str) -> list[list[str]]:
    ratios = (
        ("JAX's jitted step ÷ fit", JAX, name, "1 or more"),
        ("the loop over tasks ÷ fit", LOOP, name, "30 or more"),
        ("fit ÷ its own compiled step alone", name, COMPILED, "1.5 or less"),
    )
    ran = race.milliseconds.keys()
    return [[text, f"{race.ratio(one, other):.3g}", bar] for text, one, other, bar in ratios if {one, other} <= ran]


def _validation(windows: Windows) -> str:
    if not windows.validations:
        return ""
    taken = statistics.median(windows.validations)
    return (
        f"Besides, a validation of the fit takes {1e3 * taken:.0f} ms, with its pictures and checkpoints (not in the "
        f"figures above); there are 20 in the 20,000 steps, {1e3 * taken / 1000:.2g} ms for each step."
    )


def cast(tasks: Task, dtype: torch.dtype) -> Task:
    """Tasks of another type."""
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tasks
    )


def part(tasks: Task, which: slice) -> Task:
    """Some of the tasks."""
    return tree_map(lambda leaf: leaf[which].contiguous() if isinstance(leaf, Tensor) else leaf, tasks)
