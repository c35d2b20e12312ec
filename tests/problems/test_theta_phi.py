import pytest
import torch
from cases import draw
from torch.testing import assert_close

from metalit.adapt import outer_variable
from metalit.errors import InputError
from metalit.hypergradients import JTg, Unrolled
from metalit.inner import SGD
from metalit.problems import ThetaPhi

KEY = torch.tensor(0)


def problem():
    return ThetaPhi([0.7, -1.2, 0.4], [1.1, -0.5]).double()


def test_both_losses_are_f():
    theta, own = draw(3), problem().outer()
    expected = theta.square().sum() * own["phi"].square().sum()
    assert_close(problem().outer_loss(theta, own, KEY), expected, rtol=1e-14, atol=0)
    assert_close(problem().inner_loss(theta, own, KEY, 4), expected, rtol=1e-14, atol=0)
    assert problem().outer().keys() == {"phi"}
    assert_close(problem().init({}, KEY).tolist(), [0.7, -1.2, 0.4])


@pytest.mark.parametrize("start", [None, draw(3, seed=2)])
def test_watch_holds_jtg_to_its_formulas_at_the_point_before_the_step(start):
    given, optimizer = problem(), SGD(0.05)
    found = JTg(2)(given, optimizer, outer_variable(given, optimizer), KEY, start)
    theta, phi = given.theta if start is None else start, given.phi.detach()
    watched = given.watch(theta, found.inner, given.outer(), found.gradient["problem"], KEY)
    s, square = phi @ phi, theta @ theta
    assert_close(watched["f"], s * square, rtol=1e-14, atol=0)
    for level, size in (("theta", 2 * s * square.sqrt()), ("phi", 8 * s**1.5 * square)):
        assert_close(watched[f"{level}_gradient_actual"], size, rtol=1e-13, atol=0)
        assert_close(watched[f"{level}_gradient_expected"], size, rtol=1e-13, atol=0)
        assert watched[f"{level}_gradient_difference"] < 1e-13
    assert len(watched) == 7


def test_watch_tells_another_estimator_from_jtg():
    given, optimizer = problem(), SGD(0.05)
    found = Unrolled(1)(given, optimizer, outer_variable(given, optimizer), KEY)
    watched = given.watch(given.theta, found.inner, given.outer(), found.gradient["problem"], KEY)
    phi, s, square = given.phi, given.phi @ given.phi, given.theta @ given.theta
    off = (found.gradient["problem"]["phi"] - 8 * s * square * phi).norm()
    assert off > 1
    assert_close(watched["phi_gradient_difference"], off, rtol=1e-13, atol=0)
    assert watched["theta_gradient_difference"] < 1e-13


def test_the_results_are_both_vectors():
    theta, given = draw(3), problem()
    found = given.results(theta, given.outer(), KEY)
    assert found["theta"]["theta"] is theta
    assert_close(found["phi"]["phi"], given.phi, rtol=0, atol=0)
    assert_close(given.scores(theta, given.outer(), KEY, "val")["loss"], given.outer_loss(theta, given.outer(), KEY))


@pytest.mark.parametrize(
    ("theta", "phi", "told"),
    [
        ([], [1.0], "ThetaPhi: theta=[] must hold at least one number"),
        ([1.0], (), "ThetaPhi: phi=[] must hold at least one number"),
    ],
)
def test_an_empty_vector_is_refused(theta, phi, told):
    with pytest.raises(InputError) as raised:
        ThetaPhi(theta, phi)
    assert str(raised.value) == told
