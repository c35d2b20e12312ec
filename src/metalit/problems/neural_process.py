"""Conditional neural processes: the support set is encoded, and the code tells a network what to predict."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metalit.losses import gaussian_nll, mean_of_rows
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems.heads import Head, check_positive, check_width

_NEVER = -1e4  # a logit of which the exponential is 0, in half precision too


class NeuralProcess(Head):
    """Learn to encode a support set, and to predict from the code (conditional: Garnelo et al. 2018, eq. 2 to 4).

    code = mean over the support set of encoder(x, y),  mean, raw = decoder(x, code),  std = least_std + softplus(raw)

    With ``attention``, each x has a code of its own, the mean of the encodings weighted by softmax(q(x)ᵀq(xᵢ)/√width)
    (the deterministic path of attentive neural processes: Kim et al. 2019). The order of the points does not matter.
    All is learned on the negative log likelihood of each point of the query set, by
    :class:`~metalit.hypergradients.direct.Direct`, without an inner step; steps would descend that of the support set.

    Args:
        inputs, outputs: the numbers of columns; in a configuration, ``auto`` for as many as the data has.
        width: of the code, and of all hidden layers.
        depth: the number of hidden layers of each network.
        attention: weight the support points anew for each input.
        activation: the name of an activation module of ``torch.nn``.
        least_std: the least standard deviation that is predicted, in normalised units.

    Raises:
        InputError: numbers that are not positive, an activation that ``torch.nn`` does not have; later: classes as
            targets, data of other columns.

    >>> process = NeuralProcess(inputs=1, outputs=1, width=4)
    >>> points = Points(torch.zeros(3, 1), torch.zeros(3, 1))
    >>> process.init(process.outer(), Task(points, points, torch.tensor(0)))["code"].shape
    torch.Size([4])
    """

    def __init__(
        self,
        inputs: int | Literal["auto"],
        outputs: int | Literal["auto"],
        width: int = 64,
        depth: int = 2,
        attention: bool = False,
        activation: str = "ReLU",
        least_std: float = 0.01,
    ) -> None:
        super().__init__()
        numbers = {"inputs": inputs, "outputs": outputs, "width": width, "depth": depth}
        x, y, width, depth = (check_width("NeuralProcess", name, value) for name, value in numbers.items())
        check_positive("NeuralProcess", "least_std", least_std, 0.01)
        self.inputs, self.outputs = x, y
        hidden = [width] * depth
        self.encoder = MLP([x + y, *hidden, width], activation)
        self.decoder = MLP([x + width, *hidden, 2 * y], activation)
        self.queries = MLP([x, *hidden, width], activation) if attention else None
        self.least_std = least_std

    def init(self, outer: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The ``code`` ``[width]``; with attention the ``codes`` of points, their ``keys`` and ``logits`` of masks."""
        x, y, mask = task.support
        codes = self.called("encoder", outer, torch.cat([x, y], 1))
        real = torch.ones_like(codes[:, 0]) if mask is None else mask.to(codes.dtype)
        if self.queries is None:
            return {"code": (codes * real.unsqueeze(1)).sum(0) / real.sum().clamp(min=1)}
        return {"codes": codes, "keys": self.called("queries", outer, x), "logits": _NEVER * (1 - real)}

    def inner_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task, step: int) -> Tensor:
        """The negative log likelihood of each point of the support set."""
        return self._surprise(inner, outer, task.support)

    def outer_loss(self, inner: dict[str, Tensor], outer: dict[str, Tensor], task: Task) -> Tensor:
        """The negative log likelihood of each point of the query set."""
        return self._surprise(inner, outer, task.query)

    def predict(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The mean at ``x``."""
        return self._decoded(inner, outer, x)[0]

    def spread(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The standard deviation at ``x``."""
        return self._decoded(inner, outer, x)[1]

    def _surprise(self, inner: dict[str, Tensor], outer: dict[str, Tensor], points: Points) -> Tensor:
        return mean_of_rows(gaussian_nll(*self._decoded(inner, outer, points.x), points.y), points.mask)

    def _decoded(self, inner: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        if self.queries is None:
            code = inner["code"].expand(len(x), -1)
        else:
            scores = self.called("queries", outer, x) @ inner["keys"].mT / math.sqrt(inner["keys"].shape[1])
            code = (scores + inner["logits"]).softmax(1) @ inner["codes"]
        mean, raw = self.called("decoder", outer, torch.cat([x, code.to(x.dtype)], 1)).chunk(2, 1)
        return mean, self.least_std + F.softplus(raw)
