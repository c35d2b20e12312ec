"""Tasks of images on a CPU: one after the other, in a program in a loop that is compiled once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from metalit.autodiff.images import ChannelsLast, sees_images
from metalit.autodiff.untouched import untouched
from metalit.compiling.loops import repeated
from metalit.private_torch import pytree_map, tree_leaves
from metalit.problem import Problem

_LARGE = 2**13  # numbers in the images of a task, as ten of 28 × 28 pixels have


def is_for(problem: Problem, tasks: Any) -> bool:
    """Whether one task after the other is faster: on a CPU, where the problem holds convolutions of images.

    What one task needs stays in the processor's cache, where the images of all tasks do not; and a vectorised
    convolution is a grouped one, of which a CPU has no fast kernel. In a program that is so of all images; without one,
    where they are large enough for the calls not to count.
    """
    tensors = [leaf for leaf in tree_leaves(tasks) if isinstance(leaf, Tensor)]
    if not (all(leaf.device.type == "cpu" for leaf in tensors) and sees_images(problem.modules())):
        return False
    return get_proxy_mode() is not None or any(leaf[0].numel() >= _LARGE for leaf in tensors)


def in_a_loop(fn: Callable[[Any, Any], Any], shared: Any, tasks: Any, problem: Problem) -> Any:
    """Evaluate ``fn(shared, task)`` for every task; results get a leading task dimension.

    Args:
        fn: what it takes from elsewhere but ``problem`` must be constant.
        shared, tasks: trees; every tensor of ``tasks`` has a leading task dimension.
        problem: its parameters and buffers are read as they are now.
    """
    host = _Host(problem)
    count = len(next(leaf for leaf in tree_leaves(tasks) if isinstance(leaf, Tensor)))

    def of_one(number: Tensor, tensors: dict[str, Tensor], shared: Any, tasks: Any) -> Any:
        task = pytree_map(lambda leaf: _row(leaf, number) if isinstance(leaf, Tensor) else leaf, tasks)
        with untouched(host), ChannelsLast():
            return functional_call(host, tensors, (fn, shared, task))

    def step(number: Tensor, found: Any, given: Any) -> Any:
        here = torch.arange(count) == number

        def put(rows: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # not rows[number] = …: a loop's body must not write into its arguments
            return torch.where(here.reshape(-1, *[1] * leaf.dim()), leaf, rows)

        return pytree_map(put, found, of_one(number, *given))

    given = host.tensors(), shared, tasks
    # one evaluation tells the form of what each task finds; no number of it is used, and the program leaves it out
    form = of_one(torch.tensor(0), *given)
    return repeated(step, torch.tensor(count), pytree_map(lambda leaf: _empty(leaf, count), form), given)


class _Host(nn.Module):
    """Holds the problem, so that ``fn`` can be called with other tensors of it: those that the loop is given."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in (*self.named_parameters(), *self.named_buffers())}

    def forward(self, fn: Callable[[Any, Any], Any], shared: Any, task: Any) -> Any:
        return fn(shared, task)


def _row(rows: Tensor, number: Tensor) -> Tensor:
    return rows.index_select(0, number.reshape(1)).squeeze(0)


def _empty(leaf: Any, count: int) -> Any:
    return torch.zeros(count, *leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf
