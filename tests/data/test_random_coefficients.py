import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from metalit.data import random_coefficients
from metalit.data.curve_baselines import Polynomials
from metalit.data.random_coefficients import RandomCoefficients, _Moments
from metalit.problem import Points, Task


def tensor(values):
    return torch.as_tensor(np.array(values), dtype=torch.float64)


def model(size, rank=None, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size if rank is None else rank))
    return RandomCoefficients(tensor(rng.normal(size=size)), tensor(root @ root.T), tensor(noise))


def well_conditioned(size):
    """One whose likelihood expectation maximisation climbs in few iterations."""
    truth = model(size)
    return truth._replace(covariance=truth.covariance + torch.eye(size, dtype=torch.float64))


def drawn(tasks, rows, size, truth, seed=1, balanced=False):
    """Rows of tasks whose coefficients come from ``truth``."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(1 if balanced else tasks, rows, size)) * np.ones((tasks, 1, 1))
    coefficients = rng.multivariate_normal(truth.mean.numpy(), truth.covariance.numpy(), size=tasks)
    noise = float(truth.noise) ** 0.5 * rng.normal(size=(tasks, rows))
    return tensor(features), tensor((features @ coefficients[..., None])[..., 0] + noise)


def kernel(truth, features):
    """The covariance of noisy rows, entry by entry."""
    rows, spread = len(features), truth.covariance.numpy()
    return np.array(
        [[features[i] @ spread @ features[j] + (i == j) * float(truth.noise) for j in range(rows)] for i in range(rows)]
    )


@pytest.mark.parametrize(("size", "rank", "noise"), [(1, 1, 0.3), (3, 3, 0.3), (3, 1, 0.1), (4, 0, 1.0), (3, 3, 1e-6)])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_predictions_are_those_of_the_gaussian_process_with_this_kernel(size, rank, noise, rows):
    truth = model(size, rank, noise)
    features, y = drawn(5, rows, size, truth)
    asked = tensor(np.random.default_rng(2).normal(size=(5, 4, size)))
    found = truth.predict(features, y, asked)
    mean, spread = truth.mean.numpy(), truth.covariance.numpy()
    for task in range(5):
        phi, new = features[task].numpy(), asked[task].numpy()
        weights = np.linalg.solve(kernel(truth, phi), y[task].numpy() - phi @ mean)
        assert_close(found[task], tensor(new @ mean + new @ spread @ phi.T @ weights), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (3, 3), (3, 1), (2, 0)])
def test_likelihood_is_that_of_all_rows_as_one_normal_distribution_each_task(size, rank):
    truth = model(size, rank)
    features, y = drawn(6, 5, size, truth)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 5, 2, 4]).unsqueeze(1)
    total = 0.0
    for task in range(6):
        phi = features[task][mask[task]].numpy()
        residual, covariance = y[task][mask[task]].numpy() - phi @ truth.mean.numpy(), kernel(truth, phi)
        log_volume = np.linalg.slogdet(2 * math.pi * covariance)[1]
        total -= (residual @ np.linalg.solve(covariance, residual) + log_volume) / 2
    assert float(truth.log_likelihood(features, y, mask)) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize(("tasks", "rows", "size", "rank"), [(20, 6, 2, 2), (8, 3, 4, 4), (12, 5, 3, 1), (2, 4, 3, 3)])
def test_no_iteration_lowers_the_likelihood(tasks, rows, size, rank):
    features, y = drawn(tasks, rows, size, model(size, rank, 0.1))
    lengths = torch.arange(tasks) % rows + 1
    moments = _Moments.of(features, y, torch.arange(rows) < lengths.unsqueeze(1))
    found, likelihoods = model(size, seed=3), []
    for _ in range(200):
        posterior = found._posterior(moments)
        likelihoods.append(float(posterior.log_likelihood))
        found = found._improved(moments, posterior)
    assert likelihoods[-1] > likelihoods[0] + 1
    # not even by rounding
    assert all(after > before - 1e-9 * abs(before) for before, after in pairwise(likelihoods))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_where_all_tasks_have_the_same_inputs_the_fit_is_known(size, monkeypatch):
    """Least squares of each task: their mean, and their covariance less what the noise makes of it."""
    monkeypatch.setattr(random_coefficients, "_TOLERANCE", 1e-15)
    features, y = drawn(200, 12, size, well_conditioned(size), balanced=True)
    phi = features[0].numpy()
    each, squares, _, _ = np.linalg.lstsq(phi, y.numpy().T, rcond=None)
    noise = squares.sum() / (200 * (12 - size))
    covariance = np.cov(each, bias=True).reshape(size, size) - noise * np.linalg.inv(phi.T @ phi)
    assert np.linalg.eigvalsh(covariance).min() > 0
    found = RandomCoefficients.fitted(features, y)
    assert_close(found.mean, tensor(each.mean(1)), rtol=1e-6, atol=1e-6)
    assert_close(found.covariance, tensor(covariance), rtol=1e-5, atol=1e-5)
    assert float(found.noise) == pytest.approx(noise, rel=1e-6)


def test_no_other_model_is_likelier_where_tasks_differ_in_their_inputs(monkeypatch):
    monkeypatch.setattr(random_coefficients, "_TOLERANCE", 1e-15)
    features, y = drawn(30, 6, 2, well_conditioned(2))
    mask = torch.arange(6) < torch.arange(1, 31).remainder(6).add(1).unsqueeze(1)
    found = RandomCoefficients.fitted(features, y, mask)
    free = [part.clone().requires_grad_() for part in found]
    mean, covariance, noise = free
    likelihood = RandomCoefficients(mean, (covariance + covariance.mT) / 2, noise).log_likelihood(features, y, mask)
    for gradient in torch.autograd.grad(likelihood, free):
        assert gradient.abs().max() < 1e-3
    best = found.log_likelihood(features, y, mask)
    for seed in range(20):
        noise = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        other = found._replace(mean=found.mean + 0.01 * noise[:2], noise=found.noise * (0.02 * noise[2]).exp())
        assert other.log_likelihood(features, y, mask) < best


def test_padding_is_no_part_of_the_fit():
    features, y = drawn(10, 6, 2, model(2))
    mask = torch.arange(6) < torch.arange(10).remainder(5).add(2).unsqueeze(1)
    spoiled = y.where(mask, 1e6), features.where(mask.unsqueeze(-1), -1e6)
    for one, other in zip(
        RandomCoefficients.fitted(features, y, mask),
        RandomCoefficients.fitted(spoiled[1], spoiled[0], mask),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=0)


# --- polynomials ----------------------------------------------------------------------------------------------------


def polynomials(x, y, mask=None):
    """Of ``[tasks, rows]`` or ``[tasks, rows, columns]``."""
    x, y = (tensor(values) if np.ndim(values) == 3 else tensor(values).unsqueeze(-1) for values in (x, y))
    return Polynomials(Points(x, y, torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask))


def task_of(x, y, asked):
    support, query = (tensor(values) if np.ndim(values) == 3 else tensor(values).unsqueeze(-1) for values in (x, asked))
    y = tensor(y) if np.ndim(y) == 3 else tensor(y).unsqueeze(-1)
    nothing = torch.zeros(*query.shape[:2], y.shape[-1], dtype=torch.float64)
    return Task(Points(support, y), Points(query, nothing), torch.zeros(len(support)))


def test_with_a_prior_is_the_gaussian_process_whose_kernel_the_training_tasks_have():
    """The prior in the powers themselves: the process does not know in which basis it was fitted."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.5, 1.5, size=(40, 8))
    y = np.stack([np.polyval(rng.normal(1, [0.2, 0.5, 1]), row) for row in x]) + 0.1 * rng.normal(size=x.shape)
    made = polynomials(x, y)
    asked = np.linspace(-2, 2, 5)[None]
    found = made.with_prior(task_of(x[:1, :3], y[:1, :3], asked), 2)
    basis, (prior,) = made._prior(2)
    truth = RandomCoefficients(basis @ prior.mean, basis @ prior.covariance @ basis.mT, prior.noise)
    support, new = np.vander(x[0, :3], 3, increasing=True), np.vander(asked[0], 3, increasing=True)
    weights = np.linalg.solve(kernel(truth, support), y[0, :3] - support @ truth.mean.numpy())
    expected = new @ truth.mean.numpy() + new @ truth.covariance.numpy() @ support.T @ weights
    assert_close(found[0, :, 0], tensor(expected), rtol=1e-8, atol=1e-8)
    # which is near to the world's own
    assert_close(truth.mean, tensor([1.0, 1.0, 1.0]), rtol=0, atol=0.5)
    assert float(prior.noise) == pytest.approx(0.01, rel=0.3)


