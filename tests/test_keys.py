import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from metalit.keys import distinct, fold, normal, permutation, uniform

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
int64 = st.integers(-(1 << 63), (1 << 63) - 1)


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def signed(word):
    return word - (1 << 64) if word >> 63 else word


def folded(key, *data):
    for number in data:
        key = mix(mix((key + GAMMA) & WORD) ^ mix((number * GAMMA + 1) & WORD))
    return signed(key)


def words(key, count):
    return [mix((key + index * GAMMA) & WORD) for index in range(1, count + 1)]


def test_words_are_the_published_splitmix64_sequence_of_1234567():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert words(1234567, 4) == published
    assert uniform(torch.tensor(1234567), 4).tolist() == [(word >> 11) / 2**53 for word in published]


@given(int64)
def test_uniform_is_the_top_53_bits_of_splitmix64(key):
    assert uniform(torch.tensor(key), 5).tolist() == [(word >> 11) / 2**53 for word in words(key, 5)]


@given(int64, st.lists(int64, min_size=1, max_size=3))
def test_fold_is_the_reference_construction(key, data):
    assert fold(torch.tensor(key), *data).item() == folded(key, *data)


@given(int64, int64, int64)
def test_fold_of_several_numbers_is_fold_of_one_after_another(key, a, b):
    key = torch.tensor(key)
    assert torch.equal(fold(key, a, b), fold(fold(key, a), b))
    assert torch.equal(fold(key, torch.tensor(a), b), fold(key, a, torch.tensor(b)))


@given(int64, st.sets(int64, min_size=2, max_size=20))
def test_fold_of_different_numbers_gives_different_keys(key, data):
    assert len(set(fold(torch.tensor(key), torch.tensor(list(data))).tolist())) == len(data)


@given(int64, st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_fold_minds_the_order(key, a, b):
    assert (fold(torch.tensor(key), a, b).item() == fold(torch.tensor(key), b, a).item()) == (a == b)


def test_fold_broadcasts_keys_against_numbers():
    keys, numbers = torch.tensor([[3], [-4]]), torch.arange(3)
    expected = [[folded(key, number, 7) for number in range(3)] for key in (3, -4)]
    assert fold(keys, numbers, 7).tolist() == expected


def test_a_grid_of_folds_has_no_collisions():
    grid = fold(torch.arange(300)[:, None], torch.arange(300))
    assert grid.unique().numel() == 300 * 300


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3)])
def test_a_batch_of_keys_draws_what_each_key_draws(shape):
    keys = fold(torch.tensor(1), torch.arange(6).view(2, 3))
    for sample in (uniform, normal):
        batch = sample(keys, *shape)
        assert batch.shape == (2, 3, *shape)
        assert torch.equal(batch, torch.stack([torch.stack([sample(key, *shape) for key in row]) for row in keys]))
        assert torch.equal(batch, vmap(vmap(lambda key, sample=sample: sample(key, *shape)))(keys))


def test_draws_repeat_and_leave_torch_s_generator_alone():
    state = torch.get_rng_state()
    first = normal(torch.tensor(5), 4)
    torch.rand(1)
    assert torch.equal(normal(torch.tensor(5), 4), first)
    assert not torch.equal(normal(torch.tensor(6), 4), first)
    torch.set_rng_state(state)
    permutation(torch.tensor(5), 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_longer_draw_begins_with_the_shorter_one():
    key = torch.tensor(5)
    assert torch.equal(uniform(key, 9)[:4], uniform(key, 4))
    assert torch.equal(uniform(key, 3, 4), uniform(key, 12).view(3, 4))


def test_float32_is_float64_rounded_down_to_24_bits():
    key = torch.tensor(8)
    fine, coarse = uniform(key, 100_000), uniform(key, 100_000, dtype=torch.float32)
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse.double(), (fine * 2**24).floor() / 2**24)


