from collections import Counter
from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch
from csv_files import GAPMINDER, curves_of, ragged_rows, sampled, told
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from metalit.data import Curves, Episodes, Scaling, Sine
from metalit.problem import Points, Task
from metalit.problems import FewShot

SPLITS = ("train", "val", "test")
SIGMAS = 5
GLOBAL, SUPPORT = "one polynomial for all tasks", "a polynomial for each support set"
PRIOR = "an empirical-Bayes polynomial"


def gapminder(**options):
    return Curves(str(GAPMINDER), "country", ["year", "gdpPercap"], ["lifeExp", "pop"], **options)


def plain_curves(folder, tasks=10, rows=6, **options):
    """Equally long curves, y = x², x = 100t + row."""
    return curves_of(folder, ragged_rows([rows] * tasks), **options)


def names_of(curves):
    return {split: curves.splits[split].names for split in SPLITS}


def in_file(curves, tasks):
    """Of each drawn task: its name and the x and y of its real rows, support before query, in the file's units."""
    scaling, mask = curves.scaling(), tasks.query.mask
    for task in range(len(tasks.key)):
        real = slice(None) if mask is None else mask[task]
        x = scaling.restore_x(torch.cat([tasks.support.x[task], tasks.query.x[task][real]]))
        y = scaling.restore_y(torch.cat([tasks.support.y[task], tasks.query.y[task][real]]))
        yield x.numpy(), y.numpy()


def owner(x):
    """The one task that owns all rows of x, in a table of :func:`ragged_rows`."""
    (task,) = set((x.round() // 100).astype(int).flatten().tolist())
    return f"t{task}"


def table_of(curves):
    frame = pd.read_csv(curves.file)
    return {str(name): (rows[list(curves.x)], rows[list(curves.y)]) for name, rows in frame.groupby(curves.task)}


# --- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_task_is_in_exactly_one_split(seed):
    names = names_of(gapminder(split_seed=seed))
    assert sorted(chain(*names.values())) == sorted(set(pd.read_csv(GAPMINDER)["country"]))
    assert {split: len(chosen) for split, chosen in names.items()} == {"train": 86, "val": 28, "test": 28}


@pytest.mark.parametrize(("val", "test", "sizes"), [(0.1, 0.5, [4, 1, 5]), (0.3, 0.1, [6, 3, 1])])
def test_fractions_are_those_of_the_tasks(tmp_path, val, test, sizes):
    assert [len(chosen) for chosen in names_of(plain_curves(tmp_path, val=val, test=test)).values()] == sizes


def test_a_split_holds_every_row_of_its_tasks():
    curves = gapminder()
    table, scaling = table_of(curves), curves.scaling()
    for split in SPLITS:
        held = curves.splits[split]
        for task, name in enumerate(held.names):
            x, y = table[name]
            assert held.length[task] == len(x) == 12
            assert_close(scaling.restore_x(held.x[task]).numpy(), x.to_numpy(float), rtol=1e-13, atol=1e-12)
            assert_close(scaling.restore_y(held.y[task]).numpy(), y.to_numpy(float), rtol=1e-12, atol=1e-6)


def test_drawn_tasks_show_rows_of_their_own_split_only(tmp_path):
    curves = plain_curves(tmp_path)
    seen = {split: {owner(x) for x, _ in in_file(curves, sampled(curves, split, 200, 2, None))} for split in SPLITS}
    assert seen == {split: set(names) for split, names in names_of(curves).items()}


def test_the_split_is_a_function_of_its_seed(tmp_path):
    assert names_of(plain_curves(tmp_path, split_seed=3)) == names_of(plain_curves(tmp_path, split_seed=3))
    tests = [tuple(names_of(plain_curves(tmp_path, split_seed=seed))["test"]) for seed in range(60)]
    assert len(set(tests)) > 20
    assert {name for chosen in tests for name in chosen} == {f"t{task}" for task in range(10)}


def test_the_split_does_not_depend_on_the_order_of_the_rows_or_on_their_values(tmp_path):
    rows = ragged_rows()
    expected = names_of(curves_of(tmp_path, rows))
    assert names_of(curves_of(tmp_path, rows[::-1])) == expected
    assert names_of(curves_of(tmp_path, [(name, 1 + row, row) for row, (name, *_) in enumerate(rows)])) == expected


# --- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_scaling_is_that_of_the_training_rows(seed):
    curves = gapminder(split_seed=seed)
    table = table_of(curves)
    x, y = (np.concatenate([table[name][part] for name in names_of(curves)["train"]]) for part in (0, 1))
    scaling = curves.scaling()
    for found, expected in [
        (scaling.x_mean, x.mean(0)),
        (scaling.x_std, x.std(0)),
        (scaling.y_mean, y.mean(0)),
        (scaling.y_std, y.std(0)),
    ]:
        assert_close(np.array(found), expected, rtol=1e-12, atol=0)


def test_the_scaling_of_ragged_curves_knows_no_padding(tmp_path):
    curves = curves_of(tmp_path, ragged_rows())
    train = set(names_of(curves)["train"])
    x, y = np.array([row[1:] for row in ragged_rows() if row[0] in train], dtype=float).T
    found = curves.scaling()
    assert_close([found.x_mean[0], found.x_std[0]], [x.mean(), x.std()], rtol=1e-12, atol=0)
    assert_close([found.y_mean[0], found.y_std[0]], [y.mean(), y.std()], rtol=1e-12, atol=0)


def changed(rows, task):
    return [(name, x, y + 1000.0 if name == task else y) for name, x, y in rows]


def test_only_training_tasks_decide_the_scaling(tmp_path):
    rows = ragged_rows()
    curves = curves_of(tmp_path, rows)
    scaling, names, train = curves.scaling(), names_of(curves), curves.splits["train"].y
    for split in SPLITS:
        other = curves_of(tmp_path, changed(rows, names[split][0]))
        assert (other.scaling() == scaling) == (split != "train")
        assert torch.equal(other.splits["train"].y, train) == (split != "train")
        assert not torch.equal(other.splits[split].y, curves.splits[split].y)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.floats(1e-3, 1e6), st.floats(-1e6, 1e6))
def test_scaling_centres_scales_and_comes_back(seed, inputs, outputs, spread, offset):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(20, n, generator=generator, dtype=torch.float64) * spread + offset for n in (inputs, outputs))
    scaling = Scaling.of(x, y)
    slack = 1e-14 * (1 + abs(offset) / spread)
    for values, normal, back in [
        (x, scaling.normalise_x(x), scaling.restore_x),
        (y, scaling.normalise_y(y), scaling.restore_y),
    ]:
        assert_close(normal.mean(0), torch.zeros_like(normal[0]), rtol=0, atol=10 * slack)
        assert_close(normal.std(0, correction=0), torch.ones_like(normal[0]), rtol=0, atol=10 * slack)
        assert_close(back(normal), values, rtol=1e-14, atol=1e-14 * (spread + abs(offset)))
    assert Scaling(**scaling.state()) == scaling
    assert scaling.changes


