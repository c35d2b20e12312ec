"""The inner level at the point: its curvature, whether it is solved, and derivatives of its steps at zero."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from metalit.adapt import Outer, adapt
from metalit.checking.subject import Subject
from metalit.hypergradients import Direct, Estimate, Hypergradient
from metalit.inner import SGD
from metalit.modules.diagnosis import Diagnosis
from metalit.notices import say
from metalit.private_torch import tree_leaves
from metalit.training.batches import Batches, StepResult
from metalit.training.context import StepContext
from metalit.training.outer_gradient import OuterGradient
from metalit.tree import Tree, flatten, leaves, tree_map, unflatten

_PRODUCTS = 20  # of Lanczos, at most


@dataclass(frozen=True)
class Curvature:
    """Eigenvalues of the inner Hessian of the first task.

    Attributes:
        place: where it is taken.
        largest, smallest: the ends of its spectrum, by ``products`` steps of Lanczos.
        products: exact where they are as many as the inner variable has entries.
        entries: those of the inner variable.
        inner_loss: the inner loss there.
    """

    place: str
    largest: float
    smallest: float
    products: int
    entries: int
    inner_loss: float


def diagnosed(subject: Subject, hypergradient: Hypergradient, found: Estimate) -> tuple[dict[str, float], list[str]]:
    """What a log would say of an outer step, and what training would warn of."""
    diagnosis, metrics = _logged(subject, hypergradient, found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diagnosis.warn(0, metrics, subject.outer, subject.tasks, found.inner, "take more inner steps")
    return metrics, [str(each.message).removeprefix("outer step 0: ") for each in caught]


def inner_gradient(subject: Subject) -> float:
    """The mean norm of the inner gradient where the inner loops start."""
    _, metrics = _logged(subject, subject.form, subject.estimate(Direct()))
    return metrics.get("inner_grad_norm", 0.0)


def _logged(subject: Subject, hypergradient: Hypergradient, found: Estimate) -> tuple[Diagnosis, dict[str, float]]:
    owner = SimpleNamespace(problem=subject.problem, hypergradient=hypergradient)
    diagnosis = Diagnosis(owner, Batches(_nothing, subject.problem, False, None, "the check", say))
    context = StepContext(subject.outer, None, torch.tensor(subject.progress))
    result = StepResult(OuterGradient.of(found.loss, found.gradient), found.metrics, found.inner)
    return diagnosis, diagnosis.as_logged(context, result, subject.tasks, subject.start)


def _nothing(shared: Any, items: Any) -> None:
    """Stands for a step that is evaluated elsewhere."""


def curvatures(subject: Subject) -> list[Curvature]:
    """At the start of the inner loop and where it ends."""
    task, begin = subject.one(), subject.begin()
    if not (subject.form.steps and tree_leaves(begin)):
        return []
    given = subject.problem, subject.optimizer, subject.outer, task, subject.form.steps
    end = adapt(*given, None if subject.start is None else begin)
    return [_curvature(subject, task, place, inner) for place, inner in (("start", begin), ("end", end))]


def _curvature(subject: Subject, task: Any, place: str, inner: Tree) -> Curvature:
    own, last = subject.outer["problem"], subject.form.steps - 1
    inner = tree_map(Tensor.detach, inner)
    _, product = vjp(lambda inner: subject.problem.inner_grad(inner, own, task, last), inner)[:2]
    size = flatten(inner).numel()
    values = lanczos(lambda v: flatten(product(unflatten(v, inner))[0]), flatten(inner), min(size, _PRODUCTS))
    loss = float(subject.problem.inner_loss(inner, own, task, last))
    return Curvature(place, float(values[-1]), float(values[0]), min(size, _PRODUCTS), size, loss)


def lanczos(product: Any, like: Tensor, steps: int) -> Tensor:
    """Ritz values of a symmetric matrix, known by its products, in order; full reorthogonalisation.

    (Golub, Van Loan 2013, "Matrix Computations", section 10.1.) The largest are found first, and all of them where
    there are as many steps as dimensions.

    >>> values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> lanczos(lambda v: values * v, torch.zeros(3, dtype=torch.float64), 3).round(decimals=6).tolist()
    [1.0, 2.0, 5.0]
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    basis, diagonal, beside = [v / v.norm()], [], []
    for step in range(steps):
        image = product(basis[-1])
        diagonal.append(image @ basis[-1])
        rows = torch.stack(basis)
        for _ in range(2):  # once leaves rounding behind
            image = image - rows.mT @ (rows @ image)
        size = image.norm()
        if step == steps - 1 or not bool(size > 1e-10 * diagonal[0].abs().clamp(min=1e-30)):
            break
        beside.append(size)
        basis.append(image / size)
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        off = torch.diag(torch.stack(beside), 1)
        matrix = matrix + off + off.mT
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((len(matrix),), torch.nan, dtype=matrix.dtype)
    return torch.linalg.eigvalsh(matrix)


