"""The curvature of the inner loss, and whether steps of a descent are too long for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from metalit.adapt import Outer, Start, iterates
from metalit.checking.subject import Subject
from metalit.hypergradients import for_each_task
from metalit.inner import SGD
from metalit.private_torch import tree_leaves
from metalit.tree import Tree, flatten, tree_map, unflatten

_PRODUCTS = 20  # of Lanczos, at most


@dataclass(frozen=True)
class Curvature:
    """Eigenvalues of the inner Hessian of the first task.

    Attributes:
        place: where it is taken.
        largest, smallest: the ends of its spectrum, by ``products`` steps of Lanczos.
        products: exact where they are as many as the inner variable has entries.
        entries: those of the inner variable.
        inner_loss: the mean inner loss over the tasks there.
    """

    place: str
    largest: float
    smallest: float
    products: int
    entries: int
    inner_loss: float


def curvatures(subject: Subject) -> list[Curvature]:
    """At the start of the inner loop and where it ends."""
    if not (subject.form.steps and tree_leaves(subject.begin())):
        return []
    ends = _ends(subject)
    firsts = (tree_map(lambda leaf: leaf[0].detach(), each) for each in ends.inner)
    names, losses = ("start", "end"), ends.losses.double().mean(0).tolist()
    return [_curvature(subject, *each) for each in zip(names, firsts, losses, strict=True)]


class _Ends(NamedTuple):
    """The inner variables of all tasks before and after the inner loop, and the inner losses there, ``[tasks, 2]``."""

    inner: tuple[Tree, Tree]
    losses: Tensor


def _ends(subject: Subject) -> _Ends:
    steps = subject.form.steps

    def one(outer: Outer, given: tuple[Any, Start]) -> tuple[Tree, Tree, Tensor]:
        task, start = given
        problem, own = subject.problem, outer["problem"]
        begin, *_, end = iterates(problem, subject.optimizer, outer, task, steps, start)
        losses = [problem.inner_loss(inner, own, task, steps - 1) for inner in (begin, end)]
        return begin, end, torch.stack(losses)

    begin, end, losses = for_each_task(one, subject.outer, (subject.tasks, subject.start), subject.problem)
    return _Ends((begin, end), losses)


def _curvature(subject: Subject, place: str, inner: Tree, loss: float) -> Curvature:
    own, task, last = subject.outer["problem"], subject.one(), subject.form.steps - 1
    _, product = vjp(lambda inner: subject.problem.inner_grad(inner, own, task, last), inner)[:2]
    size = flatten(inner).numel()
    values = lanczos(lambda v: flatten(product(unflatten(v, inner))[0]), flatten(inner), min(size, _PRODUCTS))
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
    goes = f"the inner loss goes from {loss[0]:.4g} to {loss[1]:.4g}, and {ratio:.3g} times the inner gradient is left"
    if loss[1] <= loss[0] or ratio <= 1:
        return [], [f"{told}: more inner steps would diverge there; in these {goes}"]
    return [f"{told}: {goes}; take an inner lr below {bound / most:.2g}"], []
