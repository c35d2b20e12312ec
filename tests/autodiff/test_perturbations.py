"""The steps of SAM and its kin are those that the papers write down."""

import math

import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from perturbed_networks import KEY, MODULES, Quadratic, data, exact, f64, filled, on_a_copy, positive, twice, value
from torch.testing import assert_close

from metalit.autodiff import SAM, AdaptiveSAM, Perturbation, WeightNoise, gradient_at, perturbed_gradient
from metalit.networks import MLP
from metalit.tree import flatten, norm


# SAM
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("rho", [0.0, 0.05, 1.7])
def test_sam_on_a_quadratic(size, rho):
    H, x = positive(size), draw(size, seed=3)
    slope = H @ x
    found = perturbed_gradient(Quadratic(H, x), value, SAM(rho))
    assert_close(found.perturbation["x"], rho * slope / slope.norm(), rtol=1e-14, atol=0)
    assert_close(found.gradient["x"], H @ (x + rho * slope / slope.norm()), rtol=1e-13, atol=0)
    at = x + rho * slope / slope.norm()
    assert_close(found.loss, 0.5 * at @ H @ at, rtol=1e-13, atol=0)


@pytest.mark.parametrize("a", [0.3, 1.0, 1.6])
@pytest.mark.parametrize("h", [1.0, 4.0])
def test_sam_in_one_dimension_ends_in_a_two_cycle(a, h):
    module, rho = Quadratic(f64([h]), f64(0.9)), 0.25
    visited = []
    for _ in range(300):
        with torch.no_grad():
            module.x -= a / h * perturbed_gradient(module, value, SAM(rho)).gradient["x"]
        visited.append(module.x.item())
    assert math.isclose(abs(visited[-1]), a * rho / (2 - a), rel_tol=1e-12)
    assert math.isclose(visited[-1], -visited[-2], rel_tol=1e-12)


@pytest.mark.parametrize("perturbation", [SAM(0.0), AdaptiveSAM(0.0), WeightNoise(0.0), [None] * 4, {}], ids=str)
def test_without_a_perturbation_it_is_the_plain_gradient(perturbation):
    module, x = MODULES["mlp"][0], data((3,))
    found = perturbed_gradient(module, twice(x), perturbation, key=KEY)
    exact(found[:2], on_a_copy(module, twice(x), {}))
    if isinstance(perturbation, Perturbation):
        assert list(found.perturbation) == list(found.gradient)
        assert norm(found.perturbation) == 0


@pytest.mark.parametrize("perturbation", [SAM(0.1), AdaptiveSAM(0.1)], ids=str)
def test_a_zero_gradient_perturbs_nothing(perturbation):
    found = perturbed_gradient(Quadratic(positive(3), f64(0, 0, 0)), value, perturbation)
    exact(found.perturbation["x"], f64(0, 0, 0))
    exact(found.gradient["x"], f64(0, 0, 0))


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e20])
def test_sams_step_has_its_length_whatever_the_gradient(scale):
    slope = {"w": torch.tensor([3 * scale, 0.0]), "b": torch.tensor(4 * scale)}
    found = SAM(0.5)(slope, lambda: slope, None)
    if scale in (1e-20, 1.0):
        assert_close(found, {"w": torch.tensor([0.3, 0.0]), "b": torch.tensor(0.4)}, rtol=1e-3, atol=0)
    assert all(bool(leaf.isfinite().all()) for leaf in found.values())


def test_sam_of_half_precision_does_not_overflow():
    slope = {"w": torch.full((4,), 6e4, dtype=torch.float16)}
    exact(SAM(1.0)(slope, lambda: slope, None), {"w": torch.full((4,), 0.5, dtype=torch.float16)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(bad):
    assert flatten(SAM()({}, lambda: {"w": f64(1, bad)}, None)).isnan().any()


@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 2.0), eta=st.floats(0.0, 1.0))
def test_the_lengths_of_both_steps_over_all_parameters(seed, rho, eta):
    module = filled(MLP([2, 3, 1], activation="Tanh"), seed=seed)
    loss = twice(draw(4, 2, seed=seed))
    plain, adaptive = (
        perturbed_gradient(module, loss, SAM(rho)),
        perturbed_gradient(module, loss, AdaptiveSAM(rho, eta)),
    )
    assert_close(norm(plain.perturbation), f64(rho)[0], rtol=1e-12, atol=0)
    slope = gradient_at(module, loss)[1]
    assert_close(flatten(plain.perturbation), rho * flatten(slope) / norm(slope), rtol=1e-12, atol=1e-15)
    T = flatten(dict(module.named_parameters())).abs().detach() + eta
    assert_close((flatten(adaptive.perturbation) / T).norm(), f64(rho)[0], rtol=1e-12, atol=0)
    g = flatten(slope)
    assert_close(flatten(adaptive.perturbation), rho * T**2 * g / (T * g).norm(), rtol=1e-12, atol=1e-15)
    exact(adaptive[:2], on_a_copy(module, loss, adaptive.perturbation))


def test_adaptive_sam_does_not_see_the_scale_of_the_weights():
    H, x, c = positive(3), draw(3, seed=3), 7.0
    small = perturbed_gradient(Quadratic(H, x), value, AdaptiveSAM(0.3, eta=0.0))
    large = perturbed_gradient(Quadratic(H / c**2, c * x), value, AdaptiveSAM(0.3, eta=0.0))
    assert_close(large.loss, small.loss, rtol=1e-13, atol=0)
    assert_close(large.perturbation["x"], c * small.perturbation["x"], rtol=1e-13, atol=0)


def test_the_norm_of_the_norms_is_the_norm_of_the_concatenation():
    found = perturbed_gradient(MODULES["conv"][0], twice(data((2, 4, 4))), SAM()).gradient
    norms = torch.stack([leaf.norm() for leaf in found.values()]).norm()
    assert_close(norms, torch.cat([leaf.flatten() for leaf in found.values()]).norm(), rtol=1e-14, atol=0)
    assert_close(norms, norm(found), rtol=1e-14, atol=0)
