"""The mean hypergradient over a batch of tasks: as it stands or compiled, of all tasks at once or chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalit.compiled import Compiled, Program
from metalit.private_torch import TreeSpec, tree_flatten, tree_unflatten
from metalit.tree import Tree, flatten


class Found(NamedTuple):
    """What a batch of tasks gives: ``packed`` and ``metrics`` are means over them, ``inner`` has a task dimension."""

    packed: Tensor
    inner: Tree
    metrics: dict[str, Tensor]


def packed(loss: Tensor, gradient: Tree) -> Tensor:
    """All that the ranks average, as one vector: the loss, the gradient, and 1 if one of these is not finite, or 0."""
    values = torch.cat([loss.detach().reshape(1), flatten(gradient)])
    return torch.cat([values, (~torch.isfinite(values).all()).to(values.dtype).reshape(1)])


@dataclass
class Leaves:
    """The leaves of a :class:`Found`, which becomes one where more than its first is asked for."""

    values: list[Any]
    spec: TreeSpec

    @property
    def packed(self) -> Tensor:
        """The first leaf."""
        return self.values[0]

    def found(self) -> Found:
        """All of them."""
        return tree_unflatten(self.values, self.spec)


class Estimates:
    """Evaluates ``fn(outer, tasks, start)`` over batches of tasks, in chunks whose means are weighted by their tasks.

    Where a GPU's memory cannot hold a chunk, chunks are halved from then on.

    Args:
        fn: returns a :class:`Found`.
        module: the module that ``fn`` knows.
        compiles: whether ``fn`` is compiled.
        tasks_per_chunk: how many tasks are evaluated at once; all if not given.
        name: what ``fn`` is called in messages.
        tell: what takes the messages.
        what: what the tasks are called in messages, and in the argument ``…_per_chunk``.
        seconds: how long compiling may take.
        again: is given the outer variable where an evaluation begins anew, in smaller chunks.
    """

    def __init__(
        self,
        fn: Callable[..., Found],
        module: nn.Module,
        compiles: bool,
        tasks_per_chunk: int | None,
        name: str,
        tell: Callable[[str], None],
        what: str = "tasks",
        again: Callable[[Any], None] | None = None,
        seconds: float = 300.0,
    ) -> None:
        self.fn = fn
        self.compiled = Compiled(fn, module, name, tell, seconds) if compiles else None
        self.tasks_per_chunk = tasks_per_chunk
        self.tell = tell
        self.what = what
        self.again = again

    def program(self, values: Sequence[Any], spec: TreeSpec) -> Program:
        """What evaluates ``fn`` on arguments of this form."""
        return Program(self.fn, spec) if self.compiled is None else self.compiled.program(values, spec)

    def bind(self, outer: Any, tasks: Any, start: Any) -> "Bound":
        """Make ready for tasks and starts of one form at one outer variable, whose tensors may change in place."""
        return Bound(self, outer, tasks, start)

    def __call__(self, outer: Any, tasks: Any, start: Any) -> Found:
        """Evaluate."""
        return self.bind(outer, tasks, start)(tree_flatten((tasks, start))[0]).found()


class Bound:
    """:class:`Estimates` made ready, so that many steps look nothing up."""

    def __init__(self, owner: Estimates, outer: Any, tasks: Any, start: Any) -> None:
        self.owner = owner
        self.outer = outer
        self.shared = tree_flatten(outer)[0]
        self.spec = tree_flatten((outer, tasks, start))[1]
        self.programs: dict[int, Program] = {}

    def __call__(self, values: Sequence[Any]) -> Leaves:
        """Evaluate, given the leaves of tasks and start.

        Raises:
            OutOfMemoryError: a single task does not fit.
        """
        count = len(next(value for value in values if isinstance(value, Tensor)))
        while True:
            sizes = _sizes(count, self.owner.tasks_per_chunk or count)
            size = sizes[0]
            try:
                return self._run(values, count) if size == count else self._in_chunks(values, count, sizes)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            if self.owner.again is not None:
                self.owner.again(self.outer)
            self.owner.tasks_per_chunk = (size + 1) // 2
            self.owner.tell(
                f"{size} {self.owner.what} at once do not fit into memory: going on with chunks of "
                f"{self.owner.tasks_per_chunk}; model.{self.owner.what}_per_chunk={self.owner.tasks_per_chunk} begins "
                "with them"
            )

    def _run(self, values: Sequence[Any], count: int) -> Leaves:
        values = [*self.shared, *values]
        if count not in self.programs:
            self.programs[count] = self.owner.program(values, self.spec)
        program = self.programs[count]
        found = program(values)
        return Leaves(found, program.spec)

    def _in_chunks(self, values: Sequence[Any], count: int, sizes: list[int]) -> Leaves:
        split = [value.split(sizes) if isinstance(value, Tensor) else [value] * len(sizes) for value in values]
        parts = [self._run(piece, n) for piece, n in zip(zip(*split, strict=True), sizes, strict=True)]
        kept = parts[0].spec.children()[1].num_leaves
        merged = []
        for place, leaves in enumerate(zip(*(part.values for part in parts), strict=True)):
            if 1 <= place <= kept:
                merged.append(torch.cat(leaves))
            else:
                merged.append(sum(leaf * (n / count) for leaf, n in zip(leaves, sizes, strict=True)))
        return Leaves(merged, parts[0].spec)


def _sizes(count: int, most: int) -> list[int]:
    """Chunks of nearly the same size: BatchNorm could not take a last row alone."""
    chunks = -(-count // most)
    least, more = divmod(count, chunks)
    return [least + 1] * more + [least] * (chunks - more)
