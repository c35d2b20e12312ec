"""Sine tasks, held to closed forms; a bound of 5 standard errors is missed by chance once in 1.7 million draws."""

import math

import pytest
import torch
from csv_files import sampled, told
from torch.testing import assert_close

from metalit.data import Sine

SIGMAS = 5
# Dvoretzky–Kiefer–Wolfowitz: P(largest gap between the distribution functions > e) ≤ 2 exp(−2ne²), here 5.7e-7
GAP = math.sqrt(math.log(2 / 5.7e-7) / 2)

ZERO_COST = (5.0**3 - 0.1**3) / (3 * 4.9) / 2  # E[A²] E[sin²]
FLOOR = ZERO_COST - (5.1 / math.pi) ** 2 * (1 / 2 + math.sin(10) / 20)  # less E[(5.1/π)² cos² x]

GENERAL = [
    Sine(amplitude=(0.5, 2.0), phase=(-1.0, 2.0), frequency=(0.5, 2.5)),
    Sine(amplitude=(-1.0, 3.0), phase=(0.7, 0.7), frequency=(0.2, 0.9)),
    Sine(amplitude=(2.0, 2.0), phase=(0.3, 1.1), frequency=(-1.5, -1.5)),
    Sine(frequency=(0.8, 1.2), phase=(-math.pi, 0.0)),
]


def assert_mean(samples, expected, standard_error):
    """The mean of independent samples lies within SIGMAS standard errors, which are no larger than stated."""
    error = samples.std() / len(samples) ** 0.5
    assert 0 < error < standard_error
    assert abs(samples.mean() - expected) < SIGMAS * error


def assert_uniform(samples, low, high):
    """The samples stay in [low, high] and their distribution function is that of the uniform distribution."""
    assert low <= samples.min()
    assert samples.max() <= high
    fractions = (samples.sort().values - low) / (high - low)
    ranks = torch.arange(len(samples) + 1, dtype=torch.float64) / len(samples)
    gap = torch.maximum(ranks[1:] - fractions, fractions - ranks[:-1]).max()
    assert gap < GAP / len(samples) ** 0.5


def values_at(sine, x, count):
    """The values of the first ``count`` curves at one x: its range shrinks to a point, the curves stay."""
    narrow = Sine(sine.amplitude, sine.phase, sine.frequency, x=(x, x), noise=sine.noise)
    return sampled(narrow, "train", count, 1, 1).query.y[:, 0, 0]


def mean_over_tasks(sine, x):
    """A uniform average of a wave over an interval of its angle is the wave at the middle times a sinc."""
    (low, high), (first, last) = sine.frequency, sine.phase
    wave = torch.sin((low + high) / 2 * x - (first + last) / 2)
    over_frequencies = torch.sinc((high - low) / 2 * x / math.pi)
    over_phases = torch.sinc(torch.tensor((last - first) / 2 / math.pi).double())
    return sum(sine.amplitude) / 2 * wave * over_frequencies * over_phases


@pytest.fixture(scope="module")
def finn():
    return sampled(Sine(), "test", 200_000, 2, 5)


def test_the_closed_forms_are_those_of_the_literature():
    assert round(ZERO_COST, 4) == 4.2517
    assert round(FLOOR, 4) == 3.0057


def test_predicting_zero_costs_the_mean_square(finn):
    assert_mean(finn.query.y.square().mean((1, 2)), ZERO_COST, standard_error=0.01)


def test_the_best_curve_for_all_tasks_costs_the_floor():
    tasks = sampled(Sine(), "val", 20_000, 2, 5)
    prediction = Sine().baselines(tasks)["one curve for all tasks"]
    assert prediction.shape == tasks.query.y.shape
    assert_close(prediction, -5.1 / math.pi * torch.cos(tasks.query.x), rtol=0, atol=1e-14)
    assert_mean((prediction - tasks.query.y).square().mean((1, 2)), FLOOR, standard_error=0.03)


def test_the_closed_form_of_the_best_curve_costs_the_floor(finn):
    prediction = -5.1 / math.pi * torch.cos(finn.query.x)
    assert_mean((prediction - finn.query.y).square().mean((1, 2)), FLOOR, standard_error=0.01)


def test_what_the_best_curve_leaves_is_orthogonal_to_every_wave(finn):
    x, left = finn.query.x, finn.query.y + 5.1 / math.pi * torch.cos(finn.query.x)
    for wave in (torch.ones_like(x), x, torch.cos(x), torch.sin(x), torch.cos(2 * x), torch.sin(2 * x)):
        assert_mean((left * wave).mean((1, 2)), 0.0, standard_error=0.01)


