"""Outer steps of other algorithms in ``metalit fit``, each beside the same work in one jitted function of JAX."""

import importlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.harness import Contender, Missing, check_same, markdown, not_installed, one_core, rounds, say, section
from benchmarks.jax_step import arrays, initial, outer_step
from benchmarks.meta_step import BATCHES, CHECKED, DRIFT, JAX, WARM_UP, Windows, cast, fit
from metalit.hypergradients.base import over_tasks
from metalit.modules.meta import MetaLearner
from metalit.problem import Task
from metalit.tree import leaves, tree_map

CONFIGS = Path(__file__).parents[1] / "configs"
Loss = Callable[..., Any]  # of (outer variable, support x, y, query x, y, number of the outer step)


class Reference:
    """Adam's first moments after any number of steps, by the learner's hypergradient in double precision."""

    def __init__(self, learner: MetaLearner, batches: Sequence[Task], lrs: Sequence[float]) -> None:
        self.problem = deepcopy(learner.problem).double()
        self.optimizer, self.hypergradient = learner.inner_optimizer, learner.hypergradient
        self.batches = [cast(tasks, torch.float64) for tasks in batches]
        rates = tree_map(lambda value: value.detach().double().requires_grad_(), learner.outer()["optimizer"])
        self.outer = {"problem": self.problem.outer(), "optimizer": rates}
        self.parameters = [value for _, value in leaves(self.outer)]
        groups = [{"params": [value], "lr": lr} for value, lr in zip(self.parameters, lrs, strict=True)]
        self.adam = torch.optim.Adam(groups)
        self.found: list[Tensor] = []

    def after(self, steps: int) -> Tensor:
        """Those after so many steps."""
        for number in range(len(self.found), steps):
            outer, tasks = tree_map(Tensor.detach, self.outer), self.batches[number % BATCHES]
            found = over_tasks(self.hypergradient, self.problem, self.optimizer, outer, tasks, progress=number)
            for parameter, (_, gradient) in zip(self.parameters, leaves(found.gradient), strict=True):
                parameter.grad = gradient
            self.adam.step()
            self.found.append(torch.cat([self.adam.state[each]["exp_avg"].flatten() for each in self.parameters]))
        return self.found[steps - 1]


class Jax:
    """The same work by JAX: everything between two batches in one compiled function."""

    def __init__(
        self, learner: MetaLearner, batches: Sequence[Task], lrs: Sequence[float], make_loss: Callable[..., Loss]
    ) -> None:
        jax = importlib.import_module("jax")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # faster here: there is one core, and no other thread
        task_loss = make_loss(jax, learner)

        def mean_loss(outer: Any, tasks: Any, number: Any) -> Any:
            losses = jax.vmap(task_loss, (None, 0, 0, 0, 0, None))(outer, *tasks, number)
            return jax.numpy.mean(losses)

        self.names = [name for name, _ in leaves(learner.outer())]
        rates = dict(zip(self.names, lrs, strict=True))
        self.jax, self.step = jax, jax.jit(outer_step(jax, mean_loss, rates))
        self.state = initial(jax, arrays(jax, dict(leaves(learner.outer()))))
        self.batches = [arrays(jax, [*tasks.support[:2], *tasks.query[:2]]) for tasks in batches]
        self.number = count()

    def advance(self, steps: int) -> None:
        """Take outer steps."""
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batches[next(self.number) % BATCHES])
        self.jax.block_until_ready(self.state)

    def moments(self) -> Tensor:
        """Adam's first moments."""
        return torch.cat([torch.tensor(self.state[1][name].tolist()).flatten() for name in self.names])


class FamilyWindows(Windows):
    """Lets a fit of any config drive the rounds, JAX the other contender.

    Args:
        name: what the fit is called in the table.
        make_loss: makes the loss of a task in JAX.
        options: those of :class:`~benchmarks.meta_step.Windows`.
    """

    def __init__(self, name: str, make_loss: Callable[..., Loss], **options: Any) -> None:
        super().__init__(name, inner_steps=0, kinds=(), **options)
        self.make_loss = make_loss

    def on_train_start(self, trainer: Trainer, learner: LightningModule) -> None:
        """Get everybody ready, from the fit's own weights and tasks."""
        assert isinstance(learner, MetaLearner)
        batches = self.batches(trainer)
        rate_of = {id(each): group["lr"] for group in trainer.optimizers[0].param_groups for each in group["params"]}
        lrs = [rate_of[id(value)] for _, value in leaves(learner.outer())]
        self.reference = Reference(learner, batches, lrs)
        self.checked, self.until = max(CHECKED[-1], learner.fused_steps), WARM_UP * trainer.log_every_n_steps
        self.others, self.missing = [], [Missing(JAX, "jax is not installed")]
        if not_installed("jax"):
            return
        peer, taken = Jax(learner, batches, lrs, self.make_loss), 0
        for steps in CHECKED:
            peer.advance(steps - taken)
            check_same(JAX, peer.moments(), self.reference.after(steps), DRIFT)
            taken = steps
        self.others, self.missing = [Contender(JAX, peer.advance)], []


