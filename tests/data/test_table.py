"""What is told of a table that cannot be used, and what is read from one that can."""

import numpy as np
import pytest
import torch
from csv_files import sampled, told, write_csv, written

from metalit.data import Curves, Episodes, TaskDataModule
from metalit.data.table import Columns, numbers, read_asked, read_table

ROWS = [(f"t{task}", row, task + row) for task in range(6) for row in range(4)]  # lines 2 to 25 of the file
LINE = len(ROWS) + 2  # the first line after them
MEND = "mend or remove the row"


def curves(file, task="task", x=("x",), y=("y",), **options):
    return Curves(str(file), task, x, y, **options)


def prepared(folder, *more, header=("task", "x", "y"), **names):
    """Prepare the curves of ROWS and some more rows; the file's name is ``folder / "table.csv"``."""
    curves(write_csv(folder / "table.csv", header, [*ROWS, *more]), **names).prepare()


def asked(folder, *rows, header=("task", "x", "y"), x=("x",), y=("y",), **options):
    return read_asked(write_csv(folder / "asked.csv", header, rows), Columns("task", x, y), **options)


# --- files that are no table ----------------------------------------------------------------------------------------


@pytest.fixture(params=["data.tasks.file", "data.predict_file"])
def reader(request):
    """The name of an argument, and what reads the file that it names."""
    if request.param == "data.tasks.file":
        return request.param, lambda file: curves(file).prepare()
    return request.param, lambda file: read_asked(file, Columns("task", ["x"], ["y"]))


def test_a_missing_file_is_told(reader, tmp_path):
    argument, read = reader
    file = str(tmp_path / "nowhere.csv")
    told(lambda: read(file), f"{argument}={file!r}", "there is no such file")
    told(lambda: read(str(tmp_path)), f"{argument}={str(tmp_path)!r}", "there is no such file")


def test_a_missing_file_is_told_with_the_folder_where_it_was_looked_for(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(lambda: reader[1]("nowhere.csv"), f"{reader[0]}='nowhere.csv'", f"looked in {tmp_path}")


NO_TABLE = {
    "empty": "",
    "blank lines": "\n\n",
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00",
    "bytes": bytes(range(256)) * 4,
    "UTF-16 without its mark": "task,x,y\na,1,2\n".encode("utf-16-le"),
    "a broken mark": b"\xff\xfet\x00a",
    "a workbook": b"PK\x03\x04\x14\x00\x06\x00",
    "a quote without end": 'task,x,y\n"a,1,2\na,1,2\n',
    "a row too long": "task,x,y\na,1,2\na,1,2,3\n",
}


@pytest.mark.parametrize("text", NO_TABLE.values(), ids=NO_TABLE)
def test_a_file_that_is_no_table_is_told(reader, tmp_path, text):
    argument, read = reader
    file = written(tmp_path, text)
    told(lambda: read(file), f"{argument}={file!r}", "is no CSV table: ")


def test_a_row_too_long_is_told_with_its_line(reader, tmp_path):
    told(lambda: reader[1](written(tmp_path, NO_TABLE["a row too long"])), "line 3, saw 4")


def test_a_header_without_rows_is_told(reader, tmp_path):
    argument, read = reader
    file = written(tmp_path, "task,x,y\n")
    told(lambda: read(file), f"{argument}={file!r}", "no row below its header")


# --- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wrong", "nearest"),
    [
        ({"task": "contry"}, "contry", "country"),
        ({"x": ["Year"]}, "Year", "year"),
        ({"x": ["year", "gdpPerCap"]}, "gdpPerCap", "gdpPercap"),
        ({"y": ["lifeexp"]}, "lifeexp", "lifeExp"),
        ({"y": ["LIFE_EXP"]}, "LIFE_EXP", "lifeExp"),
        ({"task": "Country "}, "Country ", "country"),
    ],
)
def test_an_unknown_column_is_told_with_the_nearest_name(tmp_path, names, wrong, nearest):
    header = ["country", "year", "lifeExp", "gdpPercap"]
    file = write_csv(tmp_path / "table.csv", header, [("a", 1, 2, 3)])
    right = {"task": "country", "x": ["year"], "y": ["lifeExp"]}
    told(
        lambda: curves(file, **(right | names)).prepare(),
        f"data.tasks.file={file!r}",
        f"no column {wrong!r}",
        str(header),
        f"did you mean {nearest!r}?",
    )


