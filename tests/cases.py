"""The closed forms that problems, inner optimisers and hypergradients are held to, all in float64.

One row of ``CASES`` is one algorithm: what it is made of, tasks, and its exact answer. A new algorithm adds a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import matrix_power
from torch.utils._pytree import tree_map as pytree_map

from metalit.adapt import Outer, outer_variable
from metalit.hypergradients import Estimate, FirstOrder, Hypergradient, Unrolled
from metalit.inner import SGD, InnerOptimizer, MetaSGD
from metalit.problem import Points, Problem, Task
from metalit.problems import FewShot
from metalit.tree import Tree, flatten, tree_map


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64 that no other test disturbs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_at(tasks: Any, index: int) -> Any:
    """One task of a batch."""
    return pytree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tasks)


class QuadraticTask(NamedTuple):
    A: Tensor
    c: Tensor


class Quadratic(Problem):
    """½(θ − c)ᵀA(θ − c) as inner and as outer loss; the outer variable is the initialisation."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def init(self, outer: dict[str, Tensor], task: QuadraticTask) -> Tree:
        return dict(outer)

    def inner_loss(self, inner: Tree, outer: dict[str, Tensor], task: QuadraticTask, step: int) -> Tensor:
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner: Tree, outer: dict[str, Tensor], task: QuadraticTask) -> Tensor:
        offset = inner["theta"] - task.c
        return 0.5 * offset @ task.A @ offset


class Seed(Problem):
    """f(θ, φ) = (θᵀθ)(φᵀφ), the example of the seed notebook; a task is the θ₀ from which θ starts."""

    def __init__(self, phi: Tensor) -> None:
        super().__init__()
        self.phi = nn.Parameter(phi)

    def init(self, outer: dict[str, Tensor], task: Tensor) -> Tree:
        return task

    def inner_loss(self, inner: Tree, outer: dict[str, Tensor], task: Tensor, step: int) -> Tensor:
        return self.outer_loss(inner, outer, task)

    def outer_loss(self, inner: Tree, outer: dict[str, Tensor], task: Tensor) -> Tensor:
        return (inner @ inner) * (outer["phi"] @ outer["phi"])


@dataclass(frozen=True)
class Case:
    """One algorithm on a batch of tasks; ``answer(case, task)`` is its :class:`Estimate` in closed form."""

    name: str
    problem: Problem
    optimizer: InnerOptimizer
    hypergradient: Hypergradient
    tasks: Any
    answer: Callable[["Case", Any], Estimate]

    @property
    def outer(self) -> Outer:
        """The outer variable, with unequal values where the optimiser starts them all from one number."""
        outer = outer_variable(self.problem, self.optimizer, task_at(self.tasks, 0))
        unequal = tree_map(lambda value: value * (1 + 0.1 * draw(*value.shape).abs()), outer["optimizer"])
        return pytree_map(Tensor.detach, {"problem": outer["problem"], "optimizer": unequal})

    @property
    def steps(self) -> int:
        return self.hypergradient.steps

    @property
    def weights(self) -> Sequence[float]:
        """How much the loss after each step counts, from step 1."""
        weights = getattr(self.hypergradient, "weights", None)
        return weights or [0.0] * (self.steps - 1) + [1.0]

    def estimate(self, task: Any, outer: Outer | None = None, start: Tree | None = None) -> Estimate:
        outer = self.outer if outer is None else outer
        return self.hypergradient(self.problem, self.optimizer, outer, task, start)


def maml(A: Tensor, lr: float, steps: int) -> Tensor:
    """B of MAML's gradient B(θ − c) on a quadratic."""
    M = torch.eye(len(A), dtype=A.dtype) - lr * A
    return matrix_power(M, steps) @ A @ matrix_power(M, steps)