def test_each_output_has_a_prior_of_its_own():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5, 2)), rng.normal(size=(12, 5, 3))
    task, made = task_of(x[:2, :3], y[:2, :3], x[:2, 3:]), polynomials(x, y)
    found = made.with_prior(task, 1)
    assert found.shape == (2, 2, 3)
    for output in range(3):
        alone = polynomials(x, y[..., [output]])
        expected = alone.with_prior(task_of(x[:2, :3], y[:2, :3, [output]], x[:2, 3:]), 1)
        assert_close(found[..., [output]], expected, rtol=0, atol=1e-12)


def doses(values, tasks=6, rows=8):
    return np.resize(np.array(values, dtype=float), (tasks, rows))


DEGENERATE = {
    "all tasks alike": (doses(range(8)) / 4 - 1, doses(range(8)) ** 2 / 30),
    "all tasks and rows alike": (doses([1]), doses([0])),
    "one row each": (np.linspace(-1, 1, 6)[:, None], np.arange(6.0)[:, None] / 3),
    "one task": (doses(range(8), 1) / 4, np.sin(doses(range(8), 1))),
    "one row in all": (np.zeros((1, 1)), np.zeros((1, 1))),
    "x is constant": (doses([0]), np.random.default_rng(0).normal(size=(6, 8))),
    "two doses": (doses([-1, 1]), np.random.default_rng(0).normal(size=(6, 8))),
    "lines without noise": (doses(range(8)) / 4, doses(range(8)) * np.arange(6)[:, None] / 10),
}


@pytest.mark.parametrize("data", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("degree", [0, 1, 2, 5])
def test_answers_are_finite_whatever_the_training_tasks_are(data, degree):
    made = polynomials(*data)
    x, y = data
    found = made.with_prior(task_of(x[:1, :3], y[:1, :3], np.linspace(-1, 1, 7)[None]), degree)
    assert found.isfinite().all()
    assert found.abs().max() < 100
    assert all(part.isfinite().all() for part in made._prior(degree).outputs[0])


def test_tasks_that_are_alike_are_predicted_whatever_their_support():
    x, y = DEGENERATE["all tasks alike"]
    found = polynomials(x, y).with_prior(task_of(x[:1, :1], y[:1, :1], x[:1]), 2)
    assert_close(found[0, :, 0], tensor(y[0]), rtol=0, atol=1e-4)


def test_lines_without_noise_are_predicted_from_two_points():
    x, y = DEGENERATE["lines without noise"]
    found = polynomials(x, y).with_prior(task_of(x[3:4, :2], y[3:4, :2], x[3:4]), 1)
    assert_close(found[0, :, 0], tensor(y[3]), rtol=0, atol=1e-4)