def test_an_unknown_column_like_no_other_is_told_with_all_names(tmp_path):
    told(lambda: prepared(tmp_path, x=["weight"]), "no column 'weight'", "['task', 'x', 'y']", "name one of those")


def test_columns_that_are_not_named_are_told():
    told(lambda: curves("any.csv", x=[]), "data.tasks", "x=[]", "list of a column at least")
    told(lambda: curves("any.csv", y=[]), "data.tasks", "y=[]", "list of a column at least")


# --- cells ----------------------------------------------------------------------------------------------------------


BAD_CELLS = {
    "": "an empty cell",
    "abc": "'abc'",
    "NaN": "'NaN'",
    "NA": "'NA'",
    "1,5": "'1,5'",
    "inf": "inf",
    "-inf": "-inf",
    "1e300": "'1e300'",
    "1_000": "'1_000'",
    "2021-03-01": "'2021-03-01'",
}


@pytest.mark.parametrize(
    ("column", "cell", "shown"),
    [("x", *shown) for shown in BAD_CELLS.items()] + [("y", cell, BAD_CELLS[cell]) for cell in ("abc", "1,5", "inf")],
)
def test_a_cell_that_is_no_finite_number_is_told_with_its_line(tmp_path, cell, shown, column):
    bad = ("t1", cell, 1) if column == "x" else ("t1", 1, cell)
    file = str(tmp_path / "table.csv")
    told(
        lambda: prepared(tmp_path, ("t1", 8, 8), bad, ("t1", 9, 9)),
        f"data.tasks.file={file!r}",
        f"column {column!r}",
        shown,
        f"in line {LINE + 1};",
        MEND,
    )


def test_the_first_of_several_bad_cells_is_told_with_their_number(tmp_path):
    bad = [("t1", "low", 1), ("t1", 2, 2), ("t1", "", 3), ("t1", "inf", 4)]
    told(lambda: prepared(tmp_path, *bad), "column 'x' holds 'low'", f"line {LINE} (3 such cells in all);")


def test_a_bad_cell_in_the_first_row_is_in_line_2(tmp_path):
    file = written(tmp_path, "task,x,y\na,?,1\na,2,2\n")
    told(lambda: curves(file).prepare(), "'?' in line 2;")


def test_columns_that_are_not_named_may_hold_anything(tmp_path):
    rows = [(*row, "any", "") for row in ROWS]
    file = write_csv(tmp_path / "table.csv", ["task", "x", "y", "note", "empty"], rows)
    curves(file).prepare()


@pytest.mark.parametrize("cell", ["", "  "])
def test_an_empty_task_cell_is_told_with_its_line(tmp_path, cell):
    told(
        lambda: prepared(tmp_path, (cell, 1, 2), ("t1", 8, 8)),
        f"data.tasks.file={str(tmp_path / 'table.csv')!r}",
        f"column 'task' holds an empty cell in line {LINE}",
        "name the task",
    )


def test_numbers_are_float64_to_the_last_digit(tmp_path):
    texts = ["0.1", "-1e-300", "779.4453145", "3", "9007199254740993"]
    frame = read_table(written(tmp_path, "x,y\n" + "".join(f"{text},1\n" for text in texts)), "file")
    found = numbers(frame, ["y", "x"], "file")
    assert (found.dtype, found.shape) == (np.float64, (5, 2))
    assert found[:, 1].tolist() == [float(text) for text in texts]


def test_missing_numbers_become_nan_only_where_they_may(tmp_path):
    frame = read_table(written(tmp_path, "x,y\n1,2\n3,\n"), "file")
    assert np.isnan(numbers(frame, ["x", "y"], "file", missing=True)).tolist() == [[False, False], [False, True]]
    told(lambda: numbers(frame, ["x", "y"], "file"), "file: column 'y' holds an empty cell in line 3")


# --- names of tasks -------------------------------------------------------------------------------------------------


def all_names(distribution):
    return sorted(name for split in distribution.splits.values() for name in split.names)


@pytest.mark.parametrize("name", ["NA", "NaN", "null", "None", "nan"])
def test_a_name_that_others_read_as_missing_is_a_name(tmp_path, name):
    rows = [(task, row, row) for task in (name, "a", "b", "c", "d") for row in range(3)]
    found = all_names(curves(write_csv(tmp_path / "table.csv", ["task", "x", "y"], rows)))
    assert found == sorted([name, "a", "b", "c", "d"])


