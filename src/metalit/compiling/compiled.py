"""Pure functions of trees of tensors as compiled programs, and as they stand where that cannot be.

Dynamo is not asked: the function runs once on tensors without data (``make_fx``), vmap and every derivative
included, and what it did is compiled as one program with no guards. So a network may do in Python whatever it likes,
as long as it does the same each time; and the call costs little more than the arithmetic.
"""

from collections.abc import Callable
from math import isfinite
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from metalit.autodiff.untouched import Kept
from metalit.compiling.cache import keep_private
from metalit.compiling.compiler import found_in_cache, import_compiler, quiet
from metalit.compiling.durations import expected, remember
from metalit.compiling.patience import GivenUpError, patiently
from metalit.compiling.program import CompiledProgram, Host, Program, Values, autocast_of, form_of
from metalit.private_torch import TreeSpec, tree_flatten, tree_unflatten

_DRAWS, _UNITS = 4, 8  # how often, and by how many units in its last place, arguments are moved


class Compiled:
    """``fn`` compiled for each form of its arguments: tree, shapes, types, devices, numbers that are no tensors.

    The first call of a form waits for the compiler, runs the program beside ``fn``, and keeps it only if both agree to
    √ε, or as far as rounding moves ``fn`` itself; programs lie in a cache on disk
    (:func:`~metalit.compiling.cache.keep_private`), where the next process finds them. Where there is no C++ compiler,
    ``fn`` cannot be traced, this takes too long, or the results differ, ``fn`` itself runs from then on.

    Args:
        fn: a pure function of trees, that returns a tree; it must not differentiate with respect to anything outside.
        module: its parameters and buffers may change between calls; whatever else ``fn`` knows may not.
        name: what ``fn`` is called in messages.
        tell: what takes the messages: what is waited for, how long it took, or in one line why nothing is compiled.
        seconds: how long a program may take.

    Raises:
        BaseException: what :func:`~metalit.compiling.patience.give_up` was told to raise instead.

    >>> double = Compiled(lambda tree: {"y": 2 * tree["x"]}, tell=lambda line: None)
    >>> double({"x": torch.tensor([1.0, 2.0])})
    {'y': tensor([2., 4.])}
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        module: nn.Module | None = None,
        name: str = "the outer step",
        tell: Callable[[str], None] = print,
        seconds: float = 300.0,
    ) -> None:
        self.fn = fn
        self.name = name
        self.tell = tell
        self.seconds = seconds
        self.host = Host(fn, module)
        self.failed = False
        self._programs: dict[Any, Program] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the programs, which a copy finds in the cache."""
        return {**self.__dict__, "_programs": {}}

    def __call__(self, *trees: Any) -> Any:
        """Evaluate ``fn(*trees)``."""
        values, spec = tree_flatten(trees)
        program = self.program(values, spec)
        found = program(values)
        assert program.spec is not None  # since it was called
        return tree_unflatten(found, program.spec)

    def program(self, values: Values, spec: TreeSpec) -> "Program":
        """The program for arguments of this form: the leaves of a tuple of trees, and how they lie in it."""
        if self.failed:
            return Program(self.fn, spec)
        form = (spec, autocast_of(values), *self.host.modes(), *map(form_of, values))
        if form not in self._programs:
            self._programs[form] = self._made(values, spec)
        return self._programs[form]

    def _made(self, values: Values, spec: TreeSpec) -> "Program":
        plain = Program(self.fn, spec)
        self.tell(f"compiling {self.name}; once done, the next start of this configuration finds it in the cache")
        begun, made = monotonic(), _Making(self, values, spec)
        try:
            program = patiently(made, self.seconds, made.sign, import_compiler)
        except torch.OutOfMemoryError:
            raise
        except GivenUpError as error:
            if error.instead is not None:
                raise error.instead from None
            return self._given_up(plain, f"compiling was given up: {error}")
        except Exception as error:  # whatever tracing the user's code, the compiler or its program may raise
            return self._given_up(plain, _cause(error))
        self.tell(f"compiled {self.name} in {monotonic() - begun:.0f} s")
        return program

    def _given_up(self, plain: "Program", why: str) -> "Program":
        self.failed = True
        self.tell(f"{self.name} is not compiled, and runs as it stands: {why}")
        return plain


class _Making:
    """Makes a program and tries it out, with the time that this is expected to take."""

    def __init__(self, owner: Compiled, values: Values, spec: TreeSpec) -> None:
        self.owner = owner
        self.values = values
        self.spec = spec
        self.expected: float | None = None

    def __call__(self) -> "Program":
        """Make it."""
        owner, begun, found = self.owner, monotonic(), found_in_cache()
        folder = keep_private(owner.tell)
        kept = Kept(owner.host.held, values=True)
        try:
            with quiet():
                program = CompiledProgram(owner.host, self.spec, self.values)
                self.expected = expected(folder, program.size)
                program.compile(self.values)
            kept.restore()
            results, right = program(self.values), Program(owner.fn, self.spec)(self.values)
            apart = describe_difference(results, right)
            if apart and distance(results, right) <= 2 * self.moved_by_rounding(right):
                apart = ""
        finally:
            kept.restore()
        if apart:
            raise ArithmeticError(f"its results differ from those that are not compiled, {apart}")
        if found_in_cache() == found:
            remember(folder, program.size, monotonic() - begun)
        return program

    def moved_by_rounding(self, right: list[Any]) -> float:
        """How far ``fn`` goes where each number of its arguments moves by a few units in its last place.

        It is next to nothing where ``fn`` is smooth. Where a unit lies at a kink of ReLU, or two are equal in a pool,
        it falls to either side, and then nobody's rounding is the right one.
        """
        far = 0.0
        for draw in range(_DRAWS):
            signs = torch.Generator().manual_seed(draw)
            nudged = [_nudged(value, signs) for value in self.values]
            far = max(far, distance(Program(self.owner.fn, self.spec)(nudged), right))
        return far

    def sign(self, passed: float) -> None:
        """Say that it goes on, and how long it will."""
        about = "" if self.expected is None else f" of about {max(self.expected, passed):.0f} s"
        self.owner.tell(f"still compiling {self.owner.name}: {passed:.0f} s{about}")


def describe_difference(found: list[Any], right: list[Any]) -> str:
    """In words how far two results are apart, if it is more than rounding explains.

    They are compared as one vector each: the residual of a solver, say, may be nothing but rounding.
    """
    eps = max((torch.finfo(autocast_of([other]) or other.dtype).eps for other in right if _is_real(other)), default=0.0)
    difference = distance(found, right)
    size = sum(float(other.double().square().sum()) for other in right if _is_real(other)) ** 0.5
    if isfinite(size) and not difference <= eps**0.5 * size:
        return f"by {difference:.3g} in {size:.3g}"
    return ""


def distance(found: list[Any], right: list[Any]) -> float:
    """The norm of the difference of all real numbers of two results."""
    pairs = [(one.double(), other.double()) for one, other in zip(found, right, strict=True) if _is_real(other)]
    return sum(float((one - other).square().sum()) for one, other in pairs) ** 0.5


def _nudged(value: Any, signs: torch.Generator) -> Any:
    if not _is_real(value):
        return value
    up = torch.randint(2, value.shape, generator=signs, dtype=torch.int8).to(value.device).bool()
    return value * (1 + _UNITS * torch.finfo(value.dtype).eps * torch.where(up, 1.0, -1.0).to(value.dtype))


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