def ridge_head(jax: Any, learner: MetaLearner) -> Loss:
    """R2D2's loss: a ridge regression on learned features, solved for by Woodbury."""
    np, features = jax.numpy, _network(jax, learner.problem.network)

    def loss(outer: Any, x: Any, y: Any, query_x: Any, query_y: Any, number: Any) -> Any:
        own = _own(outer)
        phi = features(own, x)
        matrix = phi @ phi.T + np.exp(own["log_penalty"]) * np.eye(len(x))
        weight = phi.T @ jax.scipy.linalg.solve(matrix, y, assume_a="pos")
        return np.mean((features(own, query_x) @ weight - query_y) ** 2)

    return loss


def maml_plus_plus(jax: Any, learner: MetaLearner) -> Loss:
    """MAML++'s loss: a rate for each parameter and step, the loss after each step, by annealed weights."""
    np, answer, steps = jax.numpy, _network(jax, learner.problem.network), learner.hypergradient.steps
    weights = learner.hypergradient.weights
    first, last = np.array(weights.first), np.array(weights.last)

    def squares(adapted: Any, own: Any, step: int, x: Any, y: Any) -> Any:
        rows = {name: value[step] for name, value in own.items() if name.startswith("norm")}
        return np.mean((answer({**rows, **adapted}, x) - y) ** 2)

    def loss(outer: Any, x: Any, y: Any, query_x: Any, query_y: Any, number: Any) -> Any:
        own, share = _own(outer), np.minimum(number / weights.over, 1.0)
        counts, total = (1 - share) * first + share * last, 0.0
        adapted = {name: value for name, value in own.items() if not name.startswith("norm")}
        for step in range(steps):
            gradient = jax.grad(squares)(adapted, own, step, x, y)
            adapted = {
                name: value - outer[f"optimizer.lr.{name}"][step] * gradient[name] for name, value in adapted.items()
            }
            total += counts[step] * squares(adapted, own, step, query_x, query_y)
        return total

    return loss


def _own(outer: Any) -> dict[str, Any]:
    """What is of the problem, its network's parameters by their own names."""
    start = "problem."
    return {name.removeprefix(start).removeprefix("network."): outer[name] for name in outer if name.startswith(start)}


def _network(jax: Any, network: nn.Module) -> Callable[[dict[str, Any], Any], Any]:
    """An MLP of torch, as a function of its parameters."""
    functions = {nn.ReLU: jax.nn.relu, nn.Tanh: jax.numpy.tanh}

    def output(own: dict[str, Any], x: Any) -> Any:
        for name, layer in network.named_children():
            if isinstance(layer, nn.Linear):
                x = x @ own[f"{name}.weight"].T + own[f"{name}.bias"]
            elif isinstance(layer, nn.LayerNorm):
                x = (x - x.mean(-1, keepdims=True)) / jax.numpy.sqrt(x.var(-1, keepdims=True) + layer.eps)
                x = x * own[f"{name}.weight"] + own[f"{name}.bias"]
            else:
                x = functions[type(layer)](x)
        return x

    return output


RACES = {
    "sine_ridge": (ridge_head, []),
    # after 100 steps single precision is 0.26 of the largest entry from double, whoever computes it; after 50 1e-4
    "sine_mamlpp": (maml_plus_plus, ["--model.fused_steps=50", "--model.hypergradient.first_order_until=0"]),
}


def run(quick: bool) -> str:
    """Measure, for each config."""
    one_core()
    asked, tables = [], []
    for config, (make_loss, options) in RACES.items():
        name = f"`metalit fit`, `{config}`"
        say(name)
        windows = FamilyWindows(name, make_loss, count=rounds(quick), seconds=0.1 if quick else 0.5)
        race = fit(windows, CONFIGS / f"{config}.yaml", ["--model.scheduler=null", *options])
        if windows.others:
            asked.append([name, f"{race.ratio(JAX, name):.3g}", "1 or more"])
        tables.append(
            race.table(
                [name, *(each.name for each in windows.others)], {"÷ JAX, jitted": JAX}, windows.missing, "outer step"
            )
        )
    about = (
        "Outer steps as the configs have them, fused and compiled, with logging, checkpoints and progress bar as "
        "shipped, but for the schedule of the rate, and for MAML++ of second order from the first step. JAX takes the "
        "same steps by one jitted function, from the same initial values and with the same tasks. Adam's first moments "
        "of all are those of metalit in double precision, to 1e-2 of the largest, after 1 and 5 steps (fused, after "
        "the first call)."
    )
    return section(
        "family: outer steps of other algorithms",
        about,
        markdown(["", "JAX's jitted step ÷ fit", "asked"], asked),
        *tables,
    )
