"""A function of a batch of items, as it stands or compiled, of all items at once or chunk by chunk."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalit.adapt import Iterate
from metalit.compiling.compiled import Compiled, Program
from metalit.private_torch import TreeSpec, pytree_map, tree_flatten, tree_unflatten
from metalit.training.outer_gradient import OuterGradient
from metalit.tree import Tree


class StepResult(NamedTuple):
    """What an outer step finds of a batch of items, such as tasks or rows.

    Attributes:
        gradient: the mean outer loss over the items, and its gradient.
        metrics: scalars by name, means over the items.
        per_item: what each item gives, with a leading dimension of items, such as the inner variable of each task.
    """

    gradient: OuterGradient
    metrics: dict[str, Tensor]
    per_item: Tree | Iterate


class FlatResult:
    """A :class:`StepResult` as its leaves: joining them would cost a small step much, and most need one alone."""

    def __init__(self, leaves: list[Any], spec: TreeSpec) -> None:
        self.leaves = leaves
        self.spec = spec

    @property
    def gradient(self) -> OuterGradient:
        """The first leaf."""
        return OuterGradient(self.leaves[0])

    def joined(self) -> Any:
        """What the function returned."""
        return tree_unflatten(self.leaves, self.spec)


class Batches:
    """Evaluates ``fn(shared, items)`` over batches of items, in chunks whose means are weighted by their sizes.

    Where a GPU's memory cannot hold a chunk, chunks are halved from then on.

    Args:
        fn: a function of what all items share and of trees with a leading dimension of items. It returns a named tuple:
            its field ``per_item`` has that dimension too, and its other fields are means over the items.
        module: the module that ``fn`` knows.
        compiles: whether ``fn`` is compiled.
        per_chunk: how many items are evaluated at once; all if not given.
        name: what ``fn`` is called in messages.
        tell: what takes the messages.
        items: what the items are called in messages, and in the argument ``…_per_chunk``.
        begin_again: is given what is shared, where an evaluation begins again in smaller chunks.
        seconds: how long compiling may take.
    """

    def __init__(
        self,
        fn: Callable[[Any, Any], Any],
        module: nn.Module,
        compiles: bool,
        per_chunk: int | None,
        name: str,
        tell: Callable[[str], None],
        items: str = "tasks",
        begin_again: Callable[[Any], None] | None = None,
        seconds: float = 300.0,
    ) -> None:
        self.fn = fn
        self.module = module
        self.compiled = Compiled(fn, module, name, tell, seconds) if compiles else None
        self.per_chunk = per_chunk
        self.tell = tell
        self.items = items
        self.begin_again = begin_again

    @property
    def is_compiled(self) -> bool:
        """Whether what comes next is compiled, as far as it is known."""
        return self.compiled is not None and not self.compiled.failed

    def stay_uncompiled(self) -> None:
        """Evaluate ``fn`` as it stands from now on."""
        self.compiled = None

    def wait_at_most(self, seconds: float) -> None:
        """Let the compiler take so long."""
        if self.compiled is not None:
            self.compiled.seconds = seconds

    def alike(self, fn: Callable[[Any, Any], Any], name: str) -> "Batches":
        """Another function of such batches, compiled or in chunks as this one is."""
        compiles, seconds = self.compiled is not None, self.compiled.seconds if self.compiled else 0.0
        return Batches(fn, self.module, compiles, self.per_chunk, name, self.tell, self.items, seconds=seconds)

    def program(self, values: Sequence[Any], spec: TreeSpec) -> Program:
        """What evaluates ``fn`` on arguments of this form."""
        return Program(self.fn, spec) if self.compiled is None else self.compiled.program(values, spec)

    def bind(self, shared: Any, items: Any) -> "Bound":
        """Make ready for items of one form, with what they share, whose tensors may change in place."""
        return Bound(self, shared, items)

    def __call__(self, shared: Any, items: Any) -> Any:
        """Evaluate ``fn(shared, items)``."""
        return self.bind(shared, items)(tree_flatten(items)[0]).joined()


class Bound:
    """:class:`Batches` made ready, so that many steps look nothing up."""

    def __init__(self, owner: Batches, shared: Any, items: Any) -> None:
        self.owner = owner
        self.shared = shared
        self.shared_leaves = tree_flatten(shared)[0]
        self.spec = tree_flatten((shared, items))[1]
        self.programs: dict[int, Program] = {}

    def __call__(self, values: Sequence[Any]) -> FlatResult:
        """Evaluate, given the leaves of the items.

        Raises:
            OutOfMemoryError: a single item does not fit.
        """
        count = len(next(value for value in values if isinstance(value, Tensor)))
        while True:
            sizes = _sizes(count, self.owner.per_chunk or count)
            size = sizes[0]
            try:
                return self._run(values, count) if size == count else self._in_chunks(values, sizes)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            if self.owner.begin_again is not None:
                self.owner.begin_again(self.shared)
            self.owner.per_chunk = half = (size + 1) // 2
            self.owner.tell(
                f"{size} {self.owner.items} at once do not fit into memory: going on with chunks of {half}; "
                f"model.{self.owner.items}_per_chunk={half} begins with them"
            )

    def _run(self, values: Sequence[Any], count: int) -> FlatResult:
        values = [*self.shared_leaves, *values]
        if count not in self.programs:
            self.programs[count] = self.owner.program(values, self.spec)
        program = self.programs[count]
        found = program(values)
        assert program.spec is not None  # since it was called
        return FlatResult(found, program.spec)

    def _in_chunks(self, values: Sequence[Any], sizes: list[int]) -> FlatResult:
        split = [value.split(sizes) if isinstance(value, Tensor) else [value] * len(sizes) for value in values]
        parts = [self._run(piece, n).joined() for piece, n in zip(zip(*split, strict=True), sizes, strict=True)]
        return FlatResult(*tree_flatten(_merged(parts, sizes)))


def _merged(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One named tuple of those of the chunks."""
    shares = [size / sum(sizes) for size in sizes]

    def mean(*values: Tensor) -> Any:
        return sum(value * share for value, share in zip(values, shares, strict=True))

    def joined(*values: Tensor) -> Tensor:
        return torch.cat(values)

    fields = {
        name: pytree_map(joined if name == "per_item" else mean, *(getattr(part, name) for part in parts))
        for name in parts[0]._fields
    }
    return parts[0]._replace(**fields)


def _sizes(count: int, most: int) -> list[int]:
    """Chunks of nearly the same size: BatchNorm could not take a last row alone."""
    chunks = -(-count // most)
    least, more = divmod(count, chunks)
    return [least + 1] * more + [least] * (chunks - more)
