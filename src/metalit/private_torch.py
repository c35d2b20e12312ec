"""All names that torch calls private, one small function each; ``tests/private/`` holds what they mean.

Those of the compiler are in :mod:`metalit.compiling.compiler` and :mod:`metalit.compiling.cache`.

Overridden where they belong, and held by the same tests: ``nn.Module._apply`` (:mod:`metalit.unrounded`),
``nn.Module._save_to_state_dict`` and ``_load_from_state_dict`` (:mod:`metalit.problems.low_rank`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
from torch.nn.utils.parametrizations import _WeightNorm as ParametrizedWeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils._pytree import tree_map as pytree_map
from torch.utils.data._utils.collate import default_collate_fn_map

__all__ = [
    "BatchNorm",  # this and the three below: base classes, so that layers of the user's are treated alike
    "Dropout",
    "InstanceNorm",
    "ParametrizedWeightNorm",
    "TorchDispatchMode",  # sees what is written to, also by .data and under no_grad
    "TreeSpec",  # this and those below: of named tuples, lists and dictionaries, which has no public name yet
    "pytree_map",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]

MODULE_TABLES = ("_parameters", "_buffers", "_modules")  # where a module keeps them, None included, which is not named
RECURRENT_LISTS = ("_flat_weights", "_flat_weight_refs")  # where a recurrent layer keeps its weights a second time
FUSED_WEIGHT_NORM = torch._weight_norm  # the operation, to recognise it among others


# ---- tensors


def is_batched(value: Tensor) -> bool:
    """Whether a tensor stands for many under ``torch.func.vmap``; torch has no public question for it."""
    while _functorch.is_functorch_wrapped_tensor(value):
        if _functorch.is_batchedtensor(value):
            return True
        value = _functorch.get_unwrapped(value)
    return False


def is_traced(value: Tensor) -> bool:
    """Whether a tensor has no value yet, since what is done to it is written down."""
    return isinstance(bottom(value), FakeTensor)


def bottom(value: Tensor) -> Tensor:
    """The plain tensor below all transforms of ``torch.func``, which alone has memory."""
    while _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
    return value


def memory(value: Tensor) -> int:
    """A number of the memory that a plain strided tensor lies in; unlike ``data_ptr``, also of an empty one."""
    return value.untyped_storage()._cdata


def written_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that a call of an operation of ``torch.ops`` may write to, as its schema says."""
    schema = operation._schema
    if schema.is_mutable:
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield args[place] if place < len(args) else kwargs.get(argument.name)


def copy_all(places: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value to its place, in one call: a loop in Python costs more than a small outer step."""
    torch._foreach_copy_(places, values)


# ---- modules


def parameters_of(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of a layer's own parameters itself: ``named_parameters`` leaves out None, and cannot be written to."""
    return layer._parameters


def buffers_of(layer: nn.Module) -> dict[str, Tensor | None]:
    """The table of a layer's own buffers itself."""
    return layer._buffers


def children_of(layer: nn.Module) -> dict[str, nn.Module | None]:
    """The table of a layer's own layers itself."""
    return layer._modules


def has_weight_norm(layer: nn.Module) -> bool:
    """Whether ``weight_norm``, old or new, makes the layer's weight: each leaves a trace that is private."""
    return isinstance(layer, ParametrizedWeightNorm) or any(
        isinstance(hook, WeightNorm) for hook in layer._forward_pre_hooks.values()
    )


def draws_its_windows(layer: nn.FractionalMaxPool2d | nn.FractionalMaxPool3d) -> bool:
    """Whether a fractional pooling draws its windows, which were not given."""
    return layer._random_samples is None


# ---- data and optimisers


def collate_by(kind: type, collate: Callable[..., Any]) -> None:
    """Let every ``DataLoader`` stack values of this type so: there is no public place to tell it."""
    default_collate_fn_map[kind] = collate


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks of its own are called before or after an optimiser's step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Note that an optimiser has stepped, though not by ``step()``: its scheduler would warn."""
    vars(optimizer)["_opt_called"] = True


def unscales_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser divides gradients by a ``GradScaler``'s scale within its step, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# what the state of a scheduler holds of its progress, under private names
SCHEDULER_PROGRESS = ("_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step")
