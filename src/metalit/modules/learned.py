"""What an inner optimiser learns: parameters of the inner variable's shape, as a module."""

from torch import Tensor

from metalit.errors import InputError
from metalit.inner.base import InnerOptimizer
from metalit.problem import Problem
from metalit.tree import Tree, leaves, tree_map


def brought(problem: Problem, optimizer: InnerOptimizer, steps: int, exact: bool = False) -> Tree:
    """The parameters that an inner optimiser brings for the inner variable, with the values that they begin with.

    Args:
        problem, optimizer: of the inner variable, and the one that brings them.
        steps: the number of inner steps that are trained; 0 counts as 1.
        exact: in double precision, whatever the problem has.

    Raises:
        InputError: the inner variable has no shape before there is a task.
    """
    if not optimizer.learns:
        return {}
    try:
        inner = problem.init(problem.outer(), None)
    except (AttributeError, IndexError, TypeError, InputError) as error:
        raise InputError(
            f"inner_optimizer {type(optimizer).__name__} learns parameters of the inner variable's shape, for which "
            f"{type(problem).__name__}.init is called before there is any task, with None: {error}; use one that "
            "learns nothing, such as SGD with numbers, or let init do without its task"
        ) from error
    return optimizer.outer(tree_map(Tensor.double, inner) if exact else inner, max(1, steps))


def alike(first: Tree, second: Tree) -> bool:
    """Whether two trees have leaves of the same names and shapes."""
    one, other = ({name: value.shape for name, value in leaves(tree)} for tree in (first, second))
    return one == other


def updated(present: Tree, known: Tree) -> Tree:
    """``present``, with the values of ``known`` where that has a leaf of the same name and shape.

    >>> import torch
    >>> updated({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.ones(2)})
    {'a': tensor([1., 1.]), 'b': tensor([0.])}
    """
    values, found = dict(leaves(known)), []
    for name, value in leaves(present):
        same = name in values and values[name].shape == value.shape
        found.append(values[name] if same else value)
    each = iter(found)
    return tree_map(lambda _: next(each), present)
