"""The one place where gradients are written to the outer parameters."""

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor

from metalit.adapt import Outer
from metalit.errors import InputError
from metalit.tree import leaves


def check_types(outer: Outer) -> None:
    """Raise an :class:`InputError` for parameters of a type in which nothing can be learned."""
    for name, parameter in leaves(outer):
        if parameter.is_complex():
            raise InputError(
                f"model: its parameter {name} is of {parameter.dtype}, and complex numbers cannot be learned; keep "
                "real and imaginary parts as real parameters, and join them by torch.complex in forward"
            )
        if parameter.dtype == torch.half:
            raise InputError(
                f"model: its parameter {name} is of {parameter.dtype}, where small steps and Adam's ε are 0; keep it "
                "in single precision, and set trainer.precision to 16-mixed or bf16-mixed"
            )


class Gradients:
    """The ``.grad`` of the outer parameters, as views of one vector where their type is that of the vector.

    The vector stays: to make a view for each parameter costs as much as the step of the optimiser.

    Args:
        outer: returns the outer variable.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> Gradients(lambda: {"problem": {"weight": weight}}).write(torch.tensor([1.0, 2.0]))
    >>> weight.grad
    tensor([1., 2.])
    """

    def __init__(self, outer: Callable[[], Outer]) -> None:
        self.outer = outer
        self._parameters: list[Tensor] | None = None
        self._vector: Tensor | None = None
        self._slots: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def is_new(self) -> bool:
        """Whether there was no outer variable yet."""
        return self._parameters is None

    def follow(self, outer: Outer) -> bool:
        """Let gradients be of this outer variable from now on; returns whether it is another than it was last."""
        parameters, before = [parameter for _, parameter in leaves(outer)], self._parameters
        if before is not None and len(before) == len(parameters) and all(map(is_, before, parameters)):
            return False
        self._parameters, self._vector = parameters, None
        for parameter in before or []:
            parameter.grad = None  # else the optimiser would go on with it
        return before is not None

    def write(self, gradient: Tensor) -> None:
        """Write the gradient, a vector in the order of the outer variable's leaves."""
        if self._vector is None or any(parameter.grad is not grad for parameter, grad, _ in self._slots):
            self._vector = self._begin(gradient)
        self._vector.copy_(gradient)
        for _, grad, view in self._slots:
            if grad is not view:
                grad.copy_(view)

    def _begin(self, gradient: Tensor) -> Tensor:
        """A vector whose pieces the parameters have as their gradients."""
        parameters = [parameter for _, parameter in leaves(self.outer())]
        vector, self._slots = torch.empty_like(gradient), []
        pieces = vector.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            view = piece.view_as(parameter)
            parameter.grad = view if view.dtype == parameter.dtype else torch.empty_like(parameter)
            self._slots.append((parameter, parameter.grad, view))
        return vector
