"""Faults of a problem that its losses show on single tasks: what they write to, remember, draw, and read."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metalit.autodiff.draws import OtherGenerators
from metalit.autodiff.watch import Writes
from metalit.checking.subject import Subject, count_of
from metalit.private_torch import tree_leaves

Pieces = Mapping[str, Callable[[], Any]]


def faults_of_losses(subject: Subject) -> list[str]:
    """What is wrong, in the order in which it must be mended."""
    written = _written(subject)
    if written:  # all that follows would see other tasks
        return written
    kept = _remembered(subject.problem, lambda: _values(subject, 0))
    return kept or _drawn(subject) or _carried_over(subject)


def pieces(subject: Subject, task: Any, inner: Any = None) -> Pieces:
    """The functions of a problem by name, on one task; the losses at ``init``, unless an inner variable is given."""
    problem, own, last = subject.problem, subject.outer["problem"], max(0, subject.form.steps - 1)
    begin = problem.init(own, task) if inner is None else inner
    found = {"init": lambda: problem.init(own, task)}
    if tree_leaves(begin):
        found["inner_loss"] = lambda: problem.inner_loss(begin, own, task, last)
    found["outer_loss"] = lambda: problem.after(subject.form.steps).outer_loss(begin, own, task)
    return found


def named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a task, a tuple with names, or a dictionary, by their dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from named(part, f"{name}[{key!r}]")
    elif isinstance(value, tuple | list):
        keys = getattr(value, "_fields", range(len(value)))
        for key, part in zip(keys, value, strict=True):
            yield from named(part, f"{name}.{key}")


def same(first: Any, second: Any) -> bool:
    """Whether two trees hold the same bits, NaN included."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def _written(subject: Subject) -> list[str]:
    """What is changed of that which was given."""
    task, name = subject.one(), type(subject.problem).__name__
    own = {key: value.clone() for key, value in subject.outer["problem"].items()}
    begin = subject.problem.init(own, task)
    lent = {key: value.clone() for key, value in begin.items()} if isinstance(begin, dict) else begin.clone()
    given = [*named(task, "task"), *named(own, "outer"), *named(lent, "inner")]
    calls = {
        "init": lambda: subject.problem.init(own, task),
        "inner_loss": lambda: subject.problem.inner_loss(lent, own, task, 0) if tree_leaves(lent) else None,
        "outer_loss": lambda: subject.problem.after(subject.form.steps).outer_loss(lent, own, task),
    }
    found = []
    for piece, call in calls.items():
        with torch.no_grad(), Writes() as writes:
            call()
        changed = [label for label, leaf in given if leaf.numel() and writes.of_any([leaf])]
        if changed:
            found.append(
                f"{name}.{piece} changes {', '.join(changed)} in place, which was only lent to it; work on a copy, "
                "such as x.clone()"
            )
    return found


def _values(subject: Subject, index: int) -> Any:
    with torch.no_grad():
        return {name: call() for name, call in pieces(subject, subject.one(index)).items()}


def _remembered(problem: nn.Module, evaluate: Callable[[], Any]) -> list[str]:
    """Buffers that an evaluation changes: statistics of one task reach the next."""
    before = {name: value.clone() for name, value in problem.named_buffers()}
    evaluate()
    changed = [name for name, value in problem.named_buffers() if name in before and not same(before[name], value)]
    if not changed:
        return []
    return [
        f"{type(problem).__name__} changes {', '.join(changed)} whenever a task is evaluated: what it remembers of one "
        "task leaks into the others (running statistics of BatchNorm?); evaluate the network by metalit.autodiff.call, "
        "or set track_running_stats=False"
    ]


def _drawn(subject: Subject) -> list[str]:
    """Whether the same call says the same twice, and leaves all generators alone."""
    name = type(subject.problem).__name__
    state = torch.get_rng_state()
    with OtherGenerators() as others:
        first, second = _values(subject, 0), _values(subject, 0)
    moved = others.drawn or not torch.equal(state, torch.get_rng_state())
    other = [piece for piece in first if not same(first[piece], second[piece])]
    if not (moved or other):
        return []
    told = f"{name}.{other[0]} is different at each call" if other else f"{name} moves a global generator of numbers"
    return [
        f"{told}: it draws random numbers that do not follow the task (dropout?), so that a derivative is of another "
        "function than the loss; draw by metalit.keys from the task's key; metalit.autodiff.call(…, key=…) does so for "
        "torch.nn.Dropout"
    ]


def _carried_over(subject: Subject) -> list[str]:
    """Whether a task is judged alike before and after another one, and in a batch."""
    name = type(subject.problem).__name__
    if count_of(subject.tasks) < 2:
        return []
    first = _values(subject, 0)
    _values(subject, 1)
    if not same(first, _values(subject, 0)):
        return [f"{name} judges a task otherwise once it has seen another one: something leaks from task to task"]
    together, alone = subject.losses(subject.outer)[0], subject.of(1).losses(subject.outer)[0]
    if bool((together - alone).abs() > torch.finfo(subject.dtype).eps ** 0.5 * (1 + alone.abs())):
        return [
            f"{name}: the loss of the first task is {float(alone):.6g} by itself and {float(together):.6g} in a batch: "
            "tasks are mixed (statistics of BatchNorm over several tasks?)"
        ]
    return []
