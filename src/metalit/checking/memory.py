"""What an outer step on all tasks would take, from measurements on few."""

from dataclasses import dataclass
from functools import partial

import torch

from metalit.checking.peak import available, peak_of
from metalit.checking.subject import Subject, count_of
from metalit.errors import InputError
from metalit.hypergradients import Direct, Hypergradient, Recomputed, Unrolled
from metalit.private_torch import tree_leaves


@dataclass(frozen=True)
class Memory:
    """Bytes of an outer step, in the learner's precision.

    Attributes:
        tasks: of an outer step.
        all_at_once: by way of it (``configured``, ``Unrolled``, ``Recomputed``), the bytes of all tasks at once.
        one_by_one: likewise, in chunks of one task.
        measured: on how many tasks.
        there_are: what is free, None if that is not known.
    """

    tasks: int
    all_at_once: dict[str, int]
    one_by_one: dict[str, int]
    measured: tuple[int, int]
    there_are: int | None


def memory_of(plain: Subject, tasks: int) -> Memory:
    """Measure on two sizes, and draw a line through both.

    Args:
        plain: in the learner's precision, on as many tasks as may be taken.
        tasks: those of an outer step.
    """
    count = count_of(plain.tasks)
    sizes = (max(1, count // 2), count)
    device = next(iter(tree_leaves(plain.outer))).device
    ways: dict[str, Hypergradient] = {type(plain.form).__name__: plain.form}
    if plain.form.steps and not isinstance(plain.form, Direct):
        ways |= {kind.__name__: kind(plain.form.steps, plain.weights) for kind in (Unrolled, Recomputed)}
    whole, single = {}, {}
    for name, way in ways.items():
        try:
            low, high = (peak_of(partial(plain.of(size).estimate, way), device) for size in sizes)
        except InputError:  # which the table of estimators tells
            continue
        each = (high - low) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else high
        whole[name] = int(high + each * (tasks - sizes[1]))
        kept = sum(leaf.nbytes for leaf in tree_leaves(plain.begin()) if isinstance(leaf, torch.Tensor))
        single[name] = int(max(low - each * (sizes[0] - 1), 0)) + kept * tasks
    return Memory(tasks, whole, single, sizes, available(device))


def told_of_memory(memory: Memory, per_chunk: int | None) -> tuple[list[str], list[str]]:
    """Problems and remarks: more than there is."""
    if memory.there_are is None or not memory.all_at_once:
        return [], []
    name, need = next(iter(memory.all_at_once.items()))
    least = memory.one_by_one[name]
    each = (need - least) / max(1, memory.tasks - 1)
    if per_chunk is not None:
        need = int(least + each * (min(per_chunk, memory.tasks) - 1))
    if need <= memory.there_are:
        return [], []
    fits = int((0.8 * memory.there_are - least) / each) + 1 if each > 0 else 0
    way = (
        f"set model.tasks_per_chunk={fits}" if fits >= 1 else "not one task fits: use Recomputed, or a smaller network"
    )
    return [f"memory: an outer step takes {size(need)}, and {size(memory.there_are)} are free; {way}"], []


def size(count: float) -> str:
    """Bytes as people write them.

    >>> size(512), size(3_500_000)
    ('512 B', '3.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
