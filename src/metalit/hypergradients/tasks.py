"""One function of many tasks: at once where torch can, one after the other where it cannot."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from metalit.autodiff.attention import plain_attention
from metalit.autodiff.blame import culprit, first_line, without_second_derivative
from metalit.autodiff.exact import ExactSecondDerivatives, check_exact, exact_for
from metalit.errors import InputError
from metalit.hypergradients.task_loop import in_a_loop, is_for
from metalit.private_torch import pytree_map, tree_flatten, tree_leaves, tree_unflatten
from metalit.problem import Problem
from metalit.scaled import Scaled

_RANDOMNESS = "randomness error mode"
_DRAWS = (
    "problem: it, or its network, draws random numbers that would not follow the task; use metalit.keys with the "
    "task's key, and in a network the layers of torch.nn that draw, such as torch.nn.Dropout"
)


def for_each_task(fn: Callable[[Any, Any], Any], shared: Any, tasks: Any, problem: Problem | None = None) -> Any:
    """Evaluate ``fn(shared, task)`` for every task of a batch at once; results get a leading task dimension.

    On a CPU, tasks of images come one after the other, in a program in a loop
    (:func:`metalit.hypergradients.task_loop.is_for`). So all that ``fn`` takes must come as an argument, but what is
    constant, and the parameters and buffers of ``problem``.

    Where that cannot be, though each task alone can, they are evaluated one after the other: the numbers are the same,
    and it is slower; a warning says so once. From then on all tasks of ``problem`` are evaluated so.

    Raises:
        InputError: the network draws random numbers that do not follow the task's key, or holds an operation whose
            second derivative is asked for and that has none.
    """
    if isinstance(problem, Scaled):
        problem = problem.problem
    with plain_attention():
        if problem is None or problem.reads_data is False:
            with exact_for(problem.modules() if problem is not None else ()):
                return _for_each(fn, shared, tasks, problem)
        check_exact(problem.modules())
        with ExactSecondDerivatives() as exact:
            found = _for_each(fn, shared, tasks, problem)
        problem.reads_data = problem.reads_data or exact.read_data
        return found


def _for_each(fn: Callable[[Any, Any], Any], shared: Any, tasks: Any, problem: Problem | None) -> Any:
    if problem is not None and problem.vectorised is None:
        problem.vectorised = True
        if layer := _recurrent(problem):
            _give_up(problem, f"{layer} has no rule for many at once")
    if problem is not None and not problem.vectorised:
        return _one_after_the_other(fn, shared, tasks, problem)
    if problem is not None and is_for(problem, tasks):
        in_turn = _one_after_the_other if get_proxy_mode() is None else in_a_loop
        return in_turn(fn, shared, tasks, problem)
    dims = pytree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, tasks)
    try:
        return vmap(fn, in_dims=(None, dims))(shared, tasks)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a network may do that a batched tensor cannot
        if _RANDOMNESS not in str(error):  # of one task, it may follow its key
            _raise_if_clear(error)
        if get_proxy_mode() is not None:  # it is traced, and may fail for that reason alone
            raise
        found = _one_after_the_other(fn, shared, tasks, problem)
        place = culprit(error, problem) if problem is not None else ""
        _give_up(problem, f"{place + ': ' if place else ''}{first_line(error).split('. ')[0]}")
        return found


def _give_up(problem: Problem | None, reason: str) -> None:
    if problem is not None:
        problem.vectorised = False
    warnings.warn(
        f"tasks are evaluated one after the other, which is exact and slower: {reason}",
        stacklevel=4,
    )


def _one_after_the_other(fn: Callable[[Any, Any], Any], shared: Any, tasks: Any, problem: Problem | None) -> Any:
    values, spec = tree_flatten(tasks)
    count = len(next(value for value in values if isinstance(value, Tensor)))
    each = [[value[number] if isinstance(value, Tensor) else value for value in values] for number in range(count)]
    drawn = _generators()
    # cuDNN's recurrent layers have no second derivative either
    plain = torch.backends.cudnn.flags(enabled=False) if problem is not None and _recurrent(problem) else nullcontext()
    try:
        with plain:
            found = [fn(shared, tree_unflatten(leaves, spec)) for leaves in each]
    except Exception as error:
        _raise_if_clear(error)
        raise
    if any(not torch.equal(now, before) for now, before in zip(_generators(), drawn, strict=True)):
        raise InputError(_DRAWS)
    form = tree_flatten(found[0])[1]
    return tree_unflatten([torch.stack(parts) for parts in zip(*map(tree_leaves, found), strict=True)], form)


def _generators() -> list[Tensor]:
    """The states of the global generators, from which nothing may draw."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def _recurrent(problem: Problem) -> str:
    """The first recurrent layer, for which torch has no batching rule; under ``vmap`` it may even be wrong."""
    for name, layer in problem.named_modules():
        if isinstance(layer, nn.RNNBase):
            return f"layer {name!r} ({type(layer).__name__})"
    return ""


def _raise_if_clear(error: Exception) -> None:
    """Raise an :class:`InputError` if the cause of an error is clear."""
    if _RANDOMNESS in str(error):
        raise InputError(_DRAWS) from error
    if "setup_context" in str(error):
        raise InputError(
            "problem: a torch.autograd.Function of its own, or of its network, needs a forward without ctx and a "
            "setup_context, and generate_vmap_rule = True"
        ) from error
    if "saved tensor hooks" in str(error):
        raise InputError(
            "problem: torch.utils.checkpoint cannot be differentiated here; leave it out: hypergradient Recomputed and "
            "model.tasks_per_chunk save memory"
        ) from error
    if isinstance(error, torch.linalg.LinAlgError):
        raise InputError(
            "problem: a matrix that is inverted became singular, such as the Hessian of the inner loss; give Newton, "
            "or Implicit, a positive damping=, or regularise the inner loss"
        ) from error
    operation = without_second_derivative(error)
    if operation:
        raise InputError(
            f"problem: torch has no second derivative of {operation}, which it or its network uses; use hypergradient "
            "FirstOrder with SGD inside, which needs none, or write it with operations that have one"
        ) from error
