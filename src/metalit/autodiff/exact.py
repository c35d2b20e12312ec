"""Operations whose second derivatives are wrong in torch, by their formulas."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metalit.errors import InputError
from metalit.private_torch import FUSED_WEIGHT_NORM, has_weight_norm


class ExactSecondDerivatives(TorchFunctionMode):
    """Computes ``torch._weight_norm`` by ``g v/‖v‖``: on a CPU, torch 2.13 differentiates it wrongly a second time.

    And ``tensor.data`` is a constant for every derivative: in ``torch.func`` it is one for the innermost alone.

    Attributes:
        read_data: whether there was any ``tensor.data``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read_data = False
        self._constants: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or the formula in its place."""
        if func is FUSED_WEIGHT_NORM:
            return _weight_norm(*args, **(kwargs or {}))
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]  # for torch's types it is no property
            self.read_data = True
            self._constants.append((args[0].detach(), args[0]))
            return self._constants[-1][0]
        if self._constants and args and _writes(func):
            for constant, tensor in self._constants:
                if args[0] is constant:  # no version counts this one
                    with torch.no_grad():
                        func(tensor.data, *args[1:], **(kwargs or {}))
                    return constant
        return func(*args, **(kwargs or {}))


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__setitem")) if name.endswith("__") else name.endswith("_")


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v/‖v‖``, with a norm for each index of ``dim``, or one of all entries for −1."""
    others = [place for place in range(v.dim()) if dim == -1 or place != dim]
    size = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1) if others else v.abs()
    return v * (g / size)


def exact_for(layers: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """A context in which second derivatives of these layers are exact; it does nothing where no layer needs it.

    Raises:
        InputError: a layer whose derivatives torch has wrong, and for which there is another.
    """
    layers = list(layers)
    check_exact(layers)
    return ExactSecondDerivatives() if any(map(has_weight_norm, layers)) else nullcontext()


def check_exact(layers: Iterable[nn.Module]) -> None:
    """Raise an :class:`InputError` for a layer whose derivatives are wrong in torch, by a third and more."""
    if any(isinstance(layer, nn.CrossMapLRN2d) for layer in layers):
        raise InputError(
            "network: torch differentiates CrossMapLRN2d wrongly; use LocalResponseNorm, which is the same"
        )
