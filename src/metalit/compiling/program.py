"""A function of trees for arguments of one form: as it stands, or traced and compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metalit.autodiff.untouched import untouched
from metalit.compiling.compiler import compile_graph, trace, vectors_probed
from metalit.private_torch import TreeSpec, buffers_of, parameters_of, tree_flatten, tree_unflatten

Values = Sequence[Any]


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

    The graph that is compiled takes tensors alone, in this order: those of the module (``owners``), then those of the
    arguments (``places``), less the ones that it never reads. They are looked up anew at each call, so parameters may
    be replaced, and what is no tensor, in arguments and value, is a constant of the program.

    Attributes:
        size: the number of its operations.
    """

    def __init__(self, host: "Host", given: TreeSpec, values: Values) -> None:
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
        with vectors_probed():
            graph = trace(flat, self._tensors(values))
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        # most of the module's parameters come among the arguments too, and are not read from the module
        self.owners = [owner for owner, node in zip(host.owners, inputs, strict=False) if node.users]
        self.places = [place for place, node in zip(places, inputs[len(names) :], strict=True) if node.users]
        self.graph: torch.fx.GraphModule | None = graph
        self.autocast = autocast_of(values)
        for node in inputs:
            if not node.users:
                graph.graph.erase_node(node)
        graph.recompile()
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        self.size = sum(len(part.graph.nodes) for part in parts)

    def compile(self, values: Values) -> None:
        """Give what was traced to the compiler."""
        graph, self.graph = self.graph, None
        assert graph is not None
        self.device = next((tensor.device.type for tensor in self._tensors(values)), "cpu")
        with torch.autocast(self.device, enabled=False):
            self.run = compile_graph(graph, self.device)

    def __call__(self, values: Values) -> list[Any]:
        """Run."""
        with torch.no_grad():
            if self.autocast:  # what it casts was traced
                with torch.autocast(self.device, enabled=False):
                    found = list(self.run(self._tensors(values)))
            else:
                found = list(self.run(self._tensors(values)))
        for place, value in self.constants.items():
            found.insert(place, value)
        return found

    def _tensors(self, values: Values) -> list[Tensor]:
        own = [tensors[key].detach() for tensors, key, _ in self.owners]
        return [*own, *[values[place] for place in self.places]]


class Host(nn.Module):
    """Holds the module that ``fn`` knows, so that its tensors can be arguments of the program."""

    def __init__(self, fn: Callable[..., Any], module: nn.Module | None) -> None:
        super().__init__()
        self.fn = fn
        self.held = module
        self.layers = [] if module is None else list(module.modules())
        self.owners: list[tuple[dict[str, Any], str, str]] = []
        seen: set[int] = set()
        for path, owner in self.named_modules():
            for tensors in (parameters_of(owner), buffers_of(owner)):
                for key, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in seen:
                        seen.add(id(tensor))
                        self.owners.append((tensors, key, f"{path}.{key}"))

    def modes(self) -> list[bool]:
        """Which of its layers are in training mode."""
        return [layer.training for layer in self.layers]

    def forward(self, trees: Any) -> Any:
        """Evaluate ``fn(*trees)``."""
        return self.fn(*trees)


def form_of(value: Any) -> Any:
    """What a program is made for: a tensor's shape, strides, type and device; all else by type and value."""
    if not isinstance(value, Tensor):
        return type(value), value  # 2 and 2.0 are equal
    strides = tuple(stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    return value.shape, strides, value.dtype, value.device


def autocast_of(values: Values) -> torch.dtype | None:
    """What autocast casts to on the device of these values, or None where it is off."""
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
