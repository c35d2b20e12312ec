"""Where do second derivatives go when ``backward`` meets ``create_graph=True``, and how does one get them clean?

``backward`` adds to ``.grad``: after a second sweep without clearing, ``.grad`` holds the sum of first and second
derivatives. ``metalit.autodiff.hessian_products`` is one reverse sweep that never touches ``.grad``.
"""

import warnings

import torch
from torch import Tensor

from metalit.autodiff import hessian_products


def w(x: Tensor, y: Tensor) -> Tensor:
    """``(xᵀy)²``, with ∇x = 2(xᵀy)y and ∇y = 2(xᵀy)x."""
    return (x @ y) ** 2


def point() -> tuple[Tensor, Tensor]:
    """x and y anew, with nothing in their ``.grad``."""
    return torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)


def backward_twice(clear: bool) -> tuple[list[Tensor], list[Tensor]]:
    """``.grad`` of x and y after ``w.backward()``, and after ``(∂w/∂x₁).backward()``."""
    x, y = point()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the cycle of references between x and its .grad
        w(x, y).backward(create_graph=True)
    first = [x.grad.detach().clone(), y.grad.detach().clone()]
    slope = x.grad[0]  # ∂w/∂x₁, with its graph
    if clear:
        x.grad.data.zero_()
        y.grad.data.zero_()
    slope.backward()
    second = [x.grad.detach().clone(), y.grad.detach().clone()]
    x.grad = y.grad = None
    return first, second


def closed_form(x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Hv and Jᵀv from the blocks ∂²w/∂x∂x = 2yyᵀ and ∂²w/∂x∂y = 2yxᵀ + 2(xᵀy)I."""
    hessian = 2 * torch.outer(y, y)
    mixed = 2 * torch.outer(y, x) + 2 * (x @ y) * torch.eye(2)
    return hessian @ v, mixed.T @ v


def show(label: str, *vectors: Tensor) -> None:
    """One line: what it is, and the vectors."""
    numbers = "   ".join("(" + ", ".join(f"{entry:g}" for entry in vector.tolist()) + ")" for vector in vectors)
    print(f"{label:<44}: {numbers}")


def main() -> None:
    """Print the numbers of the notebook, by ``backward`` and by products."""
    print("w = (xᵀy)² at x = (3, 1), y = (1, 2)\n")
    first, clean = backward_twice(clear=True)
    _, polluted = backward_twice(clear=False)
    show("∇x w   ∇y w", *first)
    show("∂(∂w/∂x₁)/∂x   ∂(∂w/∂x₁)/∂y, cleared", *clean)
    show("the same, the first gradient not cleared", *polluted)
    show("the difference is the first gradient", *(bad - good for bad, good in zip(polluted, clean, strict=True)))

    print("\nhessian_products(w, x, y, v): Hv and Jᵀv, in one sweep")
    x, y = point()
    e1, v = torch.tensor([1.0, 0.0]), torch.tensor([3.0, -2.0])
    show("v = (1, 0): the row of x₁", *hessian_products(w, x, y, e1))
    show("  2y₁², 2y₁y₂   4x₁y₁ + 2x₂y₂, 2x₂y₁", *closed_form(x, y, e1))
    show("v = (3, -2)", *hessian_products(w, x, y, v))
    show("  2yyᵀv   2(yᵀv)x + 2(xᵀy)v", *closed_form(x, y, v))
    print(f"{'x.grad   y.grad':<44}: {x.grad}   {y.grad}")

    print("\nThe MAML of the notebook, second order and runnable: metalit fit --config configs/sine_maml_seed.yaml")


if __name__ == "__main__":
    main()
