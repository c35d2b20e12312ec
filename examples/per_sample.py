"""How does one get the gradient of each sample by the parameters, without a loop and without silent zeros?

``metalit.autodiff.per_sample_jacobian`` takes all rows at once, from a function such as ``a x + b`` or from a module,
which it leaves as it was; ``per_sample_hessian`` gives second derivatives by an input.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from metalit.autodiff import per_sample_gradients, per_sample_hessian, per_sample_jacobian

SEED, ROWS = 0, 1000


def linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """f(x; a, b) = a x + b, whose gradient by (a, b) is (x, 1)."""
    return a * x + b


# ---- four ways to [rows, 2]


def by_backward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One ``backward`` for each row, through ``.grad``; the notebook's also made the basis anew for each row."""
    y, basis, found = linear(x, a, b), torch.eye(len(x)), torch.empty(len(x), 2)
    a.grad = b.grad = None
    for row in range(len(x)):
        y.backward(basis[row].reshape(-1, 1), retain_graph=True)
        found[row, 0], found[row, 1] = a.grad, b.grad
        a.grad.zero_()
        b.grad.zero_()
    return found


def by_grad(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One ``torch.autograd.grad`` for each row."""
    y, basis = linear(x, a, b), torch.eye(len(x))
    rows = (torch.autograd.grad(y, (a, b), v.reshape(-1, 1), retain_graph=True) for v in basis)
    return torch.stack([torch.hstack(row) for row in rows])


def by_functional_jacobian(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``torch.autograd.functional.jacobian``, itself a loop over rows."""
    return torch.hstack([part.squeeze(2) for part in jacobian(lambda a, b: linear(x, a, b), (a, b))])


def by_per_sample(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """All rows at once."""
    return per_sample_jacobian(linear, x, parameters={"a": a, "b": b}, flat=True).squeeze(1).detach()


def seconds(fn: Callable[[], object], repeats: int) -> float:
    """The median time of ``repeats`` calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def four_ways() -> None:
    """Print how far each way is from (x, 1), and what it takes."""
    generator = torch.Generator().manual_seed(SEED)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((ROWS, 1), (1,), (1,)))
    a.requires_grad_(), b.requires_grad_()
    expected = torch.hstack([x, torch.ones_like(x)])
    print(f"∂(a x + b)/∂(a, b) = (x, 1) for {ROWS} samples, seed {SEED}, median times\n")
    print(f"{'':<24}{'error':>8}{'ms':>10}{'times as fast as the backward loop':>38}")
    slowest = None
    for way, repeats in ((by_backward, 5), (by_grad, 5), (by_functional_jacobian, 5), (by_per_sample, 100)):
        error = (way(x, a, b) - expected).abs().max()
        taken = seconds(lambda: way(x, a, b), repeats)  # noqa: B023
        slowest = slowest or taken
        print(f"{way.__name__:<24}{error:>8g}{1000 * taken:>10.2f}{slowest / taken:>38.1f}")


# ---- the two errors of the notebook


def errors() -> None:
    """Print both, each with its cure."""
    x, t = torch.ones(3), torch.zeros(3)
    try:
        exec("u = u(x, t)", {"x": x, "t": t})  # a cell of the notebook
    except NameError as error:
        print(f"u = u(x, t)    NameError: {error}")

    def u(x: Tensor, t: Tensor) -> Tensor:
        return x**2 * torch.exp(t)

    value = u(x, t)
    print(f"  cure: define u first, and give its value another name: value = {value.tolist()}")
    a = torch.ones(1, requires_grad=True)
    try:
        torch.autograd.grad(linear(x, a, t), a)
    except RuntimeError as error:
        print(f"grad(y, a)     RuntimeError: {error}")
    found = per_sample_gradients(u, x, t, by=0)
    print(f"  cure: a gradient for each row: per_sample_gradients(u, x, t, by=0) = {found.tolist()}")


# ---- the zeros of the notebook


def backward_loop(model: nn.Linear, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The loop of the notebook: the model is evaluated, and the gradients are read from a and b."""
    y, basis, found = model(x), torch.eye(len(x)), torch.empty(len(x), 2)
    for row in range(len(x)):
        y.backward(basis[row].reshape(-1, 1), retain_graph=True)
        found[row, 0], found[row, 1] = a.grad, b.grad
        a.grad.zero_()
        b.grad.zero_()
    return found


def silent_zeros() -> None:
    """Print what the loop finds after ``jacobian`` replaced the parameters, and what ``per_sample_jacobian`` finds."""
    torch.manual_seed(SEED)
    model, x = nn.Linear(1, 1), torch.randn(10, 1)
    expected = torch.hstack([x, torch.ones_like(x)])
    a, b = model._parameters["weight"], model._parameters["bias"]

    def partial_model(a: Tensor, b: Tensor) -> Tensor:
        model._parameters["weight"] = a
        model._parameters["bias"] = b
        return model(x)

    model(x[0]).backward()  # a.grad and b.grad exist from here on
    a.grad.zero_()
    b.grad.zero_()
    before = backward_loop(model, x, a, b)
    jacobian(partial_model, (a, b))  # leaves its own copies of a and b in the model
    after = backward_loop(model, x, a, b)
    ours = per_sample_jacobian(model, x, flat=True).squeeze(1)
    for label, found in (
        ("the loop, first", before),
        ("the loop, after jacobian(partial_model)", after),
        ("per_sample_jacobian, after that", ours),
    ):
        print(f"{label:<42}error {(found - expected).abs().max():<8.4g} largest entry {found.abs().max():.4g}")
    print(f"the weight of the model is still a: {model._parameters['weight'] is a}; the loop reads a.grad: {a.grad}")


# ---- several outputs, second derivatives


def several_outputs() -> None:
    """Print the Jacobian of a layer with two outputs against its closed form."""
    torch.manual_seed(SEED)
    layer, x = nn.Linear(3, 2), torch.randn(10, 3)
    found = per_sample_jacobian(layer, x)
    expected = torch.einsum("oi,rj->roij", torch.eye(2), x)  # ∂(Wx)ₒ/∂Wᵢⱼ = δₒᵢ xⱼ
    print(f"{'weight':<10}{list(found['weight'].shape)!s:<16}error {(found['weight'] - expected).abs().max():g}")
    print(f"{'bias':<10}{list(found['bias'].shape)!s:<16}error {(found['bias'] - torch.eye(2)).abs().max():g}")


def second_derivatives() -> None:
    """Print that u = e⁻ᵗ sin x solves the heat equation ∂u/∂t = ∂²u/∂x²."""

    def u(x: Tensor, t: Tensor) -> Tensor:
        return torch.exp(-t) * torch.sin(x)

    generator = torch.Generator().manual_seed(SEED)
    x, t = (torch.randn(100, generator=generator, dtype=torch.float64) for _ in range(2))
    twice = per_sample_hessian(u, x, t)
    print(f"{'∂²u/∂x² + u':<24}{(twice + u(x, t)).abs().max():.1g}")
    print(f"{'∂²u/∂x² − ∂u/∂t':<24}{(twice - per_sample_gradients(u, x, t, by=1)).abs().max():.1g}")


def main() -> None:
    """Print all of it."""
    torch.set_num_threads(1)
    four_ways()
    print("\nTwo errors on the way, and their cures\n")
    errors()
    print("\nThe gradients of nn.Linear, 10 samples; those that are zero are wrong\n")
    silent_zeros()
    print("\nnn.Linear(3, 2), 10 samples: [rows, outputs, ...]\n")
    several_outputs()
    print("\nu = e⁻ᵗ sin x at 100 points: largest absolute value\n")
    second_derivatives()


if __name__ == "__main__":
    main()