def fomaml(A: Tensor, lr: float, steps: int) -> Tensor:
    """B of FOMAML's gradient B(θ − c) on a quadratic."""
    return A @ matrix_power(torch.eye(len(A), dtype=A.dtype) - lr * A, steps)


def quadratic(case: Case, task: QuadraticTask) -> Estimate:
    """B(θ − c) for inner steps of one size."""
    A, lr = task.A, case.optimizer.lr
    M = torch.eye(len(A), dtype=A.dtype) - lr * A
    offset = case.outer["problem"]["theta"] - task.c
    after = [matrix_power(M, step) @ offset for step in range(1, case.steps + 1)]
    if isinstance(case.hypergradient, FirstOrder):
        B = fomaml(A, lr, case.steps)
    else:
        B = sum(weight * maml(A, lr, step) for step, weight in enumerate(case.weights, 1))
    loss = sum(weight * 0.5 * x @ A @ x for weight, x in zip(case.weights, after, strict=True))
    gradient = {"problem": {"theta": B @ offset}, "optimizer": {}}
    return Estimate(loss, gradient, {"theta": task.c + after[-1]})


def quadratic_meta_sgd(case: Case, task: QuadraticTask) -> Estimate:
    """∂L/∂α = −g_support ⊙ g_query(θ′) after one step, and ∂L/∂θ = (I − A diag α) g_query(θ′)."""
    A, lr = task.A, case.outer["optimizer"]["lr"]["theta"]
    offset = case.outer["problem"]["theta"] - task.c
    g_support = A @ offset
    after = offset - lr * g_support
    g_query = A @ after
    through = 0.0 if isinstance(case.hypergradient, FirstOrder) else A @ (lr * g_query)
    gradient = {"problem": {"theta": g_query - through}, "optimizer": {"lr": {"theta": -g_support * g_query}}}
    return Estimate(0.5 * after @ A @ after, gradient, {"theta": task.c + after})


def seed(case: Case, theta: Tensor) -> Estimate:
    """With s = φᵀφ and r = 1 − 2αs: θ_K = rᴷθ₀, so L = s r²ᴷ θ₀ᵀθ₀ and dL/dφ = 2φ · dL/ds."""
    phi, lr, K = case.outer["problem"]["phi"], case.optimizer.lr, case.steps
    s, square = phi @ phi, theta @ theta
    r = 1 - 2 * lr * s
    through = 0.0 if isinstance(case.hypergradient, FirstOrder) else -4 * lr * K * s * r ** (2 * K - 1)
    slope = 2 * phi * square * (r ** (2 * K) + through)
    return Estimate(s * r ** (2 * K) * square, {"problem": {"phi": slope}, "optimizer": {}}, r**K * theta)


def linear_regression(case: Case, task: Task) -> Estimate:
    """Mean squared error of ``nn.Linear``: quadratic in ψ, all weights and biases, of which some adapt.

    With ∇L_support = Aψ − b and D = diag(α), 0 where nothing adapts: ψⱼ₊₁ = Mψⱼ + Db, M = I − DA, and with q = ∇L_query
    dL/dψ₀ = Σⱼ wⱼ Mʲᵀ q(ψⱼ) and dL/dα = −Σⱼ wⱼ Σᵢ﹤ⱼ (Aψᵢ − b) ⊙ (Mʲ⁻¹⁻ⁱ)ᵀ q(ψⱼ). First order: M = I in both.
    """
    outer = case.outer
    names, shapes = list(outer["problem"]), {name: value.shape for name, value in outer["problem"].items()}
    rates = _rates(case)
    A, b, _ = _normal_equations(task.support, shapes["weight"])
    Q, d, constant = _normal_equations(task.query, shapes["weight"])
    identity = torch.eye(len(A), dtype=A.dtype)
    M = identity - rates[:, None] * A
    N = identity if isinstance(case.hypergradient, FirstOrder) else M
    path = [flatten(outer["problem"])]
    for _ in range(case.steps):
        path.append(M @ path[-1] + rates * b)
    loss, slope, slope_of_rates = torch.zeros((), dtype=A.dtype), torch.zeros_like(b), torch.zeros_like(b)
    for j, weight in enumerate(case.weights, 1):
        loss = loss + weight * (0.5 * path[j] @ Q @ path[j] - d @ path[j] + constant)
        q = weight * (Q @ path[j] - d)
        slope = slope + matrix_power(N, j).T @ q
        slope_of_rates = slope_of_rates - sum((A @ path[i] - b) * (matrix_power(N, j - 1 - i).T @ q) for i in range(j))
    adapted = case.problem.adapted

    def split(vector: Tensor, chosen: Sequence[str]) -> dict[str, Tensor]:
        pieces = vector.split([shapes[name].numel() for name in names])
        return {name: piece.view(shapes[name]) for name, piece in zip(names, pieces, strict=True) if name in chosen}

    own = {"lr": split(slope_of_rates, adapted)} if isinstance(case.optimizer, MetaSGD) else {}
    return Estimate(loss, {"problem": split(slope, names), "optimizer": own}, split(path[-1], adapted))