def test_given_the_features_two_support_points_determine_the_task(finn):
    def features(x):
        return torch.cat([x.sin(), x.cos()], dim=-1)

    system = features(finn.support.x)
    condition = 1 / torch.linalg.det(system).abs()
    error = (features(finn.query.x) @ torch.linalg.solve(system, finn.support.y) - finn.query.y).abs()
    assert (error.amax((1, 2)) / condition).max() < 1e-13
    well_posed = condition < 100
    assert well_posed.double().mean() > 0.98
    assert error[well_posed].square().max() < 1e-22


def test_finns_mean_curve_is_the_closed_form():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert_close(Sine().mean_curve(x), -5.1 / math.pi * torch.cos(x), rtol=0, atol=1e-14)


def test_the_mean_curve_keeps_shape_and_dtype():
    x = torch.linspace(-5, 5, 12).reshape(2, 6, 1)
    found = Sine().mean_curve(x)
    assert found.dtype == torch.float32
    assert_close(found, -5.1 / math.pi * torch.cos(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sine", GENERAL)
def test_the_mean_curve_is_the_mean_over_drawn_tasks(sine):
    for x in (-4.3, -0.9, 0.0, 1.7, 5.0):
        expected = sine.mean_curve(torch.tensor([x], dtype=torch.float64)).item()
        samples = values_at(sine, x, 50_000)
        assert_mean(samples, expected, standard_error=0.02)


@pytest.mark.parametrize("sine", GENERAL)
def test_the_mean_curve_is_a_wave_times_two_sincs(sine):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    # the midpoint rule over frequencies errs by (x · width / 257)² / 24 of the amplitude
    assert_close(sine.mean_curve(x), mean_over_tasks(sine, x), rtol=0, atol=2 * (5 * 2 / 257) ** 2 / 24)


def test_amplitudes_are_uniform_on_their_range():
    peak = Sine(amplitude=(0.5, 3.0), phase=(0.0, 0.0))
    assert_uniform(values_at(peak, math.pi / 2, 50_000), 0.5, 3.0)


def test_phases_are_uniform_on_their_range():
    unit = Sine(amplitude=(1.0, 1.0), phase=(-1.2, 0.4))
    assert_uniform(-torch.asin(values_at(unit, 0.0, 50_000)), -1.2 - 1e-12, 0.4 + 1e-12)


def test_frequencies_are_uniform_on_their_range():
    unit = Sine(amplitude=(1.0, 1.0), phase=(0.0, 0.0), frequency=(0.2, 1.3))
    assert_uniform(torch.asin(values_at(unit, 1.0, 50_000)), 0.2 - 1e-12, 1.3 + 1e-12)


def test_inputs_of_support_and_query_are_uniform_on_their_range():
    tasks = sampled(Sine(x=(-2.0, 7.0)), "train", 10_000, 3, 4)
    assert_uniform(tasks.support.x.flatten(), -2.0, 7.0)
    assert_uniform(tasks.query.x.flatten(), -2.0, 7.0)


def test_amplitude_phase_frequency_and_inputs_are_drawn_independently():
    count = 50_000
    sine = Sine(amplitude=(1.0, 2.0), phase=(-0.5, 0.5), frequency=(0.5, 1.0))
    before, middle, after = (values_at(sine, x, count) for x in (-1.0, 0.0, 1.0))
    frequency = torch.acos(((before + after) / (2 * middle)).clamp(-1, 1))
    cos_part = (after - before) / (2 * torch.sin(frequency))
    curve = torch.stack([torch.hypot(cos_part, middle), torch.atan2(-middle, cos_part), frequency])
    tasks = sampled(sine, "train", count, 2, 3)
    drawn = torch.cat([curve, tasks.support.x[..., 0].T, tasks.query.x[..., 0].T])[:, middle.abs() > 1e-6]
    correlation = torch.corrcoef(drawn)[~torch.eye(8, dtype=torch.bool)]
    assert correlation.abs().max() < SIGMAS / count**0.5


def test_shapes_and_dtype():
    tasks = sampled(Sine(), "train", 6, 3, 4)
    assert [points.x.shape for points in (tasks.support, tasks.query)] == [(6, 3, 1), (6, 4, 1)]
    assert [points.y.shape for points in (tasks.support, tasks.query)] == [(6, 3, 1), (6, 4, 1)]
    assert {tensor.dtype for tensor in (*tasks.support[:2], *tasks.query[:2])} == {torch.float64}
    assert (tasks.support.mask, tasks.query.mask, tasks.key.shape) == (None, None, (6,))


def test_without_noise_y_is_exactly_the_curve():
    tasks = sampled(Sine((1.7, 1.7), (0.4, 0.4), (2.3, 2.3)), "train", 100, 5, 5)
    for points in (tasks.support, tasks.query):
        assert_close(points.y, 1.7 * torch.sin(2.3 * points.x - 0.4), rtol=0, atol=1e-15)


def test_noise_has_its_standard_deviation_on_support_and_query():
    clean, noisy = (sampled(Sine(noise=noise), "train", 50_000, 1, 1) for noise in (0.0, 0.3))
    noises = []
    for one, other in zip(clean[:2], noisy[:2], strict=True):
        assert torch.equal(one.x, other.x)
        noises.append((other.y - one.y).flatten())
        assert_mean(noises[-1], 0.0, standard_error=0.002)
        assert_mean(noises[-1].square(), 0.09, standard_error=0.001)
    assert_mean(noises[0] * noises[1], 0.0, standard_error=0.001)


def test_noise_is_normal_and_new_in_every_row():
    points = sampled(Sine(amplitude=(0.0, 0.0), noise=2.0), "train", 10_000, 5, 5).query
    x, noise = points.x.squeeze(-1), points.y.squeeze(-1)
    assert_mean(x[:, 0] * noise[:, 0], 0.0, standard_error=0.1)
    assert_uniform(torch.special.ndtr(noise.flatten() / 2), 0.0, 1.0)
    assert_mean(noise[:, 0] * noise[:, 1], 0.0, standard_error=0.05)
    assert_mean(noise[:-1, 0] * noise[1:, 0], 0.0, standard_error=0.05)


def test_the_family_of_meta_sgd_is_a_sine_of_a_phase_added():
    sine, count = Sine(frequency=(0.8, 1.2), phase=(-math.pi, 0.0)), 20_000
    y = [values_at(sine, x, count) for x in (-1.0, 0.0, 1.0, 2.0)]
    # y(x + 1) + y(x − 1) = 2 cos ω · y(x), at x = 0 and x = 1, which are never both near a root
    cosine = ((y[0] + y[2]) * y[1] + (y[1] + y[3]) * y[2]) / (2 * (y[1].square() + y[2].square()))
    omega = torch.acos(cosine)
    sin_part, cos_part = y[1], (y[2] - y[0]) / (2 * torch.sin(omega))
    amplitude, b = torch.hypot(sin_part, cos_part), torch.atan2(sin_part, cos_part)
    assert_uniform(amplitude, 0.1 - 1e-9, 5 + 1e-9)
    assert_uniform(omega, 0.8 - 1e-9, 1.2 + 1e-9)
    assert_uniform(b, -1e-9, math.pi + 1e-9)
    tasks = sampled(sine, "train", count, 2, 3)
    for points in (tasks.support, tasks.query):
        curve = amplitude[:, None] * torch.sin(omega[:, None] * points.x[..., 0] + b[:, None])
        assert_close(points.y[..., 0], curve, rtol=0, atol=1e-9)


@pytest.mark.parametrize("argument", ["amplitude", "phase", "frequency", "x"])
@pytest.mark.parametrize("bounds", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (-math.inf, 0.0), (0.0, math.inf)])
def test_bad_ranges_are_told(argument, bounds):
    told(lambda: Sine(**{argument: bounds}), f"{argument}={list(bounds)}", "two finite numbers, the lower one first")


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_bad_noise_is_told(noise):
    told(lambda: Sine(noise=noise), f"noise={noise}", "at least 0")


def test_a_range_may_be_one_point():
    assert_close(
        values_at(Sine((2.0, 2.0), (0.5, 0.5), (3.0, 3.0)), 1.0, 3), torch.full((3,), 2 * math.sin(2.5)).double()
    )


def test_the_columns_and_the_scaling_of_a_distribution_without_units():
    assert tuple(Sine().columns) == ("task", ["x"], ["y"])
    assert not Sine().scaling().changes
    assert [Sine().count(split) for split in ("train", "val", "test")] == [None] * 3


def test_the_mean_curve_of_wide_ranges_is_exact():
    wide = Sine(frequency=(0.0, 514.0), phase=(-math.pi / 2, -math.pi / 2))
    assert abs(float(wide.mean_curve(torch.tensor([math.pi], dtype=torch.float64)))) < 1e-12


def test_a_range_of_three_numbers_is_refused():
    told(lambda: Sine(amplitude=(1, 2, 3)), "amplitude=[1, 2, 3]")
