"""Classes by attention over the support set, in learned features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from metalit.problem import Task
from metalit.problems.class_head import ClassHead
from metalit.problems.heads import one_hot, product, single

_NEVER = -1e4  # a logit of which the exponential is 0, in half precision too


class Matching(ClassHead):
    """Learn features by which a row attends to the support set, and takes over its classes (Vinyals et al. 2016).

    P(class k at x) = Σᵢ aᵢ [yᵢ = k],  a = softmax over the support rows of cos(f(x), f(xᵢ))  (eq. 1)

    One network encodes both sets, each row for itself: without the paper's full context embeddings (section 2.1.2),
    which let an LSTM see the whole support set. It is learned on the cross-entropy of the query set, by
    :class:`~metalit.hypergradients.direct.Direct`, without an inner step; steps would descend that of the support set.
    It takes tasks of any number of classes, each with a support row at least.

    Args:
        network: f, any module that maps ``[rows, ...]`` to ``[rows, features]``.

    Raises:
        InputError: no network; later: targets that are no classes, and features of another shape.

    >>> from torch import nn
    >>> from metalit.problem import Points
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    >>> task = Task(Points(x, y), Points(x, y), torch.tensor(0), classes=torch.arange(2))
    >>> problem = Matching(nn.Identity())
    >>> problem.predict(problem.init({}, task), {}, torch.tensor([[2.0, 2.0]])).exp()
    tensor([[0.5000, 0.5000]])
    """

    def init(self, outer: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The ``keys`` of the support rows, ``[rows, features]``; ``logits`` of their classes, ``[rows, ways]``."""
        keys = _directions(self.support_features(outer, task))
        return {"keys": keys, "logits": torch.where(one_hot(task.support, task), 0.0, _NEVER).to(keys.dtype)}

    def logits(self, inner: dict[str, Tensor], features: Tensor) -> Tensor:
        """The logarithms of the probabilities."""
        scores = product(_directions(features), inner["keys"].mT)
        return (scores.unsqueeze(2) + inner["logits"]).logsumexp(1).log_softmax(1)


def _directions(features: Tensor) -> Tensor:
    return F.normalize(single(features), dim=1)