def _rates(case: Case) -> Tensor:
    outer, zero = case.outer, {name: torch.zeros_like(value) for name, value in case.outer["problem"].items()}
    adapted = {name: zero[name] + case.optimizer.lr for name in case.problem.adapted}
    return flatten({**zero, **outer["optimizer"].get("lr", adapted)})


def _normal_equations(points: Points, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    real = slice(None) if points.mask is None else points.mask
    x, y = points.x[real], points.y[real]
    outputs, identity = shape[0], torch.eye(shape[0], dtype=x.dtype)
    # prediction j of row i is weight[j] · x[i] + bias[j], linear in (weight, bias) laid out row by row
    Z = torch.cat([torch.kron(identity, x), torch.kron(identity, torch.ones_like(x[:, :1]))], dim=1)
    target, count = y.T.reshape(-1), len(x) * outputs
    return 2 / count * Z.T @ Z, 2 / count * Z.T @ target, target @ target / count


def quadratic_tasks(dimension: int, count: int = 3) -> QuadraticTask:
    """Tasks of unequal curvature with eigenvalues in [0.5, 2]."""
    bases = torch.linalg.qr(draw(count, dimension, dimension, seed=1)).Q
    values = 0.5 + 1.5 * torch.rand(count, dimension, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return QuadraticTask(bases @ torch.diag_embed(values) @ bases.mT, 2 * draw(count, dimension, seed=3))


def regression_tasks(inputs: int, outputs: int, ragged: bool = False, count: int = 3) -> Task:
    """Tasks with 5 support and 7 query rows of noise; ``ragged`` ones have padded rows."""

    def points(rows: int, seed: int) -> Points:
        real = torch.arange(rows) < torch.arange(rows - count, rows)[:, None]
        x, y = draw(count, rows, inputs, seed=seed), draw(count, rows, outputs, seed=seed + 1)
        return Points(x, y, real if ragged else None)

    return Task(points(5, 10), points(7, 20), torch.arange(count))


def linear(inputs: int, outputs: int) -> nn.Module:
    """A linear layer of float64 with fixed weights."""
    layer = nn.Linear(inputs, outputs).double()
    for seed_of_parameter, parameter in enumerate(layer.parameters(), 30):
        parameter.data = draw(*parameter.shape, seed=seed_of_parameter)
    return layer


def _quadratic(dimension: int) -> Quadratic:
    return Quadratic(draw(dimension, seed=4))


def _few_shot(inputs: int, outputs: int, *adapt: str) -> FewShot:
    return FewShot(linear(inputs, outputs), adapt=adapt or ("*",))


_Q1, _Q4 = quadratic_tasks(1), quadratic_tasks(4)
_R21, _R32, _RAGGED = regression_tasks(2, 1), regression_tasks(3, 2), regression_tasks(2, 1, ragged=True)
_THETAS = draw(3, 3, seed=5)
_W3 = (0.2, 0.3, 0.5)

CASES = [
    Case("MAML, quadratic in 1-d, 1 step", _quadratic(1), SGD(0.3), Unrolled(1), _Q1, quadratic),
    Case("MAML, quadratic in 1-d, 4 steps", _quadratic(1), SGD(0.2), Unrolled(4), _Q1, quadratic),
    Case("MAML, quadratic in 4-d, 1 step", _quadratic(4), SGD(0.35), Unrolled(1), _Q4, quadratic),
    Case("MAML, quadratic in 4-d, 3 steps", _quadratic(4), SGD(0.25), Unrolled(3), _Q4, quadratic),
    Case("multi-step loss, quadratic in 1-d", _quadratic(1), SGD(0.3), Unrolled(3, _W3), _Q1, quadratic),
    Case("multi-step loss, quadratic in 4-d", _quadratic(4), SGD(0.25), Unrolled(3, _W3), _Q4, quadratic),
    Case("FOMAML, quadratic in 1-d, 1 step", _quadratic(1), SGD(0.3), FirstOrder(1), _Q1, quadratic),
    Case("FOMAML, quadratic in 4-d, 3 steps", _quadratic(4), SGD(0.25), FirstOrder(3), _Q4, quadratic),
    Case("Meta-SGD, quadratic in 1-d", _quadratic(1), MetaSGD(0.3), Unrolled(1), _Q1, quadratic_meta_sgd),
    Case("Meta-SGD, quadratic in 4-d", _quadratic(4), MetaSGD(0.2), Unrolled(1), _Q4, quadratic_meta_sgd),
    Case("first-order Meta-SGD, quadratic in 4-d", _quadratic(4), MetaSGD(0.2), FirstOrder(1), _Q4, quadratic_meta_sgd),
    Case("seed example, 1 step", Seed(draw(4, seed=6)), SGD(0.03), Unrolled(1), _THETAS, seed),
    Case("seed example, 3 steps", Seed(draw(4, seed=6)), SGD(0.02), Unrolled(3), _THETAS, seed),
    Case("seed example, first order", Seed(draw(4, seed=6)), SGD(0.03), FirstOrder(2), _THETAS, seed),
    Case("MAML, regression", _few_shot(3, 2), SGD(0.1), Unrolled(3), _R32, linear_regression),
    Case("MAML, ragged regression", _few_shot(2, 1), SGD(0.15), Unrolled(2), _RAGGED, linear_regression),
    Case("multi-step loss, regression", _few_shot(3, 2), SGD(0.1), Unrolled(3, _W3), _R32, linear_regression),
    Case("FOMAML, regression", _few_shot(3, 2), SGD(0.1), FirstOrder(3), _R32, linear_regression),
    Case("ANIL, regression", _few_shot(2, 1, "bias"), SGD(0.2), Unrolled(3), _R21, linear_regression),
    Case("BOIL, regression", _few_shot(2, 1, "w*"), SGD(0.2), Unrolled(2), _R21, linear_regression),
    Case("first-order ANIL, regression", _few_shot(2, 1, "bias"), SGD(0.2), FirstOrder(3), _R21, linear_regression),
    Case("Meta-SGD, regression", _few_shot(3, 2), MetaSGD(0.1), Unrolled(3), _R32, linear_regression),
    Case("Meta-SGD, multi-step loss", _few_shot(2, 1), MetaSGD(0.1), Unrolled(3, _W3), _RAGGED, linear_regression),
    Case("Meta-SGD, head alone", _few_shot(2, 1, "bias"), MetaSGD(0.1), Unrolled(2), _R21, linear_regression),
    Case("first-order Meta-SGD, regression", _few_shot(3, 2), MetaSGD(0.1), FirstOrder(3), _R32, linear_regression),
]