def test_scaling_keeps_the_range_of_the_training_rows(tmp_path):
    curves = curves_of(tmp_path, ragged_rows())
    x, y = np.array([row[1:] for row in ragged_rows() if row[0] in set(names_of(curves)["train"])], dtype=float).T
    found = curves.scaling()
    assert [*found.x_min, *found.x_max, *found.y_min, *found.y_max] == [x.min(), x.max(), y.min(), y.max()]
    assert Scaling(**found.state()) == found
    assert Scaling(**found.state()).x_max == found.x_max


def test_scalings_agree_but_for_rounding_errors():
    scaling = Scaling([0.0, 1e6], [1.0, 1e-3], [5.0], [2.0])
    assert not scaling.difference(Scaling.restored(scaling.state()))
    least = {name: list(getattr(scaling, name)) for name in ("x_mean", "x_std", "y_mean", "y_std")}
    assert not scaling.difference(Scaling.restored(least))
    assert not scaling.difference(Scaling([1e-12, 1e6], [1.0 + 1e-12, 1e-3], [5.0], [2.0]))
    for name, other in (
        ("x_std", Scaling([0.0, 1e6], [1.0, 1.001e-3], [5.0], [2.0])),
        ("x_mean", Scaling([1e-6, 1e6], [1.0, 1e-3], [5.0], [2.0])),
        ("x_mean", Scaling([0.0], [1.0], [5.0], [2.0])),
        ("y_mean", Scaling([0.0, 1e6], [1.0, 1e-3], [5.0, 5.0], [2.0, 2.0])),
        ("x_shape", Scaling([0.0, 1e6], [1.0, 1e-3], [5.0], [2.0], x_shape=[2, 8, 8])),
    ):
        assert scaling.difference(other) == name


