"""Episodes of classes: what is drawn, what is told, and how it is loaded."""

import pytest
import torch
from class_sources import Told, episodes
from csv_files import concatenated, same_bits, told
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from metalit.data import ClassTasks, Episodes, Glyphs, SklearnTable, TaskDataModule
from metalit.data.classes import scaling as class_scaling

CPU = torch.device("cpu")
SIZE = Episodes(ways=3, shots=2, queries=3)


def prepared(source=None, **options):
    tasks = ClassTasks(source or Told(), **options)
    tasks.prepare()
    return tasks


# --- what is drawn --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**30), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_an_episode_has_each_class_with_its_examples_and_no_example_twice(index, ways, shots, queries):
    tasks = prepared()
    task = episodes(tasks, "train", [index], Episodes(ways=ways, shots=shots, queries=queries))
    names = tasks.class_names("train")
    chosen = [names[number] for number in task.classes[0].tolist()]
    assert len({*chosen}) == ways
    values = {}
    for points, each in ((task.support, shots), (task.query, queries)):
        assert points.y.tolist() == [[label for label in range(ways) for _ in range(each)]]
        values[each, points is task.query] = tasks.values(points.x)[0, :, 0, 1, 1].tolist()
        for value, label in zip(values[each, points is task.query], points.y[0].tolist(), strict=True):
            assert f"c{value // 10}" == chosen[label]
    drawn = [value for side in values.values() for value in side]
    assert len({*drawn}) == len(drawn) == ways * (shots + queries)


@pytest.mark.parametrize("rotations", [False, True])
def test_a_task_is_the_same_whatever_the_batch(rotations):
    tasks = prepared(Told(counts=(6, 9, 5, 7, 8, 6, 9, 5, 7, 8)), rotations=rotations)
    batch = episodes(tasks, "train", range(8), SIZE)
    each = [episodes(tasks, "train", [index], SIZE) for index in range(8)]
    assert same_bits(batch, concatenated(each))
    assert same_bits(tasks.load(batch, CPU), concatenated([tasks.load(one, CPU) for one in each]))
    assert not same_bits(batch, episodes(tasks, "train", range(8), SIZE, seed=1))


def test_the_examples_of_each_class_are_drawn_for_themselves():
    tasks = prepared()
    support = episodes(tasks, "train", range(400), Episodes(ways=3, shots=1, queries=1)).support
    first, second, _ = (tasks.values(support.x)[..., 0, 1, 1] % 10).unbind(1)  # which of six examples
    assert 0.1 < float((first == second).double().mean()) < 0.25  # 1/6, within 3.5 standard deviations


def test_labels_are_drawn_anew_in_each_task():
    tasks = prepared(val=["c1"], test=["c2"])
    classes = episodes(tasks, "train", range(400), SIZE).classes
    labels = {int(label) for row in classes.tolist() for label, number in enumerate(row) if number == 0}
    assert labels == {0, 1, 2}
    assert {*classes.flatten().tolist()} == {*range(8)}


def test_every_example_comes_as_support_and_as_query():
    tasks = prepared(Told(counts=(3, 6, 6)), val=0, test=0)
    drawn = episodes(tasks, "train", range(400), Episodes(ways=2, shots=1, queries=1))
    for points in (drawn.support, drawn.query):
        assert {*points.x.flatten().tolist()} == {*range(15)}


def test_five_classes_unless_told_otherwise():
    tasks = prepared()
    assert episodes(tasks, "train", [0], Episodes(shots=1, queries=1)).classes.shape == (1, 5)


# --- how it is loaded -----------------------------------------------------------------------------------------------


