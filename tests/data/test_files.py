"""Files as spreadsheets, statistics programs and editors write them."""

import bz2
import gzip
import lzma

import pandas as pd
import pytest
from csv_files import told, written

from metalit.data import Curves
from metalit.data.files import read_records
from metalit.data.table import Columns, numbers, read_asked, read_table

TEXT = "task,x,y\nCôte d'Ivoire,1,2\nb,3,\n"
CELLS = [["task", "x", "y"], ["Côte d'Ivoire", "1", "2"], ["b", "3", ""]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_unicode_are_read_without_a_word(tmp_path, encoding, recwarn):
    assert read_records(written(tmp_path, TEXT.encode(encoding)), "file").cells == CELLS
    assert not recwarn.list


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_an_encoding_that_says_nothing_of_itself_is_told(tmp_path, encoding):
    with pytest.warns(match="is no UTF-8, and is read as Windows-1252") as said:
        assert read_records(written(tmp_path, TEXT.encode(encoding)), "file").cells == CELLS
    assert len(said) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_machine(tmp_path, end):
    records = read_records(written(tmp_path, TEXT.replace("\n", end)), "file")
    assert (records.cells, records.lines) == (CELLS, [1, 2, 3])


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found(tmp_path, separator):
    text = f"task{separator}x{separator}y, z\n" if separator != "," else "task,x,y\n"
    text += "".join(f'"a,b;c|d"{separator}{row}{separator}{row}\n' for row in range(3))
    records = read_records(written(tmp_path, text), "file")
    assert records.separator == separator
    assert [record[0] for record in records.cells[1:]] == ["a,b;c|d"] * 3


def test_a_first_line_may_name_the_separator(tmp_path):
    records = read_records(written(tmp_path, "sep=;\r\na,b;c\r\n1,5;2\r\n"), "file")
    assert (records.cells, records.lines, records.separator) == ([["a,b", "c"], ["1,5", "2"]], [2, 3], ";")


def test_decimal_commas_do_not_make_a_separator(tmp_path):
    text = "zeit, tage;wert\n" + "1,5;2,5\n" * 3
    assert read_records(written(tmp_path, text), "file").separator == ";"


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas_are_numbers(tmp_path, separator):
    frame = read_table(written(tmp_path, "x;y\n1,5;-0,25\n2;1e3\n-3,25e1;.5\n".replace(";", separator)), "file")
    assert numbers(frame, ["x"], "file")[:, 0].tolist() == [1.5, 2, -32.5]
    told(lambda: numbers(frame, ["y"], "file"), "file: column 'y' holds '-0,25' beside '.5', two decimal signs")


def test_commas_that_may_be_those_of_thousands_are_told(tmp_path):
    frame = read_table(written(tmp_path, "x;y\n1,234;0,123\n12;1,234\n"), "file")
    told(lambda: numbers(frame, ["x"], "file"), "column 'x' holds '1,234'", "thousands", "decimal point")
    assert numbers(frame, ["y"], "file")[:, 0].tolist() == [0.123, 1.234]


def test_points_that_may_be_those_of_thousands_are_told(tmp_path):
    frame = read_table(written(tmp_path, "dose;level\n1.000;0,5\n500;2,5\n"), "file")
    told(lambda: numbers(frame, ["dose"], "file"), "column 'dose' holds '1.000'", "thousands", "such as '0,5'")
    for table in ("dose;level\n1.000;0,5\n2.5;2,5\n", "dose;level\n1.000;0.5\n2.500;2\n"):
        frame = read_table(written(tmp_path, table), "file")
        assert numbers(frame, ["dose"], "file")[:, 0].tolist() == [1.0, 2.5]


def test_decimal_commas_between_commas_are_told(tmp_path):
    frame = read_table(written(tmp_path, 'x,y\n"1,5",2\n'), "file")
    told(lambda: numbers(frame, ["x"], "file"), "'1,5' in line 2", "with a decimal point")


@pytest.mark.parametrize(("suffix", "squeeze"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files_are_read_and_broken_ones_told(tmp_path, suffix, squeeze):
    file = tmp_path / f"table.csv{suffix}"
    file.write_bytes(squeeze.compress(TEXT.encode()))
    assert read_records(file, "file").cells == CELLS
    for content in (TEXT.encode(), squeeze.compress(TEXT.encode())[:-9], b""):
        file.write_bytes(content)
        told(lambda: read_table(file, "file"), f"file={str(file)!r} ")
    told(lambda: read_table(written(tmp_path, squeeze.compress(TEXT.encode())), "file"), "is compressed", suffix)


def test_a_workbook_is_told(tmp_path):
    told(lambda: read_table(written(tmp_path, b"PK\x03\x04abc"), "file"), "Excel", "save the sheet as CSV")


def test_cells_of_any_length_are_read_and_shown_in_short(tmp_path):
    frame = read_table(written(tmp_path, f"note,x\n{'w' * 200_000},1\na,{'v' * 200_000}\n"), "file")
    assert len(frame["note"].iloc[0]) == 200_000
    with pytest.raises(ValueError, match=r"column 'x' holds 'v+…' in line 3;") as caught:
        numbers(frame, ["x"], "file")
    assert len(str(caught.value)) < 300


def test_a_name_of_any_length_is_told(tmp_path):
    told(lambda: read_table("a" * 5000, "file"), "there is no such file")


def test_a_line_says_where_a_quote_does_not_end(tmp_path):
    told(lambda: read_table(written(tmp_path, 'x,y\n1,2\n"3,4\n'), "file"), "line 3: unexpected end of data", "quotes")


def test_a_table_of_a_spreadsheet_in_german_is_trained_on_and_asked(tmp_path):
    """Semicolons, decimal commas, Windows-1252, rows without a value."""
    lines = [f"{name};{day},5;{day * 2},25;Übung" for name in "abcde" for day in range(4)]
    file = written(tmp_path, "\r\n".join(["Patient;Tag;Spiegel;Notiz", *lines, "a;9,5;k. A.;", ""]).encode("cp1252"))
    told(Curves(file, "Patient", ["Tag"], ["Spiegel"]).prepare, "'k. A.' in line 22")
    file = written(tmp_path, "\r\n".join(["Patient;Tag;Spiegel;Notiz", *lines, "a;9,5;NA;", ""]).encode("cp1252"))
    with pytest.warns(match="1 of 21 rows"):
        held = Curves(file, "Patient", ["Tag"], ["Spiegel"]).splits
    assert sum(len(split.names) for split in held.values()) == 5
    asked = read_asked(file, Columns("Patient", ["Tag"], ["Spiegel"]))
    assert (asked.x[:2, 0].tolist(), asked.y[:2, 0].tolist()) == ([0.5, 1.5], [0.25, 2.25])
    assert (asked.frame.attrs["separator"], asked.frame.attrs["decimal"]) == (";", ",")


def test_numbers_are_those_of_pandas(tmp_path):
    file = written(tmp_path, "x,y\n0.1,-1e-30\n+3,.5\n1E5,7.\n")
    frame = read_table(file, "file")
    assert numbers(frame, ["x", "y"], "file").tolist() == pd.read_csv(file).to_numpy(float).tolist()
