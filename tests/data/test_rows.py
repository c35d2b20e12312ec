"""The rows of scikit-learn's tables and of the user's files."""

import pytest
import torch
from csv_files import told, written
from sklearn import datasets
from torch.testing import assert_close

from metalit.data import CsvRows, SklearnTable

MEND = "mend or remove the row"


def read(folder, text, y="y", **options):
    return CsvRows(written(folder, text), y, **options).read()


# --- scikit-learn's -------------------------------------------------------------------------------------------------


def test_diabetes_is_real_and_in_its_units():
    rows = SklearnTable("diabetes").read()
    assert (rows.x.shape, rows.y.shape, rows.classes) == ((442, 10), (442, 1), [])
    assert rows.columns == ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
    assert rows.x[0, :4].tolist() == [59, 2, 32.1, 101]
    assert rows.y[:2].tolist() == [[151], [75]]


def test_diabetes_is_scikit_learns_up_to_its_scaling():
    x, expected = SklearnTable("diabetes").read().x, torch.tensor(datasets.load_diabetes().data)
    centred = x - x.mean(0)
    assert_close(centred / centred.norm(dim=0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("breast_cancer", (569, 30), ["malignant", "benign"]), ("digits", (1797, 64), list("0123456789"))],
)
def test_tables_of_classes_are_scikit_learns(name, shape, classes):
    rows, table = SklearnTable(name).read(), getattr(datasets, f"load_{name}")()
    assert (rows.x.shape, rows.y.shape, rows.classes) == (shape, shape[:1], classes)
    assert torch.equal(rows.x, torch.tensor(table.data))
    assert torch.equal(rows.y, torch.tensor(table.target))
    assert (rows.x.dtype, rows.y.dtype) == (torch.float64, torch.int64)
    assert rows.columns == [str(column) for column in table.feature_names]
    assert {type(name) for name in (*rows.columns, *rows.classes, rows.target)} == {str}


def test_pixels_are_left_as_they_are():
    x = SklearnTable("digits").read().x
    assert (x.min(), x.max()) == (0, 16)


def test_an_unknown_table_is_told():
    told(SklearnTable("iris").read, "data.rows.name='iris'", "['diabetes', 'breast_cancer', 'digits']", "choose one")


# --- the user's -----------------------------------------------------------------------------------------------------


def test_all_other_columns_are_inputs_in_the_order_of_the_file(tmp_path):
    rows = read(tmp_path, "b,y,a\n1,10,-1\n2,20,-2.5\n")
    assert rows.x.tolist() == [[1, -1], [2, -2.5]]
    assert rows.y.tolist() == [[10], [20]]
    assert (rows.columns, rows.target, rows.classes) == (["b", "a"], "y", [])
    assert (rows.x.dtype, rows.y.dtype) == (torch.float64, torch.float64)


def test_named_columns_are_inputs_in_the_order_of_their_names(tmp_path):
    rows = read(tmp_path, "b,y,a,note\n1,10,-1,any\n2,20,-2,\n", x=["a", "b"])
    assert (rows.columns, rows.x.tolist()) == (["a", "b"], [[-1, 1], [-2, 2]])


@pytest.mark.parametrize(
    ("cells", "names", "numbers"),
    [
        ("setosa virginica setosa", ["setosa", "virginica"], [0, 1, 0]),
        ("b a c b", ["a", "b", "c"], [1, 0, 2, 1]),
        ("10 9 10 -1", ["-1", "9", "10"], [2, 1, 2, 0]),
        ("1 1.0 2 02", ["1", "2"], [0, 0, 1, 1]),
        ("0.5 0.25", ["0.25", "0.5"], [1, 0]),
        ("7 x 10", ["10", "7", "x"], [1, 2, 0]),
        ("7 x NA", ["7", "NA", "x"], [0, 2, 1]),
        ("NA SA EU", ["EU", "NA", "SA"], [1, 2, 0]),
        ("True False", ["False", "True"], [1, 0]),
        ("9007199254740993 9007199254740992", ["9007199254740992", "9007199254740993"], [1, 0]),
    ],
)
def test_classes_are_the_distinct_values_sorted(tmp_path, cells, names, numbers):
    rows = read(tmp_path, "x,y\n" + "".join(f"1,{cell}\n" for cell in cells.split()), classes=True)
    assert (list(rows.classes), rows.y.tolist(), rows.y.dtype) == (names, numbers, torch.int64)


