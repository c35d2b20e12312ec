"""What benchmarks write in JAX: an outer step with Adam as one function, to be jitted whole."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

State = tuple[Any, Any, Any, Any]  # parameters, Adam's first and second moments, the number of steps taken


def outer_step(jax: Any, mean_loss: Callable[[Any, Any, Any], Any], rates: Any) -> Callable[[State, Any], Any]:
    """The function of (state, tasks) that takes an outer step.

    Args:
        jax: the package.
        mean_loss: of (parameters, tasks, number of the step).
        rates: Adam's rate, of each parameter in their tree.
    """
    np = jax.numpy

    def adam(rate: float, weight: Any, first: Any, second: Any, number: Any, gradient: Any) -> tuple[Any, Any, Any]:
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.999**number)) + 1e-8)
        return weight - rate * change, first, second

    def step(state: State, tasks: Any) -> tuple[State, Any]:
        *parts, number = state
        value, gradient = jax.value_and_grad(mean_loss)(parts[0], tasks, number)
        form = jax.tree.structure(gradient)
        trees = map(jax.tree.leaves, (rates, *parts, gradient))
        moved = [adam(*each, number + 1, slope) for *each, slope in zip(*trees, strict=True)]
        first, second, third = (jax.tree.unflatten(form, column) for column in zip(*moved, strict=True))
        return (first, second, third, number + 1), value

    return step


def initial(jax: Any, parameters: Any) -> State:
    """The state before the first step."""
    return (parameters, *(jax.tree.map(jax.numpy.zeros_like, parameters) for _ in range(2)), jax.numpy.zeros(()))


def arrays(jax: Any, tree: Any) -> Any:
    """Tensors as JAX's arrays."""
    return tree_map(lambda leaf: jax.numpy.array(leaf.detach().numpy()) if isinstance(leaf, Tensor) else leaf, tree)