def test_quoted_names_keep_commas_quotes_and_accents(tmp_path):
    names = ["Congo, Dem. Rep.", 'the "new" one', "Côte d'Ivoire", "東京", "a b"]
    rows = [(name, row, row) for name in names for row in range(3)]
    assert all_names(curves(write_csv(tmp_path / "table.csv", ["task", "x", "y"], rows))) == sorted(names)


def test_spaces_after_commas_and_a_byte_order_mark_are_no_part_of_names(tmp_path):
    text = "\ufefftask, x, y\n" + "".join(f"{task}, {row}, {row}\n" for task in "abcde" for row in range(3))
    assert all_names(curves(written(tmp_path, text))) == list("abcde")


# --- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["val", "test"])
@pytest.mark.parametrize("fraction", [1.1, -0.1, 1.5, float("nan")])
def test_fractions_beyond_their_range_are_told(name, fraction):
    told(lambda: curves("any.csv", **{name: fraction}), f"data.tasks.{name}={fraction}", "between 0 and 1")


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.6, 0.3), (0.05, 0.2), (0.2, 0.05)])
def test_fractions_that_leave_a_split_without_a_task_are_told(tmp_path, val, test):
    told(
        lambda: prepared(tmp_path, val=val, test=test),
        f"data.tasks.file={str(tmp_path / 'table.csv')!r}",
        "6 task(s)",
        f"val={val}",
        f"test={test}",
        "change the fractions or add tasks",
    )


def test_too_few_tasks_are_told_and_three_are_enough(tmp_path):
    def named(names):
        rows = [(name, row, row) for name in names for row in range(3)]
        return curves(write_csv(tmp_path / "table.csv", ["task", "x", "y"], rows))

    told(named("ab").prepare, "2 task(s) cannot be split", "val=0.2 and test=0.2", "add tasks")
    assert all_names(named("abc")) == list("abc")


# --- files of points to predict -------------------------------------------------------------------------------------


def test_support_comes_before_the_rows_that_ask(tmp_path):
    found = asked(tmp_path, ("b", 1, ""), ("a", 2, 20), ("b", 3, 30), ("a", 4, ""), ("b", 5, 50), ("b", 6, ""))
    assert found.rows == {"b": [2, 4, 0, 5], "a": [1, 3]}
    assert found.shots == {"b": 2, "a": 1}
    assert list(found.rows) == ["b", "a"]
    assert found.x.tolist() == [[1], [2], [3], [4], [5], [6]]
    assert np.nan_to_num(found.y, nan=-1).tolist() == [[-1], [20], [30], [-1], [50], [-1]]
    assert found.frame["task"].tolist() == ["b", "a", "b", "a", "b", "b"]


def test_without_a_task_column_all_rows_are_one_task_if_told_so(tmp_path):
    rows = [(1, 2), (3, ""), (5, 6)]
    found = asked(tmp_path, *rows, header=("x", "y"), one_task=True)
    assert (found.rows, found.shots) == ({"task": [0, 2, 1]}, {"task": 2})
    where = ("data.predict_file=", "no column 'task'", "data.predict_one_task=true")
    told(lambda: asked(tmp_path, *rows, header=("x", "y")), *where)
    told(lambda: asked(tmp_path, ("a", 1, 2), ("b", 2, ""), header=("subject", "x", "y")), *where, "'subject'")


def test_one_task_and_a_column_of_tasks_are_at_odds(tmp_path):
    told(lambda: asked(tmp_path, ("a", 1, 2), ("b", 2, ""), one_task=True), "data.predict_one_task=true", "'task'")


def test_several_columns_are_read_in_the_order_of_the_arguments(tmp_path):
    header = ("z", "y", "x", "w")
    rows = [(1, 2, 3, 4), ("", "", 5, 6)]
    found = asked(tmp_path, *rows, header=header, x=("w", "x"), y=("y", "z"), one_task=True)
    assert found.x.tolist() == [[4, 3], [6, 5]]
    assert found.y[0].tolist() == [2, 1]
    assert np.isnan(found.y[1]).all()


def test_numeric_names_and_the_name_na_are_names(tmp_path):
    assert asked(tmp_path, (7, 1, 1), (12, 2, 2), (7, 3, ""), (12, 4, "")).rows == {"7": [0, 2], "12": [1, 3]}
    assert asked(tmp_path, ("NA", 1, 1), ("NA", 3, "")).rows == {"NA": [0, 1]}