def test_spaces_around_a_class_are_no_part_of_it(tmp_path):
    assert read(tmp_path, "x,y\n1, a\n2,a \n3,b\n", classes=True).classes == ["a", "b"]


def test_a_real_target_keeps_its_last_digit(tmp_path):
    assert read(tmp_path, "x,y\n1,779.4453145\n2,0.1\n").y.tolist() == [[779.4453145], [0.1]]


# --- what is told ---------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told():
    told(CsvRows("nowhere.csv", "y").read, "data.rows.file='nowhere.csv'", "there is no such file")


def test_unknown_columns_are_told_with_the_nearest_name(tmp_path):
    file = written(tmp_path, "size,price\n1,2\n")
    told(CsvRows(file, "prize").read, f"data.rows.file={file!r}", "no column 'prize'", "did you mean 'price'?")
    told(CsvRows(file, "price", ["sizes"]).read, "no column 'sizes'", "did you mean 'size'?")


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize(
    ("cell", "shown"), [("", "an empty cell"), ("abc", "'abc'"), ("NaN", "'NaN'"), ("inf", "inf"), ("-inf", "-inf")]
)
def test_a_bad_input_is_told_with_its_line_and_the_way_to_leave_it_out(tmp_path, cell, shown, classes):
    text = f"x,w,y\n1,1,0\n\n2,{cell},1\n"
    where = ("data.rows.file=", f"column 'w' holds {shown} in line 4", MEND)
    told(lambda: read(tmp_path, text, classes=classes), *where, "or name the columns of inputs in data.rows.x")
    told(lambda: read(tmp_path, text, x=["x", "w"], classes=classes), *where)
    assert read(tmp_path, text, x=["x"], classes=classes).x.tolist() == [[1], [2]]


def test_named_inputs_get_no_advice_to_name_them(tmp_path):
    with pytest.raises(ValueError, match=r"remove the row$"):
        read(tmp_path, "x,y\n?,1\n", x=["x"])


def test_a_real_target_of_texts_is_told_with_the_way_out(tmp_path):
    told(lambda: read(tmp_path, "x,y\n1,a\n"), "column 'y' holds 'a' in line 2", "data.rows.classes=true")


def test_a_row_without_its_class_is_told(tmp_path):
    where = ("data.rows.file=", "column 'y' holds an empty cell in line 4 (2 such cells in all)", "remove the row")
    told(lambda: read(tmp_path, "x,y\n1,a\n\n2,\n3, \n4,b\n", classes=True), *where)


@pytest.mark.parametrize("cell", ["NaN", "nan", "NA", "N/A", "?", "inf", "-inf"])
def test_a_class_that_is_missing_among_numbers_is_told(tmp_path, cell):
    told(lambda: read(tmp_path, f"x,y\n1,0\n2,1\n3,{cell}\n", classes=True), f"column 'y' holds {cell!r} in line 4;")


@pytest.mark.parametrize(("cells", "name"), [("a a", "a"), ("3 3.0", "3")])
def test_a_single_class_is_told(tmp_path, cells, name):
    text = "x,y\n" + "".join(f"1,{cell}\n" for cell in cells.split())
    told(lambda: read(tmp_path, text, classes=True), "column 'y' holds a single class", repr(name), "add rows")


def test_a_column_has_one_role():
    told(CsvRows("any.csv", "y", ["x", "y"]).read, "data.rows: ['y'] stand twice", "one role")
    told(CsvRows("any.csv", "y", ["x", "x"]).read, "['x'] stand twice")


@pytest.mark.parametrize("x", ["x", []])
def test_inputs_that_are_no_list_are_told(x):
    told(CsvRows("any.csv", "y", x).read, f"data.rows.x={x!r}", "list of a column at least", "leave it out")


def test_a_table_of_the_target_alone_is_told(tmp_path):
    told(lambda: read(tmp_path, "y\n1\n2\n"), "no column but the target 'y'", "add a column")


def test_columns_without_a_name_are_no_inputs(tmp_path):
    assert read(tmp_path, "x,y,,\n1,2,,\n3,4,,\n").columns == ["x"]
    told(lambda: read(tmp_path, ",x,y\n1,5,2\n2,6,4\n"), "column 1 has no name", "data.rows.x")
    assert read(tmp_path, ",x,y\n1,5,2\n2,6,4\n", x=["x"]).x.tolist() == [[5], [6]]


def test_inputs_that_stand_twice_are_told(tmp_path):
    told(lambda: read(tmp_path, "x,x,y\n1,5,2\n"), "2 columns 'x'", "rename")
