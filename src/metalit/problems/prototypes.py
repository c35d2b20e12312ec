"""Classes by the nearest mean of learned features."""

from torch import Tensor

from metalit.problem import Task
from metalit.problems.class_head import ClassHead
from metalit.problems.heads import class_means, single


class Prototypes(ClassHead):
    """Learn features in which the mean of a class stands for it (ProtoNet: Snell et al. 2017, eq. 1 and 2).

    init: c_k = mean of f(x) over the support rows of class k;  logits: −‖f(x) − c_k‖²,  outer_loss = their
    cross-entropy on the query set.

    It is learned by :class:`~metalit.hypergradients.direct.Direct`, without an inner step; further steps descend the
    cross-entropy of the support set. It takes tasks of any number of classes, so it may train on more than it is
    tested on, as in the paper. Each class has a support row at least.

    Args:
        network: f, any module that maps ``[rows, ...]`` to ``[rows, features]``. BatchNorm uses the statistics of the
            set before it: of the support set in ``init``, then of the query set.

    Raises:
        InputError: no network; later: targets that are no classes, and features of another shape.

    >>> import torch
    >>> from torch import nn
    >>> from metalit.problem import Points
    >>> x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> task = Task(Points(x, y), Points(x, y), torch.tensor(0), classes=torch.arange(2))
    >>> problem = Prototypes(nn.Identity())
    >>> problem.predict(problem.init({}, task), {}, torch.tensor([[3.0]]))
    tensor([[-4., -4.]])
    """

    def init(self, outer: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        """The ``prototypes``, ``[ways, features]``."""
        return {"prototypes": class_means(single(self.support_features(outer, task)), task.support, task)}

    def logits(self, inner: dict[str, Tensor], features: Tensor) -> Tensor:
        """−‖f(x) − c_k‖² of each class."""
        return -(single(features).unsqueeze(1) - inner["prototypes"]).square().sum(2)