def rate_of(subject: Subject) -> tuple[float, float] | None:
    """The largest step size of a descent along the gradient and its momentum; None of any other inner optimiser."""
    if not isinstance(subject.optimizer, SGD) or subject.optimizer.nesterov:
        return None
    numbers = subject.optimizer.numbers(subject.begin(), subject.outer["optimizer"], 0)
    each = [[float(torch.as_tensor(n[name]).max()) for name in ("lr", "momentum")] for n in numbers.values()]
    return max(rate for rate, _ in each), min(momentum for _, momentum in each)


def told_of_curvature(
    subject: Subject, found: list[Curvature], metrics: Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """Problems and remarks: steps of a descent that are too long for the curvature."""
    rate = rate_of(subject) if found else None
    if rate is None:
        return [], []
    (lr, momentum), most = rate, max(each.largest for each in found)
    bound = 2 * (1 + momentum)
    if not lr * most > bound:
        return [], []
    told = f"inner steps: step size {lr:.3g} × curvature {most:.3g} = {lr * most:.3g}, above {bound:.3g}"
    loss, ratio = [each.inner_loss for each in found], metrics.get("inner_grad_ratio", 0.0)
    if loss[1] <= loss[0] and ratio <= 1:
        return [], [f"{told}: more inner steps would diverge there, though these bring the inner loss down"]
    grows = f"the inner loss goes from {loss[0]:.4g} to {loss[1]:.4g}, the norm of its gradient to {ratio:.3g} times"
    return [f"{told}: {grows}; take an inner lr below {bound / most:.2g}"], []


def not_a_number_at_zero(subject: Subject) -> list[str]:
    """Whether a step along a gradient that is exactly zero has a derivative that is no number."""
    begin = tree_map(Tensor.detach, subject.begin())
    if not (subject.form.steps and tree_leaves(begin)) or subject.optimizer.second_order:
        return []
    zeros = tree_map(torch.zeros_like, begin)

    def moved(gradient: Tree, outer: Outer) -> Tree:
        state = subject.optimizer.init(begin)
        return subject.optimizer.update(lambda _: gradient, begin, state, outer["optimizer"], 0)[0]

    try:
        after, back = vjp(moved, zeros, subject.outer)[:2]
        slopes, _ = back(tree_map(torch.ones_like, after))
    except Exception:  # an optimiser of the user's that asks more of its gradient than to be one
        return []
    lost = [name or "the inner variable" for name, leaf in leaves(slopes) if not bool(torch.isfinite(leaf).all())]
    if not lost:
        return []
    return [
        f"inner_optimizer {type(subject.optimizer).__name__}: where an inner gradient is 0, as of a dead ReLU, the "
        f"derivative of its step is NaN or infinite ({', '.join(lost[:3])}): the root of a zero second moment? Take "
        "sqrt where the square is positive alone, or add eps below the root"
    ]
