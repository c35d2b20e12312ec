"""A SupervisedLearner: its plain gradient beside finite differences."""

from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from metalit.autodiff import gradient_at
from metalit.checking.gradients import Gradients, parameters, told_of_parameters, told_of_slopes, whole_slopes
from metalit.checking.report import CheckReport
from metalit.errors import InputError
from metalit.judging import real_rows
from metalit.losses import mean_of_rows, row_losses
from metalit.modules import SupervisedLearner
from metalit.problem import Points
from metalit.tree import leaves


def check_supervised(learner: SupervisedLearner, batch: Any) -> CheckReport:
    """Check the gradient of the mean loss over a batch of rows, in float64, without a perturbation.

    Raises:
        InputError: a batch of another kind.
    """
    begin = perf_counter()
    if not (isinstance(batch, Points | tuple | list) and len(batch) >= 2):
        raise InputError(f"check: SupervisedLearner takes a batch of inputs and targets, not a {type(batch).__name__}")
    given = Points(*batch)
    x, y = (part.double() if part.is_floating_point() else part for part in given[:2])
    points = Points(x, y, given.mask)
    network = deepcopy(learner.network).double()
    outer = {"network": {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}}

    def loss(network: Any) -> Tensor:
        rows = row_losses(learner.loss, network(points.x), points.y)
        return mean_of_rows(rows, real_rows(learner.loss, points.y, points.mask))

    def found(at: Any) -> tuple[Tensor, dict[str, Any]]:
        value, gradient = gradient_at(network, loss, at["network"], torch.tensor(learner.seed))
        return value, {"network": gradient}

    here, gradient = found(outer)
    again = float(found(outer)[0])
    problems, remarks = (
        [],
        ["a SupervisedLearner has no inner level: its plain gradient alone is checked, without a perturbation"],
    )
    if float(here) != again:
        problems.append(
            "model.network is different at each call: it draws random numbers that follow no key; use torch.nn.Dropout"
        )
        return _report(learner, len(x), begin, problems, remarks)
    slopes = whole_slopes(lambda at: float(found(at)[0]), outer, gradient, again)
    # what its gradient is zero for may be unused; autograd gives zeros there
    reached = {name for name, value in leaves(gradient) if bool(value.any())}
    rows = parameters(
        lambda at: float(found(at)[0]), outer, Gradients(gradient, gradient, None), reached, slopes, again
    )
    wrong, noted = told_of_slopes(slopes)
    problems += [*wrong, *told_of_parameters(rows)]
    return _report(learner, len(x), begin, problems, [*remarks, *noted], slopes=slopes, parameters=rows)


def _report(
    learner: SupervisedLearner, count: int, begin: float, problems: list[str], remarks: list[str], **tables: Any
) -> CheckReport:
    name = f"SupervisedLearner, {type(learner.network).__name__}"
    return CheckReport(name, count, "float64", perf_counter() - begin, problems, remarks, unit="row", **tables)
