"""Classes from files of NumPy."""

import zlib
from tokenize import TokenError

import numpy as np
import pytest
import torch
from csv_files import told, written

from metalit.data import Arrays, ClassTasks, CsvRows, Episodes
from metalit.data.classes.asked import AskedArrays

X = np.arange(6 * 2 * 3, dtype=np.uint8).reshape(6, 2, 3)
Y = np.array([2, 10, 2, 10, 2, 2])


def saved(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


def by_class(classes):
    ends = zip(classes.start[:-1].tolist(), classes.start[1:].tolist(), strict=True)
    return {name: classes.values[classes.rows[a:b]] for name, (a, b) in zip(classes.names, ends, strict=True)}


@pytest.mark.parametrize(
    ("y", "names"),
    [
        (Y, ["2", "10"]),
        (Y.astype(np.float64), ["2", "10"]),
        (Y[:, None], ["2", "10"]),
        (np.where(Y == 2, "b", "a"), ["b", "a"]),
        (np.where(Y == 2, b"b", b"a"), ["b", "a"]),
        (Y == 2, ["True", "False"]),
    ],
)
def test_classes_are_numbers_or_texts(tmp_path, y, names):
    found = by_class(Arrays(saved(tmp_path, x=X, y=y)).read_classes())
    assert {*found} == {*names}
    assert np.array_equal(found[names[0]], X[Y == 2][:, None])
    assert np.array_equal(found[names[1]], X[Y == 10][:, None])


def test_numbers_of_classes_are_sorted_as_numbers(tmp_path):
    assert Arrays(saved(tmp_path, x=X, y=Y)).read_classes().names == ["2", "10"]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((6, 5), (6, 5)),
        ((6, 4, 5), (6, 1, 4, 5)),
        ((6, 3, 4, 5), (6, 3, 4, 5)),
        ((6, 1, 4, 5), (6, 1, 4, 5)),
        ((6, 4, 5, 3), (6, 3, 4, 5)),
        ((6, 4, 5, 1), (6, 1, 4, 5)),
        ((6, 7, 4, 5), (6, 7, 4, 5)),
    ],
)
def test_forms_of_examples(tmp_path, shape, wanted):
    x = np.random.default_rng(0).normal(size=shape)
    source = Arrays(saved(tmp_path, x=x, y=Y))
    values = source.read_classes().values
    assert (values.shape, source.shape()) == (wanted, wanted[1:])
    assert np.array_equal(values, np.moveaxis(x, -1, 1).reshape(wanted) if shape[-1] in (1, 3) else x.reshape(wanted))


def test_a_pair_of_npy_is_mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    source = Arrays(str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    values = source.read_classes().values
    assert isinstance(values, np.memmap)
    tasks = ClassTasks(source, val=0, test=0)
    drawn = tasks.of_size("train", torch.arange(3), torch.arange(3), Episodes(ways=2, shots=1, queries=1))
    assert torch.equal(tasks.values(drawn.support.x)[:, :, 0], torch.from_numpy(X)[drawn.support.x])
    assert tasks.scaling().x_mean == pytest.approx([X.mean()], rel=1e-12)
    assert tasks.scaling().x_std == pytest.approx([X.std()], rel=1e-12)


def test_what_cannot_be_used_is_told(tmp_path):
    def read(**arrays):
        return Arrays(saved(tmp_path, **arrays)).read_classes

    file = str(tmp_path / "data.npz")
    told(Arrays("nowhere.npz").read_classes, "data.tasks.source.file='nowhere.npz': there is no such file")
    told(read(x=X, y=Y[:5]), f"data.tasks.source.file={file!r}: x has 6 example(s) and y has 5")
    told(read(x=X, labels=Y), "holds the arrays ['labels', 'x'], but no 'y'")
    told(read(x=X, y=Y.astype(object)), "holds Python objects")
    told(read(x=X.astype(object), y=Y), "holds Python objects")
    told(read(x=X, y=Y + 0.5), "y is of float64; a class is a whole number or a text")
    told(read(x=X, y=np.where(Y == 2, np.nan, 1)), "y is of float64")
    told(read(x=X, y=np.eye(6)), "y is [6, 6]; it must be [examples]")
    told(read(x=X[:, 0, 0], y=Y), "x is [6]; it must be [examples, height, width]")
    told(read(x=X.astype(str), y=Y), "must hold numbers")
    told(read(x=X, y=np.array(3)), "y is a single value")
    told(read(x=X, y=np.array([b"\xff"] * 6)), "y holds bytes that are no text in UTF-8")
    bad = X.astype(np.float32)
    bad[4, 1, 1] = np.nan
    told(read(x=bad, y=Y), "example 4 of x holds a number that is not finite")


def test_files_that_are_none_are_told(tmp_path):
    for content in (b"", b"text", b"PK\x03\x04 no archive", b"\x93NUMPY cut"):
        (tmp_path / "a.npz").write_bytes(content)
        told(Arrays(str(tmp_path / "a.npz")).read_classes, "is no .npz or .npy file that can be read")


@pytest.mark.parametrize("error", [zlib.error, TokenError, NotImplementedError, KeyError])
def test_damage_of_any_kind_is_told(tmp_path, monkeypatch, error):
    file = saved(tmp_path, x=X, y=Y)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", raising(error("what is broken")))
    told(Arrays(file).read_classes, "is no .npz or .npy file that can be read", error.__name__, "what is broken")


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("kind", [">f8", ">u2", "u4", "f16"])
def test_what_is_asked_may_be_of_any_type(tmp_path, kind):
    np.savez(tmp_path / "a.npz", support_x=X.astype(kind), support_y=Y, query_x=X)
    examples, asked = AskedArrays(str(tmp_path / "a.npz")).values((1, 2, 3))
    assert examples.dtype == torch.float64
    assert torch.equal(examples, asked.double())


def test_x_and_y_are_both_named(tmp_path):
    np.save(tmp_path / "x.npy", X)
    file = str(tmp_path / "x.npy")
    told(Arrays(file).read_classes, "holds x alone; name the file of y in data.tasks.source.y")
    told(Arrays(saved(tmp_path, x=X, y=Y), file).read_classes, f"data.tasks.source.y={file!r}", "leave it out")
    told(Arrays(file, saved(tmp_path, x=X, y=Y)).read_classes, "must be a .npy file of one array")


def test_rows_of_a_csv_are_examples_of_their_class(tmp_path):
    file = written(tmp_path, "a,kind,b\n1,x,2\n3,y,4\n5,x,6\n")
    classes = CsvRows(file, "kind").read_classes()
    assert (classes.names, classes.columns) == (["x", "y"], ["a", "b"])
    assert by_class(classes)["x"].tolist() == [[1, 2], [5, 6]]
    told(CsvRows(file, "kinds").read_classes, f"data.tasks.source.file={file!r}", "did you mean 'kind'?")
    told(CsvRows(file, "kind", "a").read_classes, "data.tasks.source.x='a'")