def test_values_are_normalised_by_the_training_classes_alone():
    tasks = prepared(Told(size=(3, 2, 2)), val=["c9"], test=["c8"])
    x = torch.tensor([10 * number + example for number in range(8) for example in range(6)], dtype=torch.float64)
    pixels = torch.cat([x, x, x, 0 * x])
    scaling = tasks.scaling()
    assert scaling.x_shape == [3, 2, 2]
    assert scaling.x_mean == pytest.approx([pixels.mean().item()] * 3, rel=1e-12)
    assert scaling.x_std == pytest.approx([pixels.std(correction=0).item()] * 3, rel=1e-12)
    drawn = episodes(tasks, "test", [0], Episodes(ways=1, shots=1, queries=2))
    loaded = tasks.load(drawn, CPU)
    assert loaded.query.x.shape == (1, 2, 3, 2, 2)
    assert loaded.query.x.dtype == torch.float64
    raw = tasks.values(drawn.query.x)
    assert raw.dtype == torch.uint8
    assert_close(scaling.restore_x(loaded.query.x), raw.double())


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", ">i2", "int64", "float16", ">f4", "longdouble"])
def test_values_of_any_type_are_normalised(dtype):
    source = Told(counts=(6, 6), dtype=dtype)
    tasks = prepared(source, val=0, test=0)
    drawn = episodes(tasks, "train", range(2), Episodes(ways=2, shots=1, queries=2))
    restored = tasks.scaling().restore_x(tasks.load(drawn, CPU).query.x)
    expected = torch.from_numpy(source.read_classes().values.astype("float64"))[drawn.query.x]
    assert_close(restored, expected, rtol=1e-12, atol=1e-12)


def test_of_very_many_examples_some_are_taken_evenly(monkeypatch):
    source = Told(counts=(5, 5), dtype="float64")
    monkeypatch.setattr(class_scaling, "_MOST_BYTES", 10 * 4 * 8 - 1)
    monkeypatch.setattr(class_scaling, "_BLOCK_BYTES", 2 * 4 * 8)
    kept = source.read_classes().values[::2]
    scaling = prepared(source, val=0, test=0).scaling()
    assert scaling.x_mean == pytest.approx([kept.mean()], rel=1e-12)
    assert scaling.x_std == pytest.approx([kept.std()], rel=1e-12)


def test_rows_of_numbers_are_classes_too():
    tasks = prepared(SklearnTable("breast_cancer"), val=0, test=0)
    drawn = episodes(tasks, "train", range(2), Episodes(ways=2, shots=3, queries=4))
    loaded = tasks.load(drawn, CPU)
    assert (tasks.input_shape(), loaded.support.x.shape, tasks.scaling().x_shape) == ((30,), (2, 6, 30), ())
    rows = SklearnTable("breast_cancer").read()
    assert torch.equal(rows.x[drawn.support.x], tasks.values(drawn.support.x))
    assert torch.equal(rows.y[drawn.support.x], drawn.classes.gather(1, drawn.support.y))
    assert tasks.scaling().x_mean == pytest.approx(rows.x.mean(0).tolist(), rel=1e-12)


def test_digits_are_images():
    tasks = prepared(SklearnTable("digits"), val=["1"], test=["2"])
    drawn = episodes(tasks, "train", [0], SIZE)
    rows = SklearnTable("digits").read()
    assert (tasks.input_shape(), tasks.columns.x) == ((1, 8, 8), ["grey"])
    assert torch.equal(tasks.values(drawn.query.x).flatten(2).double(), rows.x[drawn.query.x])


def test_quarter_turns_are_classes_of_their_own_in_the_split_of_the_upright_one():
    tasks = prepared(Told(counts=(4,) * 4), val=["c3"], test=["c2"], rotations=True)
    assert tasks.class_names("val") == ["c3", "c3 90°", "c3 180°", "c3 270°"]
    drawn = episodes(tasks, "val", range(50), Episodes(ways=4, shots=1, queries=2))
    corners = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1)}  # the black one, as the image turns to the left
    for task, classes in enumerate(drawn.classes.tolist()):
        for pixels, label in zip(tasks.values(drawn.query.x)[task], drawn.query.y[task].tolist(), strict=True):
            assert (pixels[0] == 0).nonzero().tolist() == [list(corners[classes[label]])]


# --- what is told ---------------------------------------------------------------------------------------------------


def test_fewer_classes_than_ways_are_told():
    tasks = prepared(val=["c1", "c2"], test=0.2)
    told(
        lambda: tasks.check("val", SIZE), "data.val.ways=3: only 2 class(es)", "lower the ways or change data.tasks.val"
    )
    tasks = prepared(val=["c1", "c2"], test=0.2, rotations=True)
    tasks.check("val", SIZE)


def test_a_class_with_too_few_examples_is_told():
    tasks = prepared(Told(counts=(6, 6, 4, 6, 3)), val=0, test=0)
    told(
        lambda: tasks.check("train", SIZE),
        "data.train: the class 'c4' has only 3 example(s), and shots=2 and queries=3 need 5 (2 such class(es) of 5)",
        "data.tasks.skip_small=true",
    )
    tasks.check("train", Episodes(ways=3, shots=1, queries=2))