def unmix(word):
    """The inverse of ``mix``."""

    def unshift(z, shift):
        restored = z
        for _ in range(64 // shift):
            restored = z ^ (restored >> shift)
        return restored

    word = unshift(word, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & WORD
    word = unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & WORD
    return unshift(word, 30)


def key_of_first_word(word):
    return torch.tensor(signed((unmix(word) - GAMMA) & WORD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_extremes_of_uniform_are_0_and_just_below_1(dtype):
    assert uniform(key_of_first_word(0), 1, dtype=dtype).item() == 0
    assert uniform(key_of_first_word(WORD), 1, dtype=dtype).item() == 1 - torch.finfo(dtype).eps / 2


def test_normal_is_finite_where_uniform_is_0():
    assert uniform(key_of_first_word(0), 1) == 0
    assert -9 < normal(key_of_first_word(0), 1) < -8


COUNT = 200_000
DRAWS = {
    "one key": lambda: uniform(torch.tensor(2026), COUNT),
    "folded keys": lambda: uniform(fold(torch.tensor(2026), torch.arange(COUNT))),
    "consecutive keys": lambda: uniform(torch.arange(COUNT)),
    "float32": lambda: uniform(torch.tensor(2026), COUNT, dtype=torch.float32).double(),
    "distribution function of normal": lambda: torch.special.ndtr(normal(torch.tensor(2026), COUNT)),
}
each_stream = pytest.mark.parametrize("stream", DRAWS.values(), ids=DRAWS.keys())


@each_stream
def test_raw_moments_of_uniform_are_within_5_sigma(stream):
    sample = stream()
    assert ((sample >= 0) & (sample < 1)).all()
    for order in (1, 2, 3, 4):
        sigma = math.sqrt((1 / (2 * order + 1) - 1 / (order + 1) ** 2) / COUNT)
        assert abs(sample.pow(order).mean() - 1 / (order + 1)) < 5 * sigma


@each_stream
def test_uniform_passes_kolmogorov_smirnov_at_one_in_a_million(stream):
    ordered = stream().sort().values
    rank = torch.arange(COUNT, dtype=torch.float64) / COUNT
    distance = torch.maximum((ordered - rank).max(), (rank + 1 / COUNT - ordered).max())
    assert distance * math.sqrt(COUNT) < math.sqrt(-math.log(1e-6 / 2) / 2)


@each_stream
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_neighbouring_draws_are_uncorrelated_within_5_sigma(stream, lag):
    centred = stream() - 0.5
    correlation = 12 * (centred[lag:] * centred[:-lag]).mean()
    assert abs(correlation) < 5 / math.sqrt(COUNT - lag)


@each_stream
def test_pairs_fill_the_square_evenly_within_5_sigma(stream):
    cells = (stream().view(-1, 2) * 16).floor().long()
    counts = torch.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256).double()
    expected = COUNT / 2 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_draws_of_folded_keys_are_uncorrelated_with_their_number_and_each_other_within_5_sigma():
    sample = uniform(fold(torch.tensor(1), torch.arange(300)[:, None], torch.arange(300)), 2) - 0.5
    number = torch.linspace(-0.5, 0.5, 300, dtype=torch.float64)
    pairs = {
        "draws of one key": (sample[..., 0], sample[..., 1]),
        "next first number": (sample[1:], sample[:-1]),
        "next second number": (sample[:, 1:], sample[:, :-1]),
        "swapped numbers": (sample[..., 0].triu(1), sample[..., 0].T.triu(1)),
        "second number": (sample[..., 0], number.expand(300, 300)),
    }
    for name, (a, b) in pairs.items():
        products = (a * b)[(a * b) != 0]
        assert abs(products.mean()) < 5 / 12 / math.sqrt(len(products)), name


def test_every_bit_is_fair_and_flips_with_every_bit_of_the_key_within_5_sigma():
    def bits(key):
        return (uniform(key) * 2**53).long()[..., None] >> torch.arange(53) & 1

    keys = fold(torch.tensor(4), torch.arange(2000))
    assert (bits(keys).double().mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000)
    for bit in range(64):
        flips = (bits(keys) ^ bits(keys ^ signed(1 << bit))).double().mean(0)
        assert (flips - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000), bit


def test_central_moments_of_normal_are_within_5_sigma():
    sample = normal(torch.tensor(77), COUNT)
    assert sample.dtype == torch.float64
    for order, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(sample.pow(order).mean() - moment) < 5 * math.sqrt(variance / COUNT)


def test_normal_inverts_the_distribution_function_at_the_draw_of_uniform():
    key = torch.tensor(77)
    assert_close(torch.special.ndtr(normal(key, 1000)), uniform(key, 1000), rtol=1e-12, atol=0)


@given(int64, st.integers(0, 40))
def test_permutation_is_a_permutation(key, count):
    assert sorted(permutation(torch.tensor(key), count).tolist()) == list(range(count))


@given(int64, st.lists(st.booleans(), min_size=1, max_size=20))
def test_permutation_puts_allowed_positions_first(key, allowed):
    order = permutation(torch.tensor(key), len(allowed), torch.tensor(allowed)).tolist()
    assert sorted(order) == list(range(len(allowed)))
    assert set(order[: sum(allowed)]) == {p for p, is_allowed in enumerate(allowed) if is_allowed}


def test_a_batch_of_permutations_is_each_permutation_with_its_own_allowed_positions():
    keys = fold(torch.tensor(1), torch.arange(50))
    allowed = uniform(keys, 8) < 0.5
    batch = permutation(keys, 8, allowed)
    assert torch.equal(batch, torch.stack([permutation(k, 8, a) for k, a in zip(keys, allowed, strict=True)]))
    assert torch.equal(batch, vmap(lambda key, mask: permutation(key, 8, mask))(keys, allowed))


@pytest.mark.parametrize("allowed", [None, (True, False, True, False, True)])
def test_every_order_is_equally_likely_within_5_sigma(allowed):
    keys, count = fold(torch.tensor(9), torch.arange(60_000)), 3 if allowed is None else 5
    mask = None if allowed is None else torch.tensor(allowed).expand(60_000, 5)
    free = range(3) if allowed is None else (0, 2, 4)
    orders = permutation(keys, count, mask)[:, :3]
    shares = [(orders == torch.tensor(order)).all(1).double().mean().item() for order in permutations(free)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert max(abs(share - 1 / 6) for share in shares) < 5 * math.sqrt(1 / 6 * 5 / 6 / 60_000)


def test_uniform_draws_one_number_for_a_scalar_key():
    keys = torch.arange(3)
    assert uniform(torch.tensor(5)).shape == ()
    assert torch.equal(vmap(uniform)(keys), uniform(keys))


def test_normal_is_finite_where_uniform_is_just_below_1():
    assert 8 < normal(key_of_first_word(WORD), 1) < 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_can_go_on_where_another_ended(dtype):
    key = torch.tensor([3, 5])
    whole = uniform(key, 4, 3, dtype=dtype)
    assert torch.equal(uniform(key, 2, 3, dtype=dtype, first=6), whole[:, 2:])


@given(st.integers(0, 2**40), st.integers(1, 12), st.integers(0, 30))
def test_distinct_numbers_are_distinct_and_below(key, count, more):
    drawn = distinct(torch.tensor(key), count, count + more).tolist()
    assert len({*drawn}) == count
    assert {*drawn} <= {*range(count + more)}


def test_every_sequence_of_distinct_numbers_is_equally_likely_within_5_sigma():
    draws = 120_000
    drawn = distinct(torch.arange(draws), 3, 5)
    sequences = list(permutations(range(5), 3))
    found = (drawn * torch.tensor([25, 5, 1])).sum(1).bincount(minlength=125)
    counts = torch.tensor([found[25 * a + 5 * b + c] for a, b, c in sequences], dtype=torch.float64)
    chance = 1 / len(sequences)
    assert counts.sum() == draws
    assert ((counts - draws * chance).abs() <= 5 * math.sqrt(draws * chance * (1 - chance))).all()


def test_a_batch_draws_distinct_numbers_each_below_its_own_bound():
    keys, below = torch.arange(6).reshape(2, 3), torch.tensor([[3, 4, 5], [3, 100, 10**6]])
    each = [distinct(key, 3, int(most)) for key, most in zip(keys.flatten(), below.flatten(), strict=True)]
    assert torch.equal(distinct(keys, 3, below), torch.stack(each).reshape(2, 3, 3))
