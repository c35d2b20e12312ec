"""Outer optimisers and schedulers: built with errors that name their owner, grouped by name, compared on resume."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor

from metalit.autodiff.names import matching
from metalit.errors import InputError

_SCHEDULERS = (torch.optim.lr_scheduler.LRScheduler, ReduceLROnPlateau)


def optimizer_of(module: LightningModule) -> torch.optim.Optimizer:
    """The outer optimiser of a learner, as it was made: the only one that it has."""
    return cast(torch.optim.Optimizer, module.optimizers(use_pl_optimizer=False))


def made_optimizer(
    make: OptimizerCallable | None, parameters: dict[str, Tensor], lr_by_name: dict[str, float], fused: bool
) -> torch.optim.Optimizer:
    """Build the outer optimiser, with a parameter group for each pattern of ``lr_by_name``.

    Args:
        make: makes it; Adam with step size 0.001 if not given.
        parameters: the outer variable, by name.
        lr_by_name: see :func:`groups`.
        fused: whether that Adam is torch's fused one.

    Raises:
        InputError: it cannot be made, or evaluates the loss itself; what :func:`groups` raises.
    """
    parts = groups(parameters, lr_by_name)
    make = partial(torch.optim.Adam, fused=fused) if make is None else make
    optimizer = made("model.optimizer", make, parts, (torch.optim.Optimizer,))
    check_takes_single_steps(optimizer)
    return optimizer


def made_scheduler(make: LRSchedulerCallable, optimizer: torch.optim.Optimizer, validates: bool) -> Any:
    """Build the scheduler of the outer optimiser.

    Args:
        make: makes it.
        optimizer: what it schedules.
        validates: whether there are validations.

    Raises:
        InputError: it cannot be made, or cannot step; one that waits for a metric that it does not name, or that never
            comes.
    """
    rehearse("model.scheduler", make, optimizer, _SCHEDULERS)
    scheduler = made("model.scheduler", make, optimizer, _SCHEDULERS)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and not hasattr(scheduler, "monitor"):
        raise InputError(
            "model.scheduler: torch's ReduceLROnPlateau does not know its metric; use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor: val/loss"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and not validates:
        raise InputError(
            f"model.scheduler: ReduceLROnPlateau waits for {scheduler.monitor!r}, and nothing is validated; "
            "hold tasks out for validation, or use another scheduler"
        )
    return scheduler


def made(owner: str, make: Callable[[Any], Any], argument: Any, kinds: tuple[type, ...]) -> Any:
    """Build an optimiser or a scheduler; what torch finds wrong is an input error of its owner's.

    Raises:
        InputError: also where what is built is none of ``kinds``.
    """
    if not callable(make):
        raise InputError(f"{owner}={make!r} must be a function that makes it, such as functools.partial(Adam, lr=0.1)")
    try:
        found = make(argument)
    except Exception as error:  # whatever a class or a function of the user's may raise
        raise InputError(f"{owner}: {first_line(error)}") from error
    if not isinstance(found, kinds):
        told = " or ".join(
            dict.fromkeys(f"{kind.__module__.removesuffix('.optimizer')}.{kind.__name__}" for kind in kinds)
        )
        raise InputError(f"{owner}: what it makes is a {type(found).__name__}, {found!r:.80}, and must be a {told}")
    return found


def rehearse(owner: str, make: Callable[[Any], Any], optimizer: torch.optim.Optimizer, kinds: tuple[type, ...]) -> None:
    """Let a scheduler take two steps on a copy of the optimiser with a number in place of each parameter.

    Raises:
        InputError: it cannot be made, or cannot step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copy = deepcopy(optimizer, {id(parameter): torch.zeros((), requires_grad=True) for parameter in parameters})
    scheduler = made(owner, make, copy, kinds)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):  # steps by a metric
        return
    try:
        for _ in range(2):
            copy.step()
            scheduler.step()
    except Exception as error:  # likewise
        raise InputError(f"{owner}: {type(scheduler).__name__} cannot step: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The message of an error as one line, with its type where that is not plain from the message."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {text}"


def check_takes_single_steps(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser needs nothing but the gradient.

    Raises:
        InputError: one that evaluates the loss itself, such as LBFGS.
    """
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"model.optimizer: {type(optimizer).__name__} evaluates the loss several times in a step, and an outer "
            "step evaluates it once; use one that does not, such as Adam or SGD"
        )


def check_not_frozen(parameters: dict[str, Tensor]) -> None:
    """Check that all outer parameters are trainable.

    Raises:
        InputError: one is not, such as a learned step size.
    """
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise InputError(
            f"model: {frozen[0]!r} is frozen, and belongs to what is learned all the same; give it the rate 0 in "
            f"model.lr_by_name: {{{frozen[0]!r}: 0}}"
        )


def check_knows(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> None:
    """Check that an optimiser has all parameters that are trainable.

    Raises:
        InputError: one became so after it was made.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    unknown = [name for name, parameter in parameters.items() if id(parameter) not in known]
    if unknown:
        raise InputError(
            f"model: {unknown[0]!r} became trainable when the optimiser was made already ({len(unknown)} such "
            "parameter(s)); add them by its add_param_group too, or make them trainable before training"
        )


def groups(parameters: dict[str, Tensor], lr_by_name: dict[str, float]) -> Sequence[dict[str, Any]]:
    """Make parameter groups by shell-style patterns of names, the first match counts.

    Raises:
        InputError: a negative rate, or a pattern that matches nothing.
    """
    rest = dict(parameters)
    found = []
    for pattern, lr in lr_by_name.items():
        if not lr >= 0:
            raise InputError(f"model.lr_by_name: the rate {lr} of {pattern!r} must not be negative")
        left_over = " that an earlier pattern left over" if len(rest) < len(parameters) else ""
        chosen = matching(rest, pattern, "model.lr_by_name", f"outer parameter{left_over}")
        found.append({"params": [rest.pop(name) for name in chosen], "lr": lr, "name": pattern})
    if rest:
        found.insert(0, {"params": list(rest.values())})
    return found
