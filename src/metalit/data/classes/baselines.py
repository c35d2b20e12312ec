"""Predictions of classes without meta-learning, from the inputs as they are."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metalit.problem import Task


def class_baselines(tasks: Task) -> dict[str, Tensor]:
    """What is said of the queries of each task by its support set alone.

    Args:
        tasks: loaded, all with the same number of examples of each class.

    Returns:
        By name, probabilities ``[tasks, queries, ways]`` on the tasks' device; 0 and 1 of the first two.
    """
    assert tasks.classes is not None
    ways, device = tasks.classes.shape[-1], tasks.query.x.device
    support, query = (points.x.flatten(2).to("cpu", torch.float64) for points in (tasks.support, tasks.query))
    labels = tasks.support.y.cpu()
    found = {
        "nearest neighbour": nearest_neighbour(support, labels, query, ways),
        "nearest class mean": nearest_class_mean(support, labels, query, ways),
        "logistic regression": logistic_regression(support, labels, query, ways),
    }
    return {name: scores.to(device) for name, scores in found.items()}


def nearest_neighbour(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """The class of the support example at the least Euclidean distance; the first one of several."""
    nearest = torch.cdist(query, support).argmin(-1)
    return one_hot(labels.gather(1, nearest), ways).double()


def nearest_class_mean(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """The class whose mean of support examples is at the least Euclidean distance."""
    members = one_hot(labels, ways).double()
    means = members.mT @ support / members.sum(1).unsqueeze(-1)
    return one_hot(torch.cdist(query, means).argmin(-1), ways).double()


def logistic_regression(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """That of scikit-learn (cross-entropy + ½‖W‖² over all of a support set), fitted to each.

    The weights lie in the span of the support set, so it is fitted in coordinates of that span: there are as many as
    examples, however many pixels there are.
    """
    if ways == 1:
        return query.new_ones((*query.shape[:2], 1))
    # late: it takes as long to import as torch
    from sklearn.linear_model import LogisticRegression

    # the span has an orthonormal basis, in which both sides are written
    basis = torch.linalg.qr(support.mT).Q
    pairs = zip((support @ basis).numpy(), labels.numpy(), (query @ basis).numpy(), strict=True)
    model = LogisticRegression(solver="newton-cg", tol=1e-7, max_iter=1000)  # its default stops early
    return torch.from_numpy(np.stack([model.fit(x, y).predict_proba(asked) for x, y, asked in pairs]))
