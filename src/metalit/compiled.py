"""Pure functions of trees of tensors as compiled programs, and as they stand where that cannot be.

Dynamo is not asked: the function runs once on tensors without data (``make_fx``), vmap and every derivative
included, and what it did is compiled as one program with no guards. So a network may do in Python whatever it likes,
as long as it does the same each time; and the call costs little more than the arithmetic.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop_op
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from metalit.autodiff.untouched import Kept, untouched
from metalit.cache import keep_private
from metalit.compiler import found_in_cache, import_compiler, quiet
from metalit.durations import expected, remember
from metalit.patience import GivenUpError, patiently
from metalit.private_torch import TreeSpec, tree_flatten, tree_unflatten

Values = Sequence[Any]

# a singular matrix gives what is not finite, which stops the run; the check that raises would order the program's calls
_UNCHECKED = {torch.ops.aten._linalg_check_errors.default: lambda *_, **__: None}
_OPTIONS = {
    # a program with a loop is kept in the cache as well: what it loops over is part of the graph, and so of its key
    "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": torch.__version__},
}
_ON_CPU = {
    # the calls between kernels in C++ too: from Python they cost as much as small kernels
    "cpp_wrapper": True,
    # a value that is used twice is written out twice, until it is of so many operations: a chain that doubles, as a
    # hash does, would otherwise be written out a thousand times
    "realize_opcount_threshold": 20,
}
_ELSEWHERE = {
    # kernels are not tried out against each other: which is fastest would differ from run to run, and so would the last
    # digits of a run that goes on
    "deterministic": True,
}


class Compiled:
    """``fn`` compiled for each form of its arguments: tree, shapes, types, devices, numbers that are no tensors.

    The first call of a form waits for the compiler, runs the program beside ``fn``, and keeps it only if both agree to
    √ε; programs lie in a cache on disk (:func:`~metalit.cache.keep_private`), where the next process finds them.
    Where there is no C++ compiler, ``fn`` cannot be traced, this takes too long, or the results differ, ``fn`` itself
    runs from then on.

    Args:
        fn: a pure function of trees, that returns a tree; it must not differentiate with respect to anything outside.
        module: its parameters and buffers may change between calls; whatever else ``fn`` knows may not.
        name: what ``fn`` is called in messages.
        tell: what takes the messages: what is waited for, how long it took, or in one line why nothing is compiled.
        seconds: how long a program may take.

    Raises:
        BaseException: what :func:`~metalit.patience.give_up` was told to raise instead.

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
        self.host = _Host(fn, module)
        self.failed = False
        self._programs: dict[Any, Program] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the programs, which a copy finds in the cache."""
        return {**self.__dict__, "_programs": {}}

    def __call__(self, *trees: Any) -> Any:
        """Evaluate ``fn(*trees)``."""
        values, spec = tree_flatten(trees)
        program = self.program(values, spec)
        return tree_unflatten(program(values), program.spec)

    def program(self, values: Values, spec: TreeSpec) -> "Program":
        """The program for arguments of this form: the leaves of a tuple of trees, and how they lie in it."""
        if self.failed:
            return Program(self.fn, spec)
        form = (spec, _autocast(values), *self.host.modes(), *map(_form, values))
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
            apart = _apart(program(self.values), Program(owner.fn, self.spec)(self.values))
        finally:
            kept.restore()
        if apart:
            raise ArithmeticError(f"its results differ from those that are not compiled, {apart}")
        if found_in_cache() == found:
            remember(folder, program.size, monotonic() - begun)
        return program

    def sign(self, passed: float) -> None:
        """Say that it goes on, and how long it will."""
        about = "" if self.expected is None else f" of about {max(self.expected, passed):.0f} s"
        self.owner.tell(f"still compiling {self.owner.name}: {passed:.0f} s{about}")


def repeated(step: Callable[..., Any], count: Tensor, going: Any, known: Any) -> Any:
    """``going = step(k, going, known)`` for k = 0 … ``count`` − 1, in a program as one loop, which is compiled once.

    Args:
        step: a pure function of these alone: what it takes from around it, a program takes for constant. It returns
            new tensors, of the shapes and types of ``going``.
        count: how often, at least once; a tensor of no dimensions, so that it is no part of the program's form.
        going: a tree, of which only the tensors change.
        known: a tree.

    >>> repeated(lambda k, x, a: a * x + k, torch.tensor(3), torch.tensor(1.0), torch.tensor(2.0))
    tensor(12.)
    """
    (values, spec), (more, form) = tree_flatten(going), tree_flatten(known)
    # copies: torch's loop refuses tensors that share memory, such as slices of one
    tensors, others = ([v.clone() for v in some if isinstance(v, Tensor)] for some in (values, more))

    def once(number: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        now, fixed = iter(rest[: len(tensors)]), iter(rest[len(tensors) + 1 :])
        given = tree_unflatten([next(now) if isinstance(value, Tensor) else value for value in values], spec)
        beside = tree_unflatten([next(fixed) if isinstance(value, Tensor) else value for value in more], form)
        found = tree_flatten(step(number, given, beside))[0]
        return number + 1, *[value for value in found if isinstance(value, Tensor)]

    def goes_on(number: Tensor, *rest: Tensor) -> Tensor:
        return number < rest[len(tensors)]

    _, *found = while_loop_op(goes_on, once, (torch.zeros_like(count), *tensors), (count, *others))
    end = iter(found)
    return tree_unflatten([next(end) if isinstance(value, Tensor) else value for value in values], spec)


class Program:
    """``fn`` for arguments of one form, from the leaves of its arguments to the leaves of its value.

    Attributes:
        spec: how the returned leaves lie in a tree; known after the first call.
    """

    def __init__(self, fn: Callable[..., Any], given: TreeSpec) -> None:
        self.fn = fn
        self.given = given
        self.spec: TreeSpec | None = None

    def __call__(self, values: Values) -> list[Any]:
        """Evaluate."""
        found, self.spec = tree_flatten(self.fn(*tree_unflatten(values, self.given)))
        return found


class CompiledProgram(Program):
    """A program that the compiler made; all its arguments must have the form of ``values``.

    Attributes:
        size: the number of its operations.
    """

    def __init__(self, host: "_Host", given: TreeSpec, values: Values) -> None:
        super().__init__(host.fn, given)
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        names = [name for *_, name in host.owners]
        self.constants: dict[int, Any] = {}

        def flat(*tensors: Tensor) -> list[Tensor]:
            leaves = list(values)
            for place, tensor in zip(places, tensors[len(names) :], strict=True):
                leaves[place] = tensor
            state = dict(zip(names, tensors, strict=False))
            with untouched(host):
                found, self.spec = tree_flatten(functional_call(host, state, (tree_unflatten(leaves, given),)))
            self.constants = {place: value for place, value in enumerate(found) if not isinstance(value, Tensor)}
            # one form for what comes out, so that it may go in again
            return [value.contiguous() for value in found if isinstance(value, Tensor)]

        self.owners, self.places = host.owners, places
        graph = make_fx(flat, _UNCHECKED, tracing_mode="fake", _allow_non_fake_inputs=True)(*self._tensors(values))
        graph.graph.eliminate_dead_code()
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        # most of the module's parameters come among the arguments too, and are not read from the module
        self.owners = [owner for owner, node in zip(host.owners, inputs, strict=False) if node.users]
        self.places = [place for place, node in zip(places, inputs[len(names) :], strict=True) if node.users]
        self.graph: torch.fx.GraphModule | None = graph
        self.autocast = _autocast(values)
        for node in inputs:
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        self.size = sum(len(part.graph.nodes) for part in parts)

    def compile(self, values: Values) -> None:
        """Give what was traced to the compiler."""
        graph, self.graph = self.graph, None
        tensors = self._tensors(values)
        self.device = next((tensor.device.type for tensor in tensors), "cpu")
        with torch.autocast(self.device, enabled=False):
            self.run = torch._inductor.standalone_compile(
                graph,
                tensors,
                dynamic_shapes="from_example_inputs",
                options={"config_patches": _OPTIONS | (_ON_CPU if self.device == "cpu" else _ELSEWHERE)},
            )

    def __call__(self, values: Values) -> list[Any]:
        """Run."""
        if self.autocast:
            with torch.autocast(self.device, enabled=False):
                found = list(self.run(*self._tensors(values)))
        else:
            found = list(self.run(*self._tensors(values)))
        for place, value in self.constants.items():
            found.insert(place, value)
        return found

    def _tensors(self, values: Values) -> list[Tensor]:
        own = [tensors[key].detach() for tensors, key, _ in self.owners]
        return [*own, *[values[place] for place in self.places]]


class _Host(nn.Module):
    """Holds the module that ``fn`` knows, so that its tensors can be arguments of the program."""

    def __init__(self, fn: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.fn = fn
        self.held = module
        self.layers = [] if module is None else list(module.modules())
        self.owners: list[tuple[dict[str, Tensor | None], str, str]] = []
        seen: set[int] = set()
        for path, owner in self.named_modules():
            for tensors in (owner._parameters, owner._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self.owners.append((tensors, key, f"{path}.{key}"))

    def modes(self) -> list[bool]:
        return [layer.training for layer in self.layers]

    def forward(self, trees: Any) -> Any:
        return self.fn(*trees)


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value), value  # 2 and 2.0 are equal
    strides = tuple(stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    return value.shape, strides, value.dtype, value.device


def _autocast(values: Values) -> torch.dtype | None:
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _apart(found: list[Any], right: list[Any]) -> str:
    """In words how far two results are apart, if it is more than rounding explains.

    They are compared as one vector each: the residual of a solver, say, may be nothing but rounding.
    """
    pairs = [(one.double(), other.double()) for one, other in zip(found, right, strict=True) if _is_real(other)]
    eps = max((torch.finfo(_autocast([other]) or other.dtype).eps for other in right if _is_real(other)), default=0.0)
    difference = sum(float((one - other).square().sum()) for one, other in pairs) ** 0.5
    size = sum(float(other.square().sum()) for _, other in pairs) ** 0.5
    if isfinite(size) and not difference <= eps**0.5 * size:
        return f"by {difference:.3g} in {size:.3g}"
    return ""


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