def test_a_task_may_have_nothing_to_ask_if_another_has(tmp_path):
    assert asked(tmp_path, ("a", 1, 1), ("b", 1, 1), ("b", 2, "")).rows == {"a": [0], "b": [1, 2]}


def test_no_row_that_asks_is_told(tmp_path):
    told(lambda: asked(tmp_path, ("a", 1, 2)), "data.predict_file", "no row asks", "leave 'y' empty")


def test_a_task_without_support_is_told(tmp_path):
    rows = [("a", 1, 2), ("a", 3, ""), ("b", 1, ""), ("b", 2, "")]
    told(lambda: asked(tmp_path, *rows), "data.predict_file", "task 'b' has no row with ['y']", "add one")


@pytest.mark.parametrize("partial", [("a", 5, 6, ""), ("a", 5, "", 6)])
def test_a_row_with_only_some_outputs_is_told_with_its_line(tmp_path, partial):
    rows, header = [("a", 1, 2, 3), ("a", 4, "", ""), partial], ("task", "x", "y", "z")
    told(
        lambda: asked(tmp_path, *rows, header=header, y=("y", "z")),
        "data.predict_file",
        "line 4",
        "only some of the outputs ['y', 'z']",
        "all or none",
    )


@pytest.mark.parametrize(("cell", "shown"), BAD_CELLS.items())
def test_a_bad_input_of_a_point_is_told_with_its_line(tmp_path, cell, shown):
    rows = [("a", 1, 2), ("a", cell, "")]
    told(lambda: asked(tmp_path, *rows), "data.predict_file", "column 'x'", shown, "line 3;", MEND)


@pytest.mark.parametrize("cell", ["abc", "1e39", "inf"])
def test_a_bad_output_of_a_point_is_told_with_its_line(tmp_path, cell):
    rows = [("a", 1, 2), ("a", 2, cell), ("a", 3, "")]
    told(lambda: asked(tmp_path, *rows), "data.predict_file", "column 'y'", cell, "line 3;", MEND)


WORDS = ["NA", "NaN", "nan", ".", "NULL", "None", "N/A", "#N/A", "<NA>", "?", " na "]


@pytest.mark.parametrize("word", WORDS)
def test_words_for_a_missing_number_ask_like_empty_cells(tmp_path, word):
    with pytest.warns(match=r"2 cell\(s\) of \['y'\] hold .*asked like empty ones"):
        found = asked(tmp_path, ("a", 1, word), ("a", 2, 5), ("b", 3, 7), ("b", 4, ""), ("b", 5, word))
    assert (found.rows, found.shots) == ({"a": [1, 0], "b": [2, 3, 4]}, {"a": 1, "b": 1})
    assert np.isnan(found.y[:, 0]).tolist() == [True, False, False, True, True]


def test_the_words_of_several_outputs_are_counted_once(tmp_path):
    rows, header = [("a", 1, 2, 3), ("a", 2, "NA", "."), ("a", 3, "", "NA")], ("task", "x", "y", "z")
    with pytest.warns(match=r"3 cell\(s\) of \['y', 'z'\] hold \['.', 'NA'\]") as said:
        asked(tmp_path, *rows, header=header, y=("y", "z"))
    assert len(said) == 1


@pytest.mark.parametrize("word", WORDS)
def test_words_for_a_missing_input_are_told_with_their_line(tmp_path, word):
    told(lambda: asked(tmp_path, ("a", 1, 2), ("a", word, "")), f"column 'x' holds {word.strip()!r} in line 3;", MEND)


@pytest.mark.parametrize(("header", "missing"), [(("task", "y"), "x"), (("task", "x"), "y")])
def test_a_file_of_points_without_a_column_is_told(tmp_path, header, missing):
    told(
        lambda: asked(tmp_path, ("a", 1), header=header),
        "data.predict_file",
        f"no column {missing!r}",
        str(list(header)),
    )


def test_rows_of_more_cells_than_the_header_are_refused(tmp_path):
    told(
        lambda: read_table(written(tmp_path, "task,x,y\nt1,0,0,9\nt2,1,1,9\n"), "file"),
        "more cells than its header",
    )


