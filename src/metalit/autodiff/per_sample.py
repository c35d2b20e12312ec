"""Derivatives of each row of a batch for itself, all rows at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor
from torch.func import grad

from metalit.autodiff.rows import By, Function, for_each_row, forward, jacobian, scalar
from metalit.errors import InputError
from metalit.tree import Tree


def per_sample_gradients(
    fn: Function,
    *inputs: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    names: str | Sequence[str] = ("*",),
    by: By = "parameters",
    chunk_size: int | None = None,
    flat: bool = False,
    key: Tensor | None = None,
) -> Tree:
    """Differentiate the scalar that belongs to each row: ``ℓᵢ = fn(xᵢ; w)``, or ``ℓᵢ = loss(fn(xᵢ; w), yᵢ)``.

    A module is left exactly as it was and sees each row as a batch of one; a plain function is called as
    ``fn(*row, **parameters)``, where a row has no batch dimension. The module's own parameters count as constants;
    through ``parameters`` and ``inputs`` that are given, the result can be differentiated again.

    Args:
        fn: a module, or a function of one row.
        inputs: ``[rows, ...]`` each; with ``loss`` the last one holds the targets.
        loss: a scalar function of the prediction and the target of one row, both without a batch dimension.
        parameters: tensors by name; a module's own trainable ones by default.
        names: shell patterns of the parameters to differentiate by.
        by: ``"parameters"``, or the position of the input to differentiate by.
        chunk_size: how many rows are in memory at once; all by default.
        flat: put all entries of the parameters, or of the input, into one last dimension.
        key: row i draws its dropout from ``fold(key, i)`` (:mod:`metalit.keys`).

    Returns:
        ``[rows, *shape]`` by parameter name, or for an input; with ``flat`` one matrix ``[rows, entries]``.

    Raises:
        InputError: BatchNorm, which mixes rows; dropout without ``key``; a row whose value is no scalar; inputs,
            names, parameters or ``by`` that do not fit.

    With ``½(wᵀxᵢ − yᵢ)²`` they are ``(wᵀxᵢ − yᵢ) xᵢ``. Their norms take one line more:

    >>> import torch
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 5.0])
    >>> w = {"w": torch.tensor([1.0, 1.0])}
    >>> gradients = per_sample_gradients(lambda x, y, w: (w @ x - y) ** 2 / 2, x, y, parameters=w, flat=True)
    >>> gradients
    tensor([[2., 4.],
            [6., 8.]])
    >>> gradients.norm(dim=1)
    tensor([ 4.4721, 10.0000])
    """

    def gradient(value: Callable[[Tree], Tensor], point: Tree) -> Tree:
        return grad(lambda at: scalar(value(at), "fn" if loss is None else "loss"))(point)

    return for_each_row(gradient, fn, inputs, loss, parameters, names, by, chunk_size, flat, key)


def per_sample_jacobian(
    fn: Function,
    *inputs: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    names: str | Sequence[str] = ("*",),
    by: By = "parameters",
    chunk_size: int | None = None,
    flat: bool = False,
    key: Tensor | None = None,
) -> Tree:
    """Differentiate every output of each row, ``∂fn(xᵢ; w)/∂w``; arguments as for :func:`per_sample_gradients`.

    Returns:
        ``[rows, *outputs, *shape]`` by parameter name, or for an input; with ``flat`` ``[rows, *outputs, entries]``.

    Raises:
        InputError: as for :func:`per_sample_gradients`, but for the scalar.

    The Jacobian of ``ax + b`` by ``(a, b)`` is ``(x, 1)``:

    >>> import torch
    >>> point = {"a": torch.tensor(2.0), "b": torch.tensor(5.0)}
    >>> per_sample_jacobian(lambda x, a, b: a * x + b, torch.tensor([3.0, 4.0]), parameters=point, flat=True)
    tensor([[3., 1.],
            [4., 1.]])
    """
    return for_each_row(jacobian, fn, inputs, None, parameters, names, by, chunk_size, flat, key)


def per_sample_hessian(
    fn: Function,
    *inputs: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    by: int = 0,
    chunk_size: int | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Differentiate every output of each row twice by one input, ``∂²fn(xᵢ; w)/∂xᵢ²``, as differential equations need.

    Arguments as for :func:`per_sample_gradients`.

    Returns:
        ``[rows, *outputs, *input, *input]``

    Raises:
        InputError: as for :func:`per_sample_jacobian`.

    >>> import torch
    >>> x, t = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 100.0])
    >>> per_sample_hessian(lambda x, t: t * x**3, x, t)
    tensor([  60., 1200.])
    """
    if isinstance(by, str):
        raise InputError(f"by: {by!r}, but second derivatives are by an input; give its position, 0 for the first")

    def hessian(value: Callable[[Tree], Tensor], point: Tree) -> Tree:
        return forward(lambda at: jacobian(value, at), point)

    found = for_each_row(hessian, fn, inputs, None, parameters, ("*",), by, chunk_size, False, key)
    return cast(Tensor, found)  # by one input
