import math

import pytest
import torch
from cases import draw, each_of, linear, regression_tasks, task_at
from torch.func import grad, vmap
from torch.testing import assert_close

from metalit.errors import InputError
from metalit.networks import MLP
from metalit.problem import Points, Task
from metalit.problems import BayesianHead
from metalit.tree import flatten


def head(inputs=2, outputs=2, degree=2, features=3, train_on="query"):
    """One whose prior is as it may have been learned."""
    problem = BayesianHead(inputs, outputs, degree, linear(inputs, features) if features else None, train_on).double()
    for number, value in enumerate((problem.prior_mean, problem.prior_factor, problem.log_noise)):
        # a larger factor, with ones below a diagonal of 0.3, is singular to more digits than are compared
        value.data = value.data + 0.1 * draw(*value.shape, seed=200 + number)
    return problem


def features_of(problem, x):
    powers = [x**power for power in range(problem.degree + 1)]
    powers[0] = powers[0][:, :1]
    return torch.cat([*powers, *([] if problem.network is None else [problem.network(x).detach()])], 1)


def process(problem, points, x):
    """The Gaussian process by hand: mean and variance at ``x``, and −log p of the points, for each output."""
    factor = problem.prior_factor.detach()
    factor = factor.tril(-1) + factor.diagonal().exp().diag()
    covariance, prior = torch.linalg.inv(factor @ factor.T), problem.prior_mean.detach()
    real = slice(None) if points.mask is None else points.mask
    seen, y, asked = features_of(problem, points.x)[real], points.y[real], features_of(problem, x)
    found = []
    for output, noise in enumerate(problem.log_noise.detach().exp().square()):
        kernel = noise * seen @ covariance @ seen.T + noise * torch.eye(len(seen), dtype=seen.dtype)
        cross = noise * asked @ covariance @ seen.T
        errors = y[:, output] - seen @ prior[:, output]
        mean = asked @ prior[:, output] + cross @ torch.linalg.solve(kernel, errors)
        own = noise * (asked @ covariance * asked).sum(1) + noise
        variance = own - (cross * torch.linalg.solve(kernel, cross.T).T).sum(1)
        surprise = 0.5 * (torch.logdet(2 * math.pi * kernel) + errors @ torch.linalg.solve(kernel, errors))
        found.append((mean, variance, surprise))
    return [torch.stack(parts, -1) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("ragged", [False, True], ids=["all rows", "ragged"])
@pytest.mark.parametrize(("degree", "features"), [(2, 3), (3, 0), (0, 7)], ids=["both", "polynomial", "network"])
def test_it_is_the_gaussian_process_of_its_kernel(degree, features, ragged):
    problem, tasks = head(degree=degree, features=features), regression_tasks(2, 2, ragged)
    outer = problem.outer()
    for index in range(3):
        task = task_at(tasks, index)
        inner = problem.init(outer, task)
        mean, variance, _ = process(problem, task.support, task.query.x)
        assert_close(problem.predict(inner, outer, task.query.x), mean, rtol=1e-10, atol=1e-11)
        assert_close(problem.spread(inner, outer, task.query.x).square(), variance, rtol=1e-10, atol=1e-11)
        real = slice(None) if task.query.mask is None else task.query.mask
        errors = (task.query.y - mean)[real]
        expected = 0.5 * ((2 * math.pi * variance[real]).log() + errors.square() / variance[real]).mean()
        assert_close(problem.outer_loss(inner, outer, task), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("ragged", [False, True], ids=["all rows", "ragged"])
def test_its_marginal_likelihood_is_that_of_the_gaussian_process(ragged):
    problem, tasks = head(train_on="curve"), regression_tasks(2, 2, ragged)
    for index in range(3):
        task = task_at(tasks, index)
        x, y = (torch.cat(parts) for parts in zip(task.support[:2], task.query[:2], strict=True))
        mask = torch.cat([task.support.mask, task.query.mask]) if ragged else None
        surprise = process(problem, Points(x, y, mask), x)[2]
        rows = int(mask.sum()) if ragged else len(x)
        outer = problem.outer()
        found = problem.outer_loss(problem.init(outer, task), outer, task)
        assert_close(found, surprise.mean() / rows, rtol=1e-10, atol=1e-12)


def test_the_mean_is_where_the_inner_loss_has_no_slope():
    problem, task = head(), task_at(regression_tasks(2, 2, ragged=True), 0)
    outer = problem.outer()
    slope = grad(lambda inner: problem.inner_loss(inner, outer, task, 0))(problem.init(outer, task))
    assert flatten(slope).abs().max() < 1e-12


def test_it_starts_with_a_prior_of_unit_variance():
    problem = BayesianHead(1, 1, 1, noise=0.2).double()
    x = torch.tensor([[3.0]]).double()
    task = Task(*[Points(x, x, torch.tensor([False]))] * 2, torch.tensor(0))  # no row is real
    inner = problem.init(problem.outer(), task)
    assert_close(problem.spread(inner, problem.outer(), x).square().item(), 1 + 9 + 0.2**2, rtol=1e-12, atol=0)
    assert problem.predict(inner, problem.outer(), x).item() == 0


def test_outer_parameters_hold_what_was_written_in_double():
    problem = BayesianHead(1, 1, 1, noise=0.3).double()
    assert problem.log_noise.item() == math.log(0.3)
    assert problem.prior_factor[0, 0].item() == math.log(0.3)


@pytest.mark.parametrize("train_on", ["query", "curve"])
def test_all_tasks_at_once_are_one_after_the_other(train_on):
    problem, tasks = head(train_on=train_on), regression_tasks(2, 2, ragged=True)
    outer = problem.outer()

    def loss(task):
        return problem.outer_loss(problem.init(outer, task), outer, task)

    each = torch.stack([loss(task_at(tasks, index)) for index in range(3)])
    assert_close(vmap(loss, (each_of(tasks),))(tasks), each, rtol=1e-12, atol=0)


@pytest.mark.parametrize("train_on", ["query", "curve"])
@pytest.mark.parametrize("log", [-12.0, -20.0])
def test_a_prior_of_no_precision_gives_numbers_in_single_precision(train_on, log):
    # Λ₀ = e^-40 beside ΦᵀΦ of 10⁴: single precision has 7 digits, double 16
    problem = BayesianHead(1, 1, 3, train_on=train_on)
    with torch.no_grad():
        problem.prior_factor.copy_(log * torch.eye(4))
        problem.log_noise.fill_(-5.0)
    x = torch.linspace(-5, 5, 3).repeat(2)[:, None]
    task = Task(Points(x, x.sin()), Points(x, x.sin()), torch.tensor(0))

    def loss(outer):
        return problem.outer_loss(problem.init(outer, task), outer, task)

    outer = {name: value.detach() for name, value in problem.outer().items()}
    assert loss(outer).isfinite()
    assert flatten(grad(loss)(outer)).isfinite().all()


@pytest.mark.parametrize("train_on", ["query", "curve"])
def test_in_single_and_half_precision_it_is_solved_in_double(train_on):
    problem, task = head(train_on=train_on), task_at(regression_tasks(2, 2), 0)
    expected = problem.outer_loss(problem.init(problem.outer(), task), problem.outer(), task)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        low = problem.to(dtype)
        outer = low.outer()
        rounded = Task(*(part._replace(x=part.x.to(dtype), y=part.y.to(dtype)) for part in task[:2]), task.key)
        inner = low.init(outer, rounded)
        assert {value.dtype for value in inner.values()} == {dtype}
        found = low.outer_loss(inner, outer, rounded)
        assert found.dtype == dtype
        assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": 0}, "BayesianHead: inputs=0 must be at least 1"),
        ({"outputs": "auto"}, "BayesianHead: outputs='auto' is for a configuration; give the number of columns"),
        ({"degree": -1}, "BayesianHead: degree=-1 must not be negative; 0 has the constant alone"),
        ({"train_on": "rows"}, "BayesianHead: train_on='rows' must be 'query' or 'curve'"),
        ({"noise": 0.0}, "BayesianHead: noise=0.0 must be a finite positive number, such as 0.3"),
        ({"network": MLP([3, 4])}, "network cannot take inputs of shape (2, 1), 1 column(s) of x: mat1 and mat2"),
        ({"network": 3}, "network=3 is of type int; it must be a torch.nn.Module, such as MLP([1, 40, 1])"),
    ],
)
def test_what_cannot_be_is_said(given, message):
    with pytest.raises(InputError) as raised:
        BayesianHead(**{"inputs": 1, "outputs": 1} | given)
    assert str(raised.value).startswith(message)