def test_names_of_tasks_stay_as_they_are_written(tmp_path):
    file = written(tmp_path, "task,x,y\n007,0,1\n007,1,\n7,0,1\n7,1,\n")
    assert list(read_asked(file, Columns("task", ["x"], ["y"])).rows) == ["007", "7"]


def test_a_row_of_no_task_is_refused_where_there_is_a_task_column(tmp_path):
    file = written(tmp_path, "task,x,y\na,0,1\n,1,\n")
    told(lambda: read_asked(file, Columns("task", ["x"], ["y"])), "column 'task' holds an empty cell in line 3")


def test_a_misspelt_task_column_is_not_taken_for_a_single_task(tmp_path):
    file = written(tmp_path, "Country,x,y\na,0,1\nb,1,\n")
    told(lambda: read_asked(file, Columns("country", ["x"], ["y"])), "no column 'country'", "did you mean 'Country'")


def test_blank_lines_and_line_breaks_in_quotes_count_as_lines(tmp_path):
    file = written(tmp_path, 'task,x,y\n"a\nb",0,1\n\n\na,zz,3\n')
    told(lambda: numbers(read_table(file, "file"), ["x"], "file"), "'zz' in line 6")


def test_a_column_has_one_role(tmp_path):
    told(lambda: curves("any.csv", x=["x", "y"]), "['y'] stand twice")
    told(lambda: curves("any.csv", x="year"), "x='year'", "list")


# --- names that are nearly the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("x", "x"), ("x ", "x"), (" x", "x")])
def test_a_column_that_stands_twice_is_told(tmp_path, names):
    rows = [(*row, 5) for row in ROWS]
    file = write_csv(tmp_path / "table.csv", ["task", names[0], "y", names[1]], rows)
    told(lambda: curves(file).prepare(), "2 columns 'x'", "rename")


def test_columns_that_stand_twice_and_are_not_named_may_stay(tmp_path):
    curves(write_csv(tmp_path / "table.csv", ["task", "x", "y", "", ""], [(*row, "", "") for row in ROWS])).prepare()


@pytest.mark.parametrize("pair", [("p1", "P1"), ("p 1", "p1"), ("1", "1.0"), ("01", "1"), ("1e2", "100")])
def test_names_that_may_be_one_task_are_told_and_stay_two(tmp_path, pair):
    rows = [(name, x, y) for name in pair for x, y in ((1, 2), (3, ""))]
    with pytest.warns(match="are 2 tasks; mend the names if they are one"):
        assert list(asked(tmp_path, *rows).rows) == list(pair)


def test_spaces_around_a_name_are_no_part_of_it(tmp_path):
    assert asked(tmp_path, ("a ", 1, 2), (" a", 3, "")).rows == {"a": [0, 1]}


# --- rows without y, short tasks, categories ------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", *WORDS])
def test_rows_without_y_are_no_training_rows(tmp_path, word):
    expected = curves(write_csv(tmp_path / "whole.csv", ("task", "x", "y"), ROWS)).splits
    # two rows of tasks that have others, one of them without x too, and the only one of a task
    holes = [*ROWS[:5], ("t1", "bad", word), *ROWS[5:], ("t2", 100, word), ("nothing", 1, word)]
    with pytest.warns(match=r"3 of 27 rows have no number in 'y', and are left out"):
        found = curves(write_csv(tmp_path / "table.csv", ("task", "x", "y"), holes)).splits
    for split, whole in expected.items():
        assert found[split].names == whole.names
        assert torch.equal(found[split].x, whole.x)
        assert torch.equal(found[split].y, whole.y)


def test_a_table_without_any_y_is_told(tmp_path):
    file = write_csv(tmp_path / "table.csv", ("task", "x", "y"), [(name, x, "NA") for name, x, _ in ROWS])
    told(lambda: curves(file).prepare(), "no row has a number in each of ['y']")


def short_and_long(folder, **options):
    """Ten tasks of six rows, and three of one or two."""
    short = [("s0", 0, 0), ("s1", 0, 0), ("s1", 1, 1), ("s2", 0, 0)]
    rows = [*short, *[(f"t{task}", row, row * task) for task in range(10) for row in range(6)]]
    return curves(write_csv(folder / "table.csv", ("task", "x", "y"), rows), **options)