def test_small_classes_are_left_out_where_that_is_asked_for():
    tasks = ClassTasks(Told(counts=(6, 6, 4, 6, 3, 5)), val=["c2", "c3"], test=0, skip_small=True)
    tasks.needs({"train": SIZE, "val": Episodes(shots=1, queries=3)})
    with pytest.warns(UserWarning, match="1 of 6 classes have too few examples: 'c4'$"):
        tasks.prepare()
    assert (tasks.class_names("train"), tasks.class_names("val")) == (["c0", "c1", "c5"], ["c2", "c3"])
    tasks.check("train", SIZE)
    tasks.needs({"train": SIZE, "val": SIZE})
    with pytest.warns(UserWarning, match="2 of 6 classes have too few examples: 'c4', 'c2'$"):
        tasks.prepare()
    assert tasks.class_names("val") == ["c3"]
    tasks.needs({"train": SIZE, "val": Episodes(shots=5, queries=3)})
    told(tasks.prepare, "skip_small=true leaves no class for val: none of 2 has 8 examples; lower data.val.shots")


def test_a_single_way_is_told():
    told(lambda: prepared().check("val", Episodes(ways=1, shots=1, queries=1)), "data.val.ways=1", "give 2 at least")


def test_numbers_without_a_finite_variance_are_told():
    class Large(Told):
        def read_classes(self):
            found = super().read_classes()
            return found._replace(values=found.values * 1e300)

    told(lambda: prepared(Large()), "data.tasks.source: numbers so large that their variance is infinite")


def test_all_queries_are_told():
    tasks = prepared()
    told(lambda: tasks.check("train", Episodes(shots=2)), "data.train.queries='all'", "at most 4")


def test_images_that_are_not_square_do_not_turn():
    tasks = ClassTasks(Told(size=(1, 2, 3)), rotations=True)
    told(tasks.prepare, "data.tasks.rotations=true", "[1, 2, 3]", "square")


def test_a_table_without_classes_is_told():
    told(ClassTasks(SklearnTable("diabetes")).prepare, "data.tasks.source: 'progression' is a real number")


def test_the_datamodule_loads_what_is_due():
    data = TaskDataModule(ClassTasks(Told(), test=0), *[Episodes(2, 1, 2, 2)] * 3)
    data.setup("validate")
    loaded = data.loaded("val", torch.arange(2))
    batch = next(iter(data.val_dataloader()))
    assert batch.support.x.shape == (2, 2)
    assert same_bits(data.transfer_batch_to_device(batch, CPU, 0), loaded)
    told(lambda: data.setup("test"), "data.tasks.test")


# --- glyphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glyphs():
    return Glyphs().read_classes()


def test_glyphs_are_20_grey_pictures_of_each_character_of_several_alphabets(glyphs):
    assert glyphs.values.shape == (20 * len(glyphs.names), 1, 28, 28)
    assert glyphs.values.dtype == "uint8"
    assert glyphs.counts.tolist() == [20] * len(glyphs.names)
    assert {*glyphs.groups} == {"Latin", "Greek", "Cyrillic", "Armenian", "Georgian"}
    assert {"Latin/A", "Latin/7", "Greek/α", "Georgian/ა"} <= {*glyphs.names}
    assert len({*glyphs.names}) == len(glyphs.names) > 1000


def test_no_picture_is_empty_or_like_another(glyphs):
    assert glyphs.values.reshape(len(glyphs.values), -1).max(1).min() > 100
    assert len({picture.tobytes() for picture in glyphs.values}) == len(glyphs.values)


def test_a_letter_that_looks_like_one_of_an_earlier_alphabet_is_left_out(glyphs):
    assert not {"Greek/Α", "Cyrillic/А", "Greek/ο"} & {*glyphs.names}  # capital alpha, capital a, omicron


def test_glyphs_of_another_seed_are_turned_otherwise(glyphs):
    assert Glyphs().shape() == list(glyphs.values.shape[1:])
    other = Glyphs(seed=1).read_classes()
    assert other.names == glyphs.names
    assert (other.values != glyphs.values).any((1, 2, 3)).mean() > 0.99


def test_an_impossible_number_of_faces_is_told():
    told(lambda: Glyphs(faces=11), "data.tasks.source.faces=11", "from 1 to 10")
