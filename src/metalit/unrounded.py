"""Numbers that were written by hand, in tensors whose precision is known only later."""

from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from metalit.tree import Tree, leaves, tree_map


class Unrounded(nn.Module):
    """A module whose tensors hold the numbers that were written for them, as exactly as its precision allows.

    Modules are made in single precision, and brought to double afterwards: 0.7 would then be 0.699999988. So what was
    written is kept, and filled in again where the type changes and no training has changed the values.

    >>> class Model(Unrounded):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rate = nn.Parameter(self.written("rate", 0.7))
    >>> Model().double().rate.item()
    0.7
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, Tensor] = {}

    def written(self, name: str, values: Any) -> Tensor:
        """The tensor of these numbers, in torch's default type, which the module then holds by this dotted name."""
        exact = torch.as_tensor(values, dtype=torch.float64).detach().clone()
        self._exact[name] = exact
        return exact.to(torch.get_default_dtype())

    def _apply(self, fn: Any, recurse: bool = True) -> "Unrounded":
        before = {name: attrgetter(name)(self).detach().clone() for name in self._exact}
        super()._apply(fn, recurse)
        for name, exact in self._exact.items():
            was, now = before[name], attrgetter(name)(self)
            if now.dtype != was.dtype and not now.is_meta and torch.equal(was.cpu(), exact.to(was.dtype)):
                with torch.no_grad():
                    now.copy_(exact)
        return self


class ParameterTree(Unrounded):
    """A tree whose leaves are parameters, saved by their dotted names.

    Args:
        tree: the values that they begin with.
        exact: the same in double precision.
    """

    def __init__(self, tree: Tree, exact: Tree | None = None) -> None:
        super().__init__()
        for name, value in leaves(tree if exact is None else exact):
            self.written(name, value)
        self.tree = tree_map(lambda value: nn.Parameter(value.detach().clone()), tree)
        for name, parameter in leaves(self.tree):
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, cast(nn.Parameter, parameter))