def test_short_tasks_are_told_with_their_number_and_the_way_out(tmp_path):
    tasks = short_and_long(tmp_path, val=["t0"], test=["t1"])
    told(
        lambda: tasks.check("train", Episodes(shots=2)),
        "data.train.shots=2",
        "3 such task(s) of 11",
        "data.tasks.skip_short=true",
    )


def test_short_tasks_are_left_out_where_they_may(tmp_path):
    whole, tasks = (short_and_long(tmp_path, val=["t0"], test=["t1", "s2"], skip_short=skip) for skip in (False, True))
    data = TaskDataModule(tasks, Episodes(4, 2), Episodes("all", 2), Episodes("all", 1))
    with pytest.warns(match="3 of 13 tasks have too few rows: .*'s0', 's1', 's2'|'s[012]'") as said:
        data.setup("fit")
    assert len(said) == 1
    assert {split: len(held.names) for split, held in whole.splits.items()} == {"train": 10, "val": 1, "test": 2}
    assert {split: len(held.names) for split, held in tasks.splits.items()} == {"train": 8, "val": 1, "test": 1}
    assert tasks.scaling().x_mean == [2.5]
    data = TaskDataModule(tasks, Episodes(4, 1), Episodes("all", 1), Episodes("all", 1))
    with pytest.warns(match="2 of 13 tasks have too few rows: 's0', 's2'"):
        data.setup("fit")
    assert "s1" in tasks.splits["train"].names


def test_a_split_of_short_tasks_alone_is_told(tmp_path):
    tasks = short_and_long(tmp_path, val=["t0"], test=["s1", "s2"], skip_short=True)
    data = TaskDataModule(tasks, Episodes(4, 2), Episodes("all", 2), Episodes("all", 2))
    told(lambda: data.setup("fit"), "skip_short=true leaves no task for test", "data.test.shots")


PATIENTS = [(f"p{task}", day, "fm"[task % 2], task + day) for task in range(8) for day in range(4)]


def patients(folder, **options):
    file = write_csv(folder / "patients.csv", ("patient", "day", "sex", "level"), PATIENTS)
    return Curves(file, "patient", ["day", "sex"], ["level"], **options)


def test_a_category_is_an_input_for_each_of_its_levels(tmp_path):
    tasks = patients(tmp_path, categories={"sex": ["f", "m"]})
    x = tasks.splits["test"].x
    for name, rows in zip(tasks.splits["test"].names, x, strict=True):
        assert rows[:, 1:].tolist() == [[1, 0] if int(name[1:]) % 2 == 0 else [0, 1]] * 4
    assert tasks.scaling().x_mean[1:] == [0, 0]
    assert tasks.scaling().x_std[1:] == [1, 1]
    assert sampled(tasks, "train", 3, 2, None).query.x.shape == (3, 2, 3)


def test_the_points_of_a_prediction_have_the_same_levels(tmp_path):
    data = TaskDataModule(patients(tmp_path, categories={"sex": ["f", "m"]}))
    data.predict_file = write_csv(
        tmp_path / "a.csv", ["patient", "day", "sex", "level"], [(1, 1, "m", 2), (1, 2, "m", "")]
    )
    data.setup("predict")
    assert data.asked.x.tolist() == [[1, 0, 1], [2, 0, 1]]
    data.predict_file = write_csv(
        tmp_path / "b.csv", ["patient", "day", "sex", "level"], [(1, 1, "M", 2), (1, 2, "m", "")]
    )
    told(lambda: data.setup("predict"), "column 'sex' holds 'M' in line 2", "none of its levels", "{'sex': ['f', 'm']}")


def test_a_column_of_texts_is_told_with_its_levels(tmp_path):
    told(
        patients(tmp_path).prepare,
        "column 'sex' holds 'f' in line 2 (32 such cells in all)",
        "if 'sex' is a category, give its levels: data.tasks.categories={'sex': ['f', 'm']}",
    )


@pytest.mark.parametrize(
    "categories", [{"age": ["a", "b"]}, {"sex": "fm"}, {"sex": ["f"]}, {"sex": ["f", "f"]}, {"sex": [], "day": [1, 2]}]
)
def test_categories_that_are_none_are_told(tmp_path, categories):
    told(lambda: patients(tmp_path, categories=categories), "data.tasks.categories=")


def test_categories_alone_are_no_inputs(tmp_path):
    levels = {"sex": ["f", "m"], "day": [0, 1, 2, 3]}
    told(lambda: patients(tmp_path, categories=levels), "needs a column of numbers")
