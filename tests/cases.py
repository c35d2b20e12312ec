"""The table of cases: every problem, inner optimiser and hypergradient, in float64, beside its answer by hand.

A new algorithm adds an entry to ``PROBLEMS``, ``ESTIMATORS`` or ``OPTIMIZERS``; a problem its derivatives by hand to
``derivatives.py``, an estimator its linear algebra to ``references.py``, an inner optimiser its step to ``rules.py``.
The rows of ``CASES`` are the pairs of them that are valid. Which ones are not is said here too, by hand.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from derivatives import (
    Derivatives,
    OfBayesianHead,
    OfBowl,
    OfClassifier,
    OfCleaning,
    OfLogistic,
    OfLowRank,
    OfMatching,
    OfNeuralProcess,
    OfProtoMAML,
    OfPrototypes,
    OfRegression,
    OfRidge,
    OfRidgeClasses,
    OfRidgeHead,
    OfThetaPhi,
)
from references import reference
from torch import Tensor, nn
from torch.utils._pytree import tree_map as pytree_map

from metalit.adapt import Outer, outer_variable
from metalit.hypergradients import (
    F2SA,
    Direct,
    Estimate,
    FiniteDifference,
    FirstOrder,
    Hypergradient,
    Implicit,
    JTg,
    Recomputed,
    Reptile,
    Truncated,
    Unrolled,
)
from metalit.inner import ALFA, SGD, Adam, AdamW, InnerOptimizer, Learned, MetaCurvature, MetaSGD, Newton, RMSprop
from metalit.linsolve import CG, Dense, Neumann, NormalCG, Nystrom
from metalit.problem import Matrix, Points, Problem, Splits, Task
from metalit.problems import (
    BayesianHead,
    Cleaning,
    FewShot,
    Logistic,
    LowRank,
    Matching,
    NeuralProcess,
    ProtoMAML,
    Prototypes,
    Ridge,
    RidgeHead,
    ThetaPhi,
)
from metalit.tree import Tree, tree_map

# ---- tasks


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64 that no other test disturbs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_at(tasks: Any, index: int) -> Any:
    """One task of a batch."""
    return pytree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tasks)


def each_of(tasks: Any) -> Any:
    """``in_dims`` of ``vmap`` over a batch of tasks, whatever they leave out."""
    return pytree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tasks)


class BowlTask(NamedTuple):
    A: Tensor
    c: Tensor


def bowls(dimension: int, count: int = 3) -> BowlTask:
    """Tasks of unequal curvature with eigenvalues in [0.5, 2]."""
    bases = torch.linalg.qr(draw(count, dimension, dimension, seed=1)).Q
    values = 0.5 + 1.5 * torch.rand(count, dimension, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return BowlTask(bases @ torch.diag_embed(values) @ bases.mT, 2 * draw(count, dimension, seed=3))


def regression_tasks(inputs: int, outputs: int, ragged: bool = False, count: int = 3) -> Task:
    """Tasks with 5 support and 7 query rows of noise; ``ragged`` ones have padded rows."""

    def points(rows: int, seed: int) -> Points:
        real = torch.arange(rows) < torch.arange(rows - count, rows)[:, None]
        x, y = draw(count, rows, inputs, seed=seed), draw(count, rows, outputs, seed=seed + 1)
        return Points(x, y, real if ragged else None)

    return Task(points(5, 10), points(7, 20), torch.arange(count))


def class_tasks(inputs: int, ways: int, ragged: bool = False, count: int = 3) -> Task:
    """Tasks of classes with two support and three query rows of each, of noise; ``ragged`` ones have padded rows."""

    def points(rows: int, seed: int) -> Points:
        real = torch.arange(rows) < torch.arange(rows - count + 1, rows + 1)[:, None]
        y = (torch.arange(rows) % ways).expand(count, -1)
        return Points(draw(count, rows, inputs, seed=seed), y, real if ragged else None)

    classes = torch.arange(ways).expand(count, -1)
    return Task(points(2 * ways, 80), points(3 * ways, 81), torch.arange(count), classes)


def tables(columns: int, classes: int = 0, count: int = 3) -> Splits:
    """Tables with 6 training, 5 validation and 4 test rows of noise, and classes or one real target."""

    def points(rows: int, seed: int) -> Points:
        x, y = draw(count, rows, columns, seed=seed), draw(count, rows, 1, seed=seed + 1)
        return Points(x, (37 * y.squeeze(2).abs()).long() % classes if classes else y)

    noise, corrupted = torch.arange(columns) % 2 == 1, torch.arange(6) % 3 == 1
    return Splits(
        points(6, 40), points(5, 50), points(4, 60), noise.expand(count, -1), corrupted.expand(count, -1), _KEYS
    )


def matrices(rows: int, columns: int, missing: bool = False, count: int = 3) -> Matrix:
    """Matrices of noise, of which the diagonal may be missing."""
    seen = ~torch.eye(rows, columns, dtype=torch.bool) if missing else torch.ones(rows, columns, dtype=torch.bool)
    return Matrix(draw(count, rows, columns, seed=70) * seen, seen.expand(count, -1, -1), torch.arange(count))


# ---- problems of the tests' own


class Bowl(Problem):
    """½(θ − c)ᵀA(θ − c), plus ½ weight ‖θ − φ‖² at the inner level, which is iMAML's; θ starts at φ."""

    def __init__(self, theta: Tensor, weight: float = 0.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)
        self.weight = weight

    def init(self, outer: dict[str, Tensor], task: BowlTask) -> Tree:
        return dict(outer)

    def inner_loss(self, inner: Tree, outer: dict[str, Tensor], task: BowlTask, step: int) -> Tensor:
        loss = self.outer_loss(inner, outer, task)
        return loss + 0.5 * self.weight * (inner["theta"] - outer["theta"]).square().sum() if self.weight else loss

    def outer_loss(self, inner: Tree, outer: dict[str, Tensor], task: BowlTask) -> Tensor:
        offset = inner["theta"] - task.c
        return 0.5 * offset @ task.A @ offset


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A linear layer of float64 with fixed weights."""
    return _drawn(nn.Linear(inputs, outputs, bias), 30)


def _drawn(module: nn.Module, seed: int) -> Any:
    for number, parameter in enumerate(module.double().parameters(), seed):
        parameter.data = draw(*parameter.shape, seed=number)
    return module


def _few_shot(inputs: int, outputs: int, *adapt: str, **options: Any) -> FewShot:
    problem = FewShot(linear(inputs, outputs), adapt=adapt or ("*",), **options)
    problem.trained_for(OfRegression.ROWS)
    for name in problem.copies.names:  # rows that are not all alike
        row = problem.outer()[name]
        row.data = row + draw(*row.shape, seed=31)
    return problem


# ---- the table


class Posed(NamedTuple):
    """A problem on a batch of tasks, with a step size that suits it and its derivatives by hand."""

    problem: Problem
    tasks: Any
    lr: float
    hand: type[Derivatives]


_KEYS = torch.arange(3)
_C23, _RAGGED_C23 = class_tasks(2, 3), class_tasks(2, 3, ragged=True)
_R21, _R32, _RAGGED = regression_tasks(2, 1), regression_tasks(3, 2), regression_tasks(2, 1, ragged=True)

PROBLEMS = {
    "bowl in 1-d": Posed(Bowl(draw(1, seed=4)), bowls(1), 0.3, OfBowl),
    "bowl in 4-d": Posed(Bowl(draw(4, seed=4)), bowls(4), 0.25, OfBowl),
    "iMAML in 1-d": Posed(Bowl(draw(1, seed=4), 0.7), bowls(1), 0.3, OfBowl),
    "iMAML in 3-d": Posed(Bowl(draw(3, seed=4), 0.7), bowls(3), 0.25, OfBowl),
    "ThetaPhi in 1-d": Posed(ThetaPhi([1.3], [-0.6]).double(), _KEYS, 0.2, OfThetaPhi),
    "ThetaPhi": Posed(ThetaPhi([0.7, -1.2, 0.4], [1.1, -0.5, 0.8, 0.3]).double(), _KEYS, 0.1, OfThetaPhi),
    "MAML": Posed(_few_shot(3, 2), _R32, 0.1, OfRegression),
    "MAML, ragged": Posed(_few_shot(2, 1), _RAGGED, 0.15, OfRegression),
    "ANIL": Posed(_few_shot(2, 1, "bias"), _R21, 0.2, OfRegression),
    "BOIL": Posed(_few_shot(2, 1, "w*"), _R21, 0.2, OfRegression),
    "iMAML, rows": Posed(_few_shot(2, 1, proximal=0.7), _RAGGED, 0.15, OfRegression),
    "ANIL, proximal": Posed(_few_shot(3, 2, "bias", proximal=0.4), _R32, 0.2, OfRegression),
    "CAVIA": Posed(_few_shot(2, 1, "bias", reset=["bias"]), _R21, 0.2, OfRegression),
    "CAVIA, all adapts": Posed(_few_shot(3, 2, reset=["bias"], proximal=0.3), _R32, 0.2, OfRegression),
    "MAML++": Posed(_few_shot(3, 2, per_step=["bias"]), _R32, 0.2, OfRegression),
    "MAML++, proximal": Posed(_few_shot(2, 1, per_step=["w*"], proximal=0.3), _R21, 0.2, OfRegression),
    "Ridge in 1-d": Posed(_drawn(Ridge(1, intercept=False), 6), tables(1), 0.3, OfRidge),
    "Ridge": Posed(_drawn(Ridge(3), 6), tables(3), 0.2, OfRidge),
    "Ridge, minibatches": Posed(_drawn(Ridge(3, batch=4, outer_batch=3), 6), tables(3), 0.2, OfRidge),
    "Logistic": Posed(_drawn(Logistic(3), 6), tables(3, classes=2), 0.5, OfLogistic),
    "Logistic, minibatches": Posed(
        _drawn(Logistic(2, intercept=False, batch=5, outer_batch=2), 6), tables(2, classes=2), 0.5, OfLogistic
    ),
    "Cleaning": Posed(_drawn(Cleaning(linear(2, 3), 6, decay=0.2), 7), tables(2, classes=3), 0.5, OfCleaning),
    "Cleaning, minibatches": Posed(
        _drawn(Cleaning(linear(2, 3, bias=False), 6, decay=0.2, batch=4, outer_batch=3), 7),
        tables(2, classes=3),
        0.5,
        OfCleaning,
    ),
    "LowRank": Posed(_drawn(LowRank(5, 4, rank=2), 8), matrices(5, 4, missing=True), 0.05, OfLowRank),
    "LowRank, exact": Posed(_drawn(LowRank(4, 3, rank=2, exact=True), 8), matrices(4, 3), 0.05, OfLowRank),
    "LowRank, exact, missing": Posed(
        _drawn(LowRank(5, 4, rank=2, exact=True), 8), matrices(5, 4, missing=True), 0.05, OfLowRank
    ),
    "RidgeHead": Posed(_drawn(RidgeHead(linear(3, 3), intercept=True), 9), _R32, 0.2, OfRidgeHead),
    "RidgeHead, ragged": Posed(_drawn(RidgeHead(linear(2, 6), intercept=True), 9), _RAGGED, 0.1, OfRidgeHead),
    "RidgeHead, no intercept": Posed(_drawn(RidgeHead(linear(2, 2)), 9), _R21, 0.2, OfRidgeHead),
    "BayesianHead": Posed(_drawn(BayesianHead(3, 2, 2, linear(3, 2)), 9), _R32, 0.1, OfBayesianHead),
    "BayesianHead, polynomial": Posed(_drawn(BayesianHead(2, 1, degree=3), 9), _RAGGED, 0.1, OfBayesianHead),
    "BayesianHead, curves": Posed(_drawn(BayesianHead(3, 2, 1, linear(3, 2), "curve"), 9), _R32, 0.1, OfBayesianHead),
    "BayesianHead, ragged curves": Posed(
        _drawn(BayesianHead(2, 1, 2, train_on="curve"), 9), _RAGGED, 0.1, OfBayesianHead
    ),
    "NeuralProcess": Posed(
        _drawn(NeuralProcess(2, 1, 3, 1, activation="Tanh", least_std=0.1), 9), _RAGGED, 0.1, OfNeuralProcess
    ),
    "NeuralProcess, attention": Posed(
        _drawn(NeuralProcess(2, 1, 3, 1, True, "Tanh", 0.1), 9), _RAGGED, 0.1, OfNeuralProcess
    ),
    "MAML, classes": Posed(FewShot(linear(2, 3)), _RAGGED_C23, 0.3, OfClassifier),
    "ProtoMAML": Posed(ProtoMAML(linear(2, 2)), _C23, 0.05, OfProtoMAML),
    "ProtoMAML, ragged": Posed(ProtoMAML(linear(2, 3)), _RAGGED_C23, 0.05, OfProtoMAML),
    "Prototypes": Posed(Prototypes(linear(2, 2)), _C23, 0.05, OfPrototypes),
    "Prototypes, ragged": Posed(Prototypes(linear(2, 4)), _RAGGED_C23, 0.05, OfPrototypes),
    "Matching": Posed(Matching(linear(2, 2)), _C23, 0.1, OfMatching),
    "Matching, ragged": Posed(Matching(linear(2, 3)), _RAGGED_C23, 0.1, OfMatching),
    "RidgeHead, classes": Posed(
        _drawn(RidgeHead(linear(2, 2), intercept=True, classes=True), 9), _RAGGED_C23, 0.1, OfRidgeClasses
    ),
    "RidgeHead, classes, no intercept": Posed(
        _drawn(RidgeHead(linear(2, 7), classes=True), 9), _C23, 0.1, OfRidgeClasses
    ),
}

ESTIMATORS = {
    "Unrolled": Unrolled(3),
    "Unrolled, each step counts": Unrolled(3, (0.2, 0.3, 0.5)),
    "Recomputed": Recomputed(3),
    "Recomputed, each step counts": Recomputed(3, (0.2, 0.3, 0.5)),
    "Truncated": Truncated(4, 2),
    "FirstOrder": FirstOrder(3),
    "FirstOrder, each step counts": FirstOrder(3, (0.2, 0.3, 0.5)),
    "Implicit, CG": Implicit(3, CG(30, 1e-14)),
    "Implicit, CG, damped": Implicit(2, CG(30, 1e-14), damping=0.3),
    "Implicit, Neumann": Implicit(3, Neumann(7, 0.2), damping=0.1),
    "Implicit, Dense": Implicit(3, Dense(), damping=0.4),
    "Implicit, NormalCG": Implicit(3, NormalCG(14, 1e-15), damping=0.2),
    "Implicit, Nystrom": Implicit(3, Nystrom(100, rho=0.3), damping=0.1),
    "F2SA": F2SA(3, weight=5.0),
    "FiniteDifference": FiniteDifference(3, epsilon=0.5),
    "Reptile": Reptile(3),
    "Reptile, minibatches": Reptile(5, batch=4),
    "JTg": JTg(2),
    "Direct": Direct(),
}

OPTIMIZERS = {
    "SGD": SGD,
    "MetaSGD": MetaSGD,
    "Newton": lambda lr: Newton(damping=1.5),
    "momentum": lambda lr: SGD(lr, 0.7),
    "momentum, clipped": lambda lr: SGD(lr, 0.6, weight_decay=0.1, schedule=[1.0, 0.5], clip_norm=0.7),
    "Nesterov, learned": lambda lr: SGD(
        Learned(lr, "parameter and step"), Learned(0.5, "step"), True, Learned(0.1, "parameter")
    ),
    "Adam": lambda lr: Adam(lr, 0.8, 0.9, 0.1, weight_decay=0.1),
    "AdamW, learned": lambda lr: AdamW(
        *(Learned(lr, "step", positive=True), Learned(0.8), Learned(0.9, "parameter"), Learned(0.1, "entry")),
        weight_decay=Learned(0.2),
        clip_norm=Learned(1.0, "step"),
    ),
    "RMSprop": lambda lr: RMSprop(lr, 0.8, 0.1, momentum=0.5),
    "MetaCurvature": lambda lr: MetaCurvature(lr, 0.3),
    "ALFA": lambda lr: ALFA(Learned(lr, "parameter and step"), weight_decay=0.3),
}
_LEARN = {"MetaSGD", "Nesterov, learned", "AdamW, learned", "MetaCurvature", "ALFA"}

# which pairs are not valid, and why

_INIT_ALONE = {name for name in PROBLEMS if name.startswith("bowl")} | {
    "MAML",
    "MAML, ragged",
    "MAML, classes",
    "ProtoMAML",
    "ProtoMAML, ragged",
}
_INNER_LOSS_ALONE = {name for name in PROBLEMS if name.split()[0].strip(",") in ("Ridge", "Logistic", "Cleaning")}
_OUTER_LOSS_ALONE = {"LowRank"}

NO_PATH = {
    "FirstOrder": _INNER_LOSS_ALONE,
    "Direct": _INNER_LOSS_ALONE,
    "Implicit": _INIT_ALONE | _OUTER_LOSS_ALONE,
    "JTg": _INIT_ALONE | _OUTER_LOSS_ALONE,
    "F2SA": _INIT_ALONE | _OUTER_LOSS_ALONE,
    "Reptile": _INNER_LOSS_ALONE | _OUTER_LOSS_ALONE,
}
# what init alone adapts: a step is valid, and by hand there is none
_WITHOUT_STEPS = {name for name in PROBLEMS if name.startswith(("BayesianHead", "NeuralProcess", "Matching"))}
NOT_WITH = {
    "FirstOrder": {"Newton"},
    "Direct": _LEARN,
    "Implicit": _LEARN,
    "JTg": _LEARN,
    "F2SA": _LEARN | {"Newton"},
    "FiniteDifference": {"Newton"},
    "Reptile": _LEARN,
}
_OTHERWISE = (
    "ThetaPhi",
    "ANIL",
    "BOIL",
    "CAVIA",
    "MAML++",
    "LowRank, exact",
    "RidgeHead",
    "BayesianHead",
    "NeuralProcess",
    "ProtoMAML",
    "Prototypes",
    "Matching",
)
# Reptile moves the outer variable to the inner one, and its minibatches are of support and query
_SHAPED_OTHERWISE = {name for name in PROBLEMS if name.startswith(_OTHERWISE)}
_NO_TASK = {name for name in PROBLEMS if name.startswith(("bowl", "iMAML in"))}
NOT_ON = {"Reptile": _SHAPED_OTHERWISE, "Reptile, minibatches": _SHAPED_OTHERWISE | _NO_TASK}
# valid, but only to O(ε²) where the inner gradient is not linear in θ; test_finite_difference.py holds them
_NOT_QUADRATIC = ("Logistic", "Cleaning", "MAML, classes", "ProtoMAML", "Prototypes")
_CURVED = {name for name in PROBLEMS if name.startswith(_NOT_QUADRATIC)}
# whose Hessian has eigenvalues of both signs, for which CG and Nyström are not made
_SADDLES = {name for name in PROBLEMS if name.startswith("Prototypes")}


@dataclass(frozen=True)
class Case:
    """One algorithm on a batch of tasks."""

    problem_name: str
    optimizer_name: str
    estimator_name: str

    @property
    def name(self) -> str:
        return f"{self.problem_name} × {self.optimizer_name} × {self.estimator_name}"

    @property
    def posed(self) -> Posed:
        return PROBLEMS[self.problem_name]

    @property
    def problem(self) -> Problem:
        return self.posed.problem

    @property
    def tasks(self) -> Any:
        return self.posed.tasks

    @property
    def optimizer(self) -> InnerOptimizer:
        return OPTIMIZERS[self.optimizer_name](self.posed.lr)

    @property
    def hypergradient(self) -> Hypergradient:
        return ESTIMATORS[self.estimator_name]

    @property
    def outer(self) -> Outer:
        """The outer variable, with unequal values where the optimiser starts them all from one number."""
        outer = outer_variable(self.problem, self.optimizer, task_at(self.tasks, 0), steps=2)  # of 3: the last repeats
        unequal = tree_map(_unequal, outer["optimizer"])
        return pytree_map(Tensor.detach, {"problem": outer["problem"], "optimizer": unequal})

    @property
    def starts(self) -> Tree:
        """A warm start for each task that is no starting point of any problem."""
        inner = self.problem.init(self.outer["problem"], task_at(self.tasks, 0))
        return tree_map(lambda value: draw(3, *value.shape, seed=90), inner)

    @property
    def kinds(self) -> tuple[type, ...]:
        solver = getattr(self.hypergradient, "solver", None)
        return type(self.problem), type(self.optimizer), type(self.hypergradient), type(solver)

    def estimate(self, task: Any, start: Tree | None = None) -> Estimate:
        return self.hypergradient(self.problem, self.optimizer, self.outer, task, start)

    def answer(self, task: Any, start: Tree | None = None) -> Estimate:
        hand = self.posed.hand(self.problem, task)
        return reference(hand, self.optimizer, self.hypergradient, self.outer, start)


def _unequal(value: Tensor) -> Tensor:
    return value * (1 + 0.1 * draw(*value.shape).abs()) + 0.01 * draw(*value.shape, seed=1)


def is_valid(case: Case) -> bool:
    estimator = type(case.hypergradient).__name__
    no_path = NO_PATH.get(estimator, set()) | NOT_ON.get(case.estimator_name, set())
    return case.problem_name not in no_path and case.optimizer_name not in NOT_WITH.get(estimator, set())


def is_exact(case: Case) -> bool:
    if isinstance(case.hypergradient, FiniteDifference):
        return case.problem_name not in _CURVED
    return not (case.problem_name in _SADDLES and isinstance(getattr(case.hypergradient, "solver", None), CG | Nystrom))


_WITH_EVERY_OPTIMIZER = {"ThetaPhi", "CAVIA, all adapts"}
_WITH_SOME = {"ANIL", "Cleaning, minibatches", "LowRank", "LowRank, exact, missing"}
_SOME = {"MetaSGD", "Newton", "momentum"}


def _posed_together(problem: str, optimizer: str) -> bool:
    """Whether a pair is one of the table: SGD on all, some on some problems, each on a few."""
    return optimizer == "SGD" or problem in _WITH_EVERY_OPTIMIZER or (problem in _WITH_SOME and optimizer in _SOME)


TRIPLES = [Case(*names) for names in product(PROBLEMS, OPTIMIZERS, ESTIMATORS) if _posed_together(*names[:2])]
CASES = [
    case
    for case in TRIPLES
    if is_valid(case) and not (case.problem_name in _WITHOUT_STEPS and case.hypergradient.steps) and is_exact(case)
]
# one of each kind of problem, inner optimiser, estimator and solver
KINDS = list({case.kinds: case for case in CASES}.values())
# so few of them that each problem, inner optimiser, estimator and solver is in one: for what takes a compiler
FEW: list[Case] = []
for _case in KINDS:
    if not {*_case.kinds} <= {kind for case in FEW for kind in case.kinds}:
        FEW.append(_case)
