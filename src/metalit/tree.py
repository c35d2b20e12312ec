"""Parameter dictionaries: a tree is a tensor or a dictionary of trees, and these are its vector-space operations.

>>> import torch
>>> a, b = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 4.0])}
>>> axpy(2.0, a, b)
{'w': tensor([7., 4.])}
>>> float(dot(a, b)), float(norm(a))
(3.0, 3.0)
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

Tree: TypeAlias = Tensor | dict[str, Any]
SomeTree = TypeVar("SomeTree", bound=Tree)


def tree_map(fn: Callable[..., Tensor], first: SomeTree, *rest: Tree) -> SomeTree:
    """Apply ``fn`` leaf by leaf to trees of equal keys and shapes.

    Raises:
        ValueError: the trees have different keys or leaves of different shapes; nothing is ever broadcast.
    """
    return _mapped(fn, first, *rest)


def _mapped(fn: Callable[..., Tensor], first: Any, *rest: Any) -> Any:
    for other in rest:
        if _form(other) != _form(first):
            raise ValueError(f"trees differ: {_form(first)} and {_form(other)}")
    if isinstance(first, dict):
        return {key: _mapped(fn, first[key], *(other[key] for other in rest)) for key in first}
    return fn(first, *rest)


def _form(tree: Tree) -> str:
    return str(sorted(tree)) if isinstance(tree, dict) else f"Tensor{list(tree.shape)}"


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(dotted name, tensor)`` for every leaf, in insertion order."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from leaves(branch, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def axpy(scale: float | Tensor, x: SomeTree, y: Tree) -> SomeTree:
    """``scale · x + y``, leaf by leaf."""
    return tree_map(lambda a, b: scale * a + b, x, y)


def dot(x: Tree, y: Tree) -> Tensor:
    """``Σ xᵢ yᵢ`` over all entries of all leaves."""
    products = tree_map(lambda a, b: (a * b).sum(), x, y)
    return torch.stack([value for _, value in leaves(products)]).sum()


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm over all entries of all leaves."""
    return dot(tree, tree).sqrt()


def flatten(tree: Tree) -> Tensor:
    """All entries as one vector, in the order of :func:`leaves` and of the widest type among them."""
    return torch.cat([leaf.reshape(-1) for _, leaf in leaves(tree)])


def unflatten(vector: Tensor, like: SomeTree) -> SomeTree:
    """The inverse of :func:`flatten`: a tree of the shapes and types of ``like`` with the entries of ``vector``."""
    pieces = iter(vector.split([leaf.numel() for _, leaf in leaves(like)]))
    return tree_map(lambda leaf: next(pieces).view_as(leaf).to(leaf.dtype), like)
