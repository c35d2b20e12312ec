"""Products with second derivatives."""

from collections.abc import Callable

from torch import Tensor
from torch.func import grad, vjp

from metalit.autodiff.exact import ExactSecondDerivatives
from metalit.tree import Tree


def hessian_products(fn: Callable[[Tree, Tree], Tensor], inner: Tree, outer: Tree, vector: Tree) -> tuple[Tree, Tree]:
    """Multiply a vector with both blocks of second derivatives of ``f(inner, outer)`` in one reverse sweep.

    With g = ∂f/∂inner, returns ``(Hv, Jᵀv)``: Hv = (∂g/∂inner)ᵀ v and Jᵀv = (∂g/∂outer)ᵀ v. Nothing is accumulated
    anywhere: no ``.grad`` is read or written (Pearlmutter 1994, "Fast exact multiplication by the Hessian").

    Args:
        fn: a scalar function of two trees.
        inner, outer: the point.
        vector: a tree shaped like ``inner``.

    >>> import torch
    >>> f = lambda x, y: (x @ y) ** 2
    >>> hessian_products(f, torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    (tensor([2., 4.]), tensor([16.,  2.]))
    """
    with ExactSecondDerivatives():
        _, pull_back = vjp(grad(fn), inner, outer)[:2]
        return pull_back(vector)