def test_scaling_goes_to_float64_before_it_rounds():
    years = torch.tensor([[2007.0], [1952.0]])
    scaling = Scaling([1952.123456789], [17.3], [0.0], [1.0])
    found = scaling.normalise_x(years)
    assert found.dtype == scaling.restore_y(years).dtype == torch.float64
    assert found.flatten().tolist() == [(2007 - 1952.123456789) / 17.3, (1952 - 1952.123456789) / 17.3]


def test_a_constant_column_is_only_centred():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]]).double()
    scaling = Scaling.of(x, x)
    assert scaling == Scaling([2.0, 5.0], [1.0, 1.0], [2.0, 5.0], [1.0, 1.0])
    assert scaling.normalise_x(x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_the_identity_changes_nothing():
    x = torch.tensor([[1.5, -2.0]]).double()
    scaling = Scaling.identity(2, 1)
    assert not scaling.changes
    assert scaling.normalise_x(x).tolist() == scaling.restore_x(x).tolist() == x.tolist()
    assert len(scaling.y_mean) == len(scaling.y_std) == 1


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_support_and_query_are_disjoint_rows_of_one_country(split):
    curves, frame = gapminder(), pd.read_csv(GAPMINDER)
    frame = frame[frame["country"].isin(names_of(curves)[split])]
    table = frame[["year", "gdpPercap", "lifeExp", "pop"]].to_numpy(float)
    tasks = sampled(curves, split, 60, 3, None)
    assert (tasks.support.x.shape[1], tasks.query.x.shape[1], tasks.query.mask) == (3, 9, None)
    for x, y in in_file(curves, tasks):
        distance = (abs(np.hstack([x, y])[:, None] - table) / (1 + abs(table))).max(-1)
        assert distance.min(1).max() < 1e-12
        rows = frame.iloc[distance.argmin(1)]
        assert rows["country"].nunique() == 1
        assert rows["year"].nunique() == 12


def test_several_columns_keep_their_order(tmp_path):
    rows = [(f"t{t}", 10 * t + r, -r, r + 0.5, 7 * t, t * r) for t in range(6) for r in range(5)]
    curves = curves_of(tmp_path, rows, x=("a", "b"), y=("c", "d", "e"))
    tasks = sampled(curves, "val", 4, 2, None)
    assert (tasks.support.x.shape, tasks.support.y.shape) == ((4, 2, 2), (4, 2, 3))
    assert (tasks.query.x.shape, tasks.query.y.shape) == ((4, 3, 2), (4, 3, 3))
    assert tuple(curves.columns) == ("task", ["a", "b"], ["c", "d", "e"])
    for x, y in in_file(curves, tasks):
        task, row = (x[:, 0] // 10).round(), -x[:, 1]
        assert_close(x[:, 0], 10 * task + row, rtol=0, atol=1e-9)
        assert_close(y, np.stack([row + 0.5, 7 * task, task * row], 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("split", "tasks"), [("train", 6), ("val", 2)])
def test_every_row_of_every_task_is_equally_often_support(tmp_path, split, tasks):
    curves, draws = plain_curves(tmp_path, rows=6), 6000
    support = sampled(curves, split, draws, 2, 1).support.x
    counts = Counter(curves.scaling().restore_x(support).round().long().flatten().tolist())
    share = 1 / tasks * 2 / 6
    assert len(counts) == 6 * tasks
    assert max(abs(count - draws * share) for count in counts.values()) < SIGMAS * (draws * share * (1 - share)) ** 0.5


def test_held_out_tasks_come_in_turn_with_new_rows_each_time(tmp_path):
    curves = plain_curves(tmp_path, tasks=20)
    names = names_of(curves)["val"]
    assert (curves.count("train"), curves.count("val"), curves.count("test")) == (None, 4, 4)
    drawn = [(owner(x), tuple(x[:2, 0].round())) for x, _ in in_file(curves, sampled(curves, "val", 40, 2, None))]
    assert [name for name, _ in drawn] == names * 10
    for task in range(4):
        assert len({support for _, support in drawn[task::4]}) > 3


def test_training_tasks_are_drawn_uniformly_with_replacement(tmp_path):
    curves = plain_curves(tmp_path)
    names, draws = names_of(curves)["train"], 6000
    drawn = [owner(x) for x, _ in in_file(curves, sampled(curves, "train", draws, 1, 1))]
    counts = Counter(drawn)
    assert sorted(counts) == names
    assert max(abs(count - draws / 6) for count in counts.values()) < SIGMAS * (draws * (1 / 6) * (5 / 6)) ** 0.5
    repeats = sum(one == other for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert abs(repeats - draws / 12) < SIGMAS * (draws / 2 * (1 / 6) * (5 / 6)) ** 0.5


def test_numeric_task_names_are_names(tmp_path):
    rows = [(task, row, task) for task in (1, 2, 10, 20, 3) for row in range(3)]
    names = names_of(curves_of(tmp_path, rows))
    assert sorted(chain(*names.values())) == ["1", "10", "2", "20", "3"]


# --- ragged curves --------------------------------------------------------------------------------------------------


LENGTHS = (4, 6, 9, 5, 7, 8, 4, 6, 9, 5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("shots", "queries"), [(1, None), (3, None), (3, 4), (3, 1), (2, 50)])
def test_the_mask_counts_the_rows_that_a_curve_has_left(tmp_path, split, shots, queries):
    curves = curves_of(tmp_path, ragged_rows(LENGTHS))
    longest = max(LENGTHS[int(name[1:])] for name in names_of(curves)[split])
    tasks = sampled(curves, split, 30, shots, queries)
    assert tasks.query.x.shape[1] == (longest - shots if queries is None else min(queries, longest - shots))
    assert tasks.support.mask is None
    for x, y in in_file(curves, tasks):
        left = LENGTHS[int(owner(x)[1:])] - shots
        assert len(x) == shots + (left if queries is None else min(queries, left))
        assert len(set(x[:, 0].round())) == len(x)
        assert_close(y, x**2, rtol=1e-9, atol=1e-6)


def test_real_rows_come_before_padding_and_the_mask_exists_only_where_needed(tmp_path):
    curves = curves_of(tmp_path, ragged_rows(LENGTHS))
    mask = sampled(curves, "train", 30, 2, None).query.mask
    assert not mask.all()
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert sampled(curves, "train", 30, 3, 1).query.mask is None


def test_padding_is_no_part_of_a_masked_loss(tmp_path):
    curves = curves_of(tmp_path, ragged_rows(LENGTHS))
    tasks, problem = sampled(curves, "train", 20, 2, None), FewShot(nn.Linear(1, 1))
    prediction = torch.sin(tasks.query.x)
    for task in range(20):
        points = Points(*(leaf[task] for leaf in tasks.query))
        spoilt = torch.where(points.mask[:, None], 0.0, 1e6)
        expected = (prediction[task] - points.y)[points.mask].square().mean()
        found = problem.judge(prediction[task] + spoilt, points._replace(y=points.y - spoilt))
        assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shots", [4, 8])
@pytest.mark.parametrize("split", SPLITS)
def test_a_curve_with_no_row_left_is_told(tmp_path, split, shots):
    curves = curves_of(tmp_path, ragged_rows([4] * 10))
    curves.check(split, Episodes(shots=3))
    told(
        lambda: curves.check(split, Episodes(shots=shots)),
        f"data.{split}.shots={shots}",
        repr(curves.file),
        "only 4 row(s)",
        f"{shots + 1} are needed",
        "lower the shots",
    )


def test_the_check_names_the_shortest_curve_of_that_split_alone(tmp_path):
    rows = ragged_rows([6] * 10)
    short = names_of(curves_of(tmp_path, rows))["val"][1]
    curves = curves_of(tmp_path, [row for row in rows if row[0] != short or row[1] % 100 < 2])
    curves.check("train", Episodes(shots=5))
    curves.check("test", Episodes(shots=5))
    curves.check("val", Episodes(shots=1))
    told(
        lambda: curves.check("val", Episodes(shots=2)), "data.val.shots=2", repr(short), "only 2 row(s)", "3 are needed"
    )


# --- baselines ------------------------------------------------------------------------------------------------------


def predicted(curves, shots, split="test", queries=None):
    tasks = sampled(curves, split, 40, shots, queries)
    return tasks, curves.baselines(tasks)


def test_where_x_says_nothing_the_global_fit_is_the_training_mean(tmp_path):
    rows = [(f"t{task}", row, task**2) for task in range(10) for row in range(5)]
    curves = curves_of(tmp_path, rows)
    mean = np.mean([int(name[1:]) ** 2 for name in names_of(curves)["train"]])
    tasks, found = predicted(curves, 2)
    restored = curves.scaling().restore_y(found[GLOBAL])
    assert_close(restored, torch.full_like(restored, mean), rtol=1e-9, atol=0)
    assert_close(found[SUPPORT], tasks.query.y, rtol=0, atol=1e-9)


def test_padding_is_no_part_of_the_baselines(tmp_path):
    curves = curves_of(tmp_path, [(name, x, 7.0) for name, x, _ in ragged_rows(LENGTHS)])
    tasks, found = predicted(curves, 2, "val")
    assert tasks.query.mask is not None
    for prediction in found.values():
        restored = curves.scaling().restore_y(prediction)[tasks.query.mask]
        assert_close(restored, torch.full_like(restored, 7.0), rtol=0, atol=1e-9)


def test_padding_is_no_part_of_the_choice_of_degrees(tmp_path):
    """Padding lies at (0, 0): a constant comes nearer to it than the steep lines on which the real rows lie."""
    rng = np.random.default_rng(0)
    slopes = [(task, length, rng.uniform(1, 3)) for task, length in enumerate(LENGTHS)]
    rows = [(f"t{task}", x, slope * (x - 3)) for task, length, slope in slopes for x in rng.uniform(3, 4, size=length)]
    curves = curves_of(tmp_path, rows)
    assert not sampled(curves, "val", 2, 3, None).query.mask.all()
    tasks, found = predicted(curves, 3)
    assert_close(found[SUPPORT][tasks.query.mask], tasks.query.y[tasks.query.mask], rtol=0, atol=1e-9)


def linear_rows(inputs, seed=0):
    rng = np.random.default_rng(seed)
    for task in range(15):
        slopes = rng.normal(size=(inputs + 1, 2))
        for x in rng.normal(size=(9, inputs)):
            yield (f"t{task}", *x, *(slopes[0] + x @ slopes[1:]))


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_a_linear_world_is_predicted_exactly_from_the_support(tmp_path, inputs):
    curves = curves_of(tmp_path, linear_rows(inputs), x=[f"x{i}" for i in range(inputs)], y=("y", "z"))
    tasks, found = predicted(curves, 5)
    assert_close(found[SUPPORT], tasks.query.y, rtol=0, atol=1e-8)
    assert (found[GLOBAL] - tasks.query.y).square().mean() > 0.1


def test_a_polynomial_world_is_predicted_exactly_by_the_global_fit(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"t{task}", x, 1 - x + x**3 / 2) for task in range(10) for x in rng.uniform(-2, 2, size=7)]
    tasks, found = predicted(curves_of(tmp_path, rows), 2)
    assert_close(found[GLOBAL], tasks.query.y, rtol=0, atol=1e-9)
    assert (found[SUPPORT] - tasks.query.y).abs().max() > 0.1


def lines_but_in_validation(folder, held_out):
    """A world of rising lines, in which ``held_out(x)`` is y of the validation tasks."""
    lines = [(f"t{task}", row, task + row) for task in range(20) for row in range(8)]
    held = set(names_of(curves_of(folder, lines))["val"])
    return curves_of(folder, [(name, x, held_out(x) if name in held else y) for name, x, y in lines])


def test_the_degree_of_the_support_fit_is_chosen_on_the_validation_tasks(tmp_path):
    """They are noise, for which no polynomial of three points beats their mean."""
    rng = np.random.default_rng(0)
    tasks, found = predicted(lines_but_in_validation(tmp_path, lambda x: 100 * rng.normal()), 3)
    assert_close(found[SUPPORT], tasks.support.y.mean(1, keepdim=True).expand_as(tasks.query.y), rtol=0, atol=1e-12)


def test_the_degree_of_the_global_fit_is_chosen_on_the_validation_tasks(tmp_path):
    """They fall where the training tasks rise, so that a constant is nearer: the training mean, 0 when normalised."""
    _, found = predicted(lines_but_in_validation(tmp_path, lambda x: 10 - x), 3)
    assert_close(found[GLOBAL], torch.zeros_like(found[GLOBAL]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arms", [(0.5,), (2.0, 7.0), (1.0, 4.0, 9.0)])
def test_the_global_fit_is_that_of_least_squares_where_a_column_has_few_values(tmp_path, arms):
    """Powers of an input with k values have rank k: what they fit is unique, though their coefficients are not."""
    rng = np.random.default_rng(0)
    rows = [
        (f"t{task}", x, arms[row % len(arms)], np.sin(2 * x) + 0.1 * rng.normal())
        for task in range(12)
        for row, x in enumerate(rng.uniform(-2, 2, size=7))
    ]
    curves = curves_of(tmp_path, rows, x=("x", "arm"))
    held = curves.splits["train"]
    x, y = held.x.flatten(0, 1), held.y.flatten(0, 1)
    for degree in range(6):
        powers = np.concatenate([np.ones((len(x), 1)), *(x.numpy() ** power for power in range(1, degree + 1))], 1)
        expected = torch.tensor(powers @ np.linalg.lstsq(powers, y.numpy(), rcond=None)[0])
        for _ in range(20):
            (torch.rand(9) * 1e6, torch.randint(0, 100, (13,)))  # what memory held before is no part of it
            found = curves._polynomials.of_all(Task(Points(x, y), Points(x, y), torch.tensor(0)), degree)
            assert_close(found, expected, rtol=0, atol=1e-9)


def test_baselines_are_found_in_double_precision_on_the_cpu_and_come_back():
    curves = Curves(str(GAPMINDER), "country", ["year"], ["lifeExp"])
    tasks = sampled(curves, "test", 5, 3, None)
    half = tree_map(lambda leaf: leaf.half() if leaf is not None and leaf.is_floating_point() else leaf, tasks)
    for name, found in curves.baselines(half).items():
        assert_close(found, curves.baselines(tasks)[name], rtol=0, atol=0.01)


def test_held_out_tasks_have_names_and_drawn_ones_have_none(tmp_path):
    curves = plain_curves(tmp_path, tasks=20)
    for split in ("val", "test"):
        drawn = sampled(curves, split, 9, 2, None)
        assert [curves.name(split, index) for index in range(9)] == [owner(x) for x, _ in in_file(curves, drawn)]
    assert curves.name("train", 0) is None
    assert Sine().name("test", 0) is None


@pytest.fixture(scope="module")
def life_and_people():
    """Its polynomials are fitted once."""
    return gapminder()


@pytest.mark.parametrize(("shots", "queries"), [(1, None), (3, 4), (5, None), (11, None)])
def test_the_baselines_of_gapminder_are_finite_and_of_the_right_shape(life_and_people, shots, queries):
    tasks, found = predicted(life_and_people, shots, queries=queries)
    assert list(found) == [GLOBAL, SUPPORT, PRIOR]
    for prediction in found.values():
        assert prediction.shape == tasks.query.y.shape == (40, 12 - shots if queries is None else queries, 2)
        assert prediction.isfinite().all()


def test_on_life_expectancy_three_years_of_a_country_say_more_than_all_others():
    curves = Curves(str(GAPMINDER), "country", ["year"], ["lifeExp"])
    tasks, found = predicted(curves, 3)
    errors = {name: (prediction - tasks.query.y).square().mean().item() for name, prediction in found.items()}
    assert errors[SUPPORT] < 0.2 < errors[GLOBAL] < 1.2
    # all others say the more
    assert errors[PRIOR] < 0.6 * errors[SUPPORT]


def test_rounding_errors_of_a_constant_column_are_no_deviation():
    values = torch.full((1600, 1), 1952.7, dtype=torch.float64)
    assert Scaling.of(values, values).x_std == [1.0]


def test_baselines_never_fit_padding(tmp_path):
    lines = [f"{name},{x},{x * slope}" for slope, name in enumerate("abcdefgh") for x in range(9 if name < "e" else 5)]
    (tmp_path / "t.csv").write_text("\n".join(["task,x,y", *lines]) + "\n")
    tasks = Curves(str(tmp_path / "t.csv"), "task", ["x"], ["y"], val=0.4, test=0.4)
    drawn = tasks._choice_tasks(8)
    assert drawn.query.mask is None or bool(drawn.query.mask.any(1).all())
    assert drawn.support.x.shape[1] <= int(tasks.splits["val"].length.min()) - 1
