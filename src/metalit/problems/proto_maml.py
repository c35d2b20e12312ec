"""MAML whose head starts from the prototypes of the support set."""

from typing import Any

from torch import Tensor, nn

from metalit.autodiff import call, draws
from metalit.errors import InputError
from metalit.keys import fold
from metalit.problem import Task
from metalit.problems.few_shot import FewShot
from metalit.problems.heads import SUPPORT_DRAW, check_classes, check_no_padding, class_means, single

_HEAD = ("head.weight", "head.bias")


class ProtoMAML(FewShot):
    """Learn features from whose prototypes a linear head starts, and is then descended (Triantafillou et al. 2020).

    init: w_k = 2c_k, b_k = −‖c_k‖², c_k = mean of f(x) over the support rows of class k (section 3, eq. 5)

    So without a step it answers as ``Prototypes`` does: −‖f(x) − c_k‖² is w_kᵀf(x) + b_k, but for what is the same for
    every class. The inner steps descend the network and the head; the outer gradient goes through how the head starts.
    It takes tasks of any number of classes, each with a support row at least. The arguments are those of
    :class:`~metalit.problems.few_shot.FewShot`, of a network that maps ``[rows, ...]`` to ``[rows, features]``; what
    ``adapt`` names is adapted beside the head.

    Raises:
        InputError: what FewShot raises; a network with a parameter ``head.weight`` or ``head.bias``; later: targets
            that are no classes.
    """

    needs_classes = True

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(network, **options)
        taken = {name for name, _ in network.named_parameters()} & {*_HEAD}
        if taken:
            raise InputError(
                f"network: its {sorted(taken)} would be ProtoMAML's own head; give that layer another name"
            )

    def init(self, outer: dict[str, Tensor], task: Task | None = None) -> dict[str, Tensor]:
        """The adapted part of the outer variable, and the head: ``[ways, features]`` weights and ``[ways]`` biases."""
        start = super().init(outer, task)
        if task is None:
            raise InputError("the head of ProtoMAML is made of a task's support set")
        check_no_padding("network", self.network, task.support)
        key = fold(task.key, SUPPORT_DRAW) if draws(self.network) else None
        features = single(call(self.network, {**self.copies.at(outer, 0), **start}, task.support.x, key=key))
        means = class_means(features, task.support, task)
        return {**start, **dict(zip(_HEAD, (2 * means, -means.square().sum(1)), strict=True))}

    def check(self, task: Any) -> None:
        """Raise an :class:`InputError` if it is data of another kind, or its targets are no classes."""
        super().check(task)
        check_classes(self, task)

    def answers(self, parameters: dict[str, Tensor], x: Tensor, key: Tensor | None = None) -> Tensor:
        """The head's logits, ``[rows, ways]``."""
        weight, bias = (parameters[name] for name in _HEAD)
        own = {name: value for name, value in parameters.items() if name not in _HEAD}
        return single(super().answers(own, x, key)) @ weight.mT + bias
