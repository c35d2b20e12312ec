"""Matrices: generated, read, partly hidden, and posed in each outer step."""

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from csv_files import same_bits, told
from hypothesis import given
from hypothesis import strategies as st

from metalit.data import MatrixDataModule
from metalit.data.base import task_keys

SIGMAS = 5


def module_of(file=None, ranks=1, rank=0, step=0, max_steps=1000, stage="fit", inner_rank=None, **arguments):
    """A module that is set up, whose trainer is at ``step``; ``inner_rank`` is that of the matrix."""
    data = MatrixDataModule(file, rank=inner_rank, **arguments)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=ranks, max_steps=max_steps, global_step=step, lightning_module=None
    )
    data.setup(stage)
    return data


def matrix_of(*args, **arguments):
    return module_of(*args, **arguments).matrix


def csv_file(folder, text):
    (folder / "matrix.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / "matrix.csv")


def npy_file(folder, values, **options):
    np.save(folder / "matrix.npy", values, **options)
    return str(folder / "matrix.npy")


# --- generated matrices ---------------------------------------------------------------------------------------------


def test_a_matrix_without_settings_is_2_by_5_and_observed():
    matrix = matrix_of()
    assert (matrix.values.shape, matrix.values.dtype) == ((2, 5), torch.float64)
    assert (matrix.observed.dtype, bool(matrix.observed.all())) == (torch.bool, True)


def test_entries_are_standard_normal():
    values = matrix_of(rows=300, columns=200).values
    assert abs(float(values.mean())) < SIGMAS / 60_000**0.5
    assert abs(float(values.square().mean()) - 1) < SIGMAS * (2 / 60_000) ** 0.5
    assert torch.linalg.matrix_rank(values) == 200


@pytest.mark.parametrize("rank", [1, 3])
def test_a_product_of_factors_has_their_rank_and_its_variance(rank):
    values = matrix_of(rows=400, columns=300, inner_rank=rank).values
    assert torch.linalg.matrix_rank(values) == rank
    # given L of n rows, the mean of its squares scatters by sqrt(2/n), and so does that of R
    assert abs(float(values.square().mean()) / rank - 1) < SIGMAS * (2 / 400 + 2 / 300) ** 0.5


def test_the_two_factors_are_independent():
    values = matrix_of(rows=100, columns=100, inner_rank=1).values
    # the diagonal of l rᵀ has the mean 0, of l lᵀ it would have 1
    assert abs(float(values.diagonal().mean())) < SIGMAS / 100**0.5


def test_noise_is_added_to_the_product():
    clean, noisy = (matrix_of(rows=300, columns=200, inner_rank=2, noise=noise).values for noise in (0.0, 0.1))
    noise = (noisy - clean) / 0.1
    assert abs(float(noise.mean())) < SIGMAS / 60_000**0.5
    assert abs(float(noise.square().mean()) - 1) < SIGMAS * (2 / 60_000) ** 0.5
    assert abs(float((noise * clean).mean())) < SIGMAS * float(clean.square().mean() / 60_000) ** 0.5


def test_a_matrix_is_a_function_of_its_seed():
    for settings in ({}, {"inner_rank": 2, "noise": 0.1}, {"hide": 0.3, "rows": 6}):
        one, same, other = (matrix_of(seed=seed, **settings) for seed in (3, 3, 4))
        assert same_bits(one, same)
        assert not torch.equal(one.values, other.values)


# --- the user's matrices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "f4", "f2", "i8", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_any_real_type_is_read(tmp_path, dtype, order):
    values = np.array([[1, 0, 1], [0, 0, 1]], dtype=dtype, order=order)
    found = matrix_of(npy_file(tmp_path, values)).values
    assert (found.tolist(), found.dtype) == ([[1, 0, 1], [0, 0, 1]], torch.float64)


@pytest.mark.parametrize(
    "text",
    [
        "1,2.5,-3\n4,5e-1,6\n",
        "a,b,c\n1,2.5,-3\n4,5e-1,6\n",
        '"1",2.5,-3\r\n4, 0.5 ,6',
        "\ufeff1,2.5,-3\n\n4,.5,6\n\n",
    ],
    ids=["plain", "header", "quotes", "byte order mark and blank lines"],
)
def test_a_table_of_numbers_is_read(tmp_path, text):
    assert matrix_of(csv_file(tmp_path, text)).values.tolist() == [[1, 2.5, -3], [4, 0.5, 6]]


def test_a_first_line_of_numbers_is_a_row(tmp_path):
    assert matrix_of(csv_file(tmp_path, "2001,2002\n1,2\n")).values.tolist() == [[2001, 2002], [1, 2]]


def test_the_suffix_may_be_large(tmp_path):
    (tmp_path / "MATRIX.CSV").write_text("1,2\n")
    assert matrix_of(str(tmp_path / "MATRIX.CSV")).values.tolist() == [[1, 2]]


@pytest.mark.parametrize("cell", ["", " ", "NaN", "nan", "NA"])
def test_missing_entries_of_a_table_are_unobserved_and_zero(tmp_path, cell):
    matrix = matrix_of(csv_file(tmp_path, f"1,{cell},3\n4,5,6\n"), missing=True)
    assert matrix.values.tolist() == [[1, 0, 3], [4, 5, 6]]
    assert matrix.observed.tolist() == [[True, False, True], [True, True, True]]


def test_missing_entries_of_an_array_are_unobserved_and_zero(tmp_path):
    matrix = matrix_of(npy_file(tmp_path, np.array([[1, 2], [np.nan, 4]])), missing=True)
    assert matrix.values.tolist() == [[1, 2], [0, 4]]
    assert matrix.observed.tolist() == [[True, True], [False, True]]


def test_a_table_whose_first_entry_is_missing_has_no_header(tmp_path):
    assert matrix_of(csv_file(tmp_path, ",2\n3,4\n"), missing=True).values.tolist() == [[0, 2], [3, 4]]


# --- what is hidden -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hide", "count"), [(0.0, 0), (0.1, 10), (0.333, 33), (0.5, 50)])
def test_exactly_so_many_entries_are_hidden(hide, count):
    whole, matrix = matrix_of(rows=10, columns=10), matrix_of(rows=10, columns=10, hide=hide)
    assert (~matrix.observed).sum() == count
    assert torch.equal(matrix.values, torch.where(matrix.observed, whole.values, 0))


@given(st.integers(0, 100))
def test_only_what_is_observed_can_be_hidden(seed):
    values = torch.arange(36.0).reshape(6, 6).numpy()
    values[:2, 4:] = np.nan
    with TemporaryDirectory() as folder:
        matrix = matrix_of(npy_file(Path(folder), values), missing=True, hide=0.1, seed=seed)
    missing = torch.from_numpy(np.isnan(values))
    assert not (matrix.observed & missing).any()
    assert (~matrix.observed & ~missing).sum() == 3  # of 32


def test_every_entry_is_hidden_equally_often():
    count = sum((~matrix_of(rows=5, columns=5, hide=0.2, seed=seed).observed).long() for seed in range(40, 140))
    assert int(count.sum()) == 500
    assert (count - 20).abs().max() < SIGMAS * (100 * 0.2 * 0.8) ** 0.5


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 63, 64, 65])
def test_a_step_is_the_matrix_with_a_key_of_its_own_from_any_step(step):
    data = module_of(step=step, seed=2, hide=0.1, rows=4)
    for number, batch in enumerate(islice(data.train_dataloader(), 70), step):
        assert torch.equal(batch.key, task_keys(2, "train", torch.tensor([number])))
        assert same_bits(batch[:2], (data.matrix.values[None], data.matrix.observed[None]))
        assert batch.values.untyped_storage().data_ptr() == data.matrix.values.untyped_storage().data_ptr()
        assert batch.observed.untyped_storage().data_ptr() == data.matrix.observed.untyped_storage().data_ptr()


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_is_one_draw(split):
    data = module_of(stage="test", rank=1, ranks=2)
    (batch,) = getattr(data, f"{split}_dataloader")()
    assert same_bits(batch[:2], (data.matrix.values[None], data.matrix.observed[None]))
    assert torch.equal(batch.key, task_keys(0, split, torch.tensor([0])))


def test_the_length_of_training_is_the_number_of_steps():
    assert len(module_of(max_steps=12).train_dataloader()) == 12
    told(module_of(max_steps=-1).train_dataloader, "trainer.max_steps=-1", "the number of outer steps")


# --- what is told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows", "columns", "inner_rank"])
@pytest.mark.parametrize("number", [0, -1, 1.5])
def test_numbers_below_one_are_told(name, number):
    told(lambda: module_of(**{name: number}), f"data.{name.removeprefix('inner_')}={number}", "at least 1")


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_bad_noise_is_told(noise):
    told(lambda: module_of(inner_rank=1, noise=noise), f"data.noise={noise}", "at least 0")


@pytest.mark.parametrize("hide", [-0.1, 1.0, float("nan")])
def test_a_bad_fraction_to_hide_is_told(hide):
    told(lambda: module_of(hide=hide), f"data.hide={hide}", "below 1")


def test_settings_that_would_change_nothing_are_told(tmp_path):
    told(lambda: module_of(noise=0.5), "data.noise=0.5", "data.rank")
    file = csv_file(tmp_path, "1,2\n")
    told(lambda: module_of(file, inner_rank=1), "data.rank=1", f"data.file={file!r}", "leave one of them out")


def test_several_processes_are_told():
    told(lambda: module_of(ranks=2), "MatrixDataModule makes one draw", "2 processes", "trainer.devices=1")


def test_prediction_is_told():
    told(module_of().predict_dataloader, "predict answers for few-shot learners", "MatrixDataModule")


def test_a_missing_file_and_an_unknown_suffix_are_told(tmp_path):
    told(lambda: module_of("nowhere.npy"), "data.file='nowhere.npy'", "there is no such file")
    told(lambda: module_of(str(tmp_path / "a.npy")), "there is no such file", "looked in")
    told(lambda: module_of("matrix.txt"), "data.file='matrix.txt'", "'.txt' is neither '.npy' nor '.csv'")


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_a_missing_entry_is_told_with_its_place_and_the_way_out(tmp_path, kind):
    file = csv_file(tmp_path, "1,2,3\n4,5,\nNaN,8,NA\n")
    if kind == "npy":
        file = npy_file(tmp_path, np.array([[1, 2, 3], [4, 5, np.nan], [np.nan, 8, np.nan]]))
    where = (f"data.file={file!r}", "row 2, column 3 (counted from 1) is missing (NaN), 3 in all", "data.missing=true")
    told(lambda: module_of(file), *where)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("sign", ["", "-"])
def test_an_infinite_entry_is_told_whatever_may_be_missing(tmp_path, missing, sign):
    where = ("row 2, column 1 (counted from 1) is infinite, 1 in all", "mend it")
    told(lambda: module_of(csv_file(tmp_path, f"1,2\n{sign}inf,\n"), missing=missing), *where)
    told(lambda: module_of(npy_file(tmp_path, np.array([[1, 2], [float(f"{sign}inf"), 4]])), missing=missing), *where)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3), (3, 0)])
def test_what_is_no_matrix_is_told(tmp_path, shape):
    file = npy_file(tmp_path, np.zeros(shape))
    told(lambda: module_of(file), f"data.file={file!r} has shape {list(shape)}", "[rows, columns]")


@pytest.mark.parametrize("text", ["", "\n\n", "a,b\n"])
def test_a_table_without_numbers_is_told(tmp_path, text):
    told(lambda: module_of(csv_file(tmp_path, text)), "has shape [0]", "[rows, columns]")


def test_a_pickle_is_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    file = npy_file(tmp_path, np.array([[Trap()]], dtype=object), allow_pickle=True)
    told(lambda: module_of(file), f"data.file={file!r} is no array of numbers", "allow_pickle=False")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "no header", "archive"])
def test_files_that_are_no_array_are_told(tmp_path, kind):
    file = npy_file(tmp_path, np.zeros((30, 40)))
    path = tmp_path / "matrix.npy"
    whole = path.read_bytes()
    if kind == "archive":
        with path.open("wb") as handle:
            np.savez(handle, whole)
    else:
        wrong = {"empty": b"", "text": b"1,2,3\n", "cut": whole[:500], "no header": whole[:20] + bytes(200)}
        path.write_bytes(wrong[kind])
    told(lambda: module_of(file), f"data.file={file!r}", "array")


@pytest.mark.parametrize("dtype", ["c16", "U3", "M8[s]"])
def test_arrays_of_other_types_are_told(tmp_path, dtype):
    file = npy_file(tmp_path, np.zeros((2, 2), dtype=dtype))
    told(lambda: module_of(file), f"data.file={file!r} holds values of type", "one array of real numbers")


@pytest.mark.parametrize(
    ("text", "line", "cell"),
    [
        ("1,2\n3,low\n", 2, "low"),
        ("a,b\n\n1,2\nx,4\n", 4, "x"),
        ("name,1,2\nr,3,4\n", 1, "name"),
        (",a,b\n0,1,2\n", 1, "a"),
        ("1:2\n3:4\n3:4\n", 2, "3:4"),
        ("a,b\nc,d\n", 2, "c"),
    ],
)
def test_a_text_is_told_with_its_line(tmp_path, text, line, cell):
    told(lambda: module_of(csv_file(tmp_path, text)), "data.file=", f"line {line} holds {cell!r}", "names of rows")


def test_rows_of_unequal_length_are_told(tmp_path):
    told(lambda: module_of(csv_file(tmp_path, "1,2\n3,4\n5\n")), "line 3 has 1 cell(s) and the first row 2", "commas")


def test_another_encoding_and_other_signs_are_read(tmp_path):
    with pytest.warns(match="is no UTF-8"):
        matrix = matrix_of(csv_file(tmp_path, b"\xe9;b\n1,5;2\n3;NA\n"), missing=True)
    assert matrix.values.tolist() == [[1.5, 2], [3, 0]]
    assert matrix.observed.tolist() == [[True, True], [True, False]]


def test_entries_beyond_single_precision_are_told(tmp_path):
    told(lambda: module_of(csv_file(tmp_path, "1,2\n3,-1e39\n")), "row 2, column 2", "single precision", "units")


@pytest.mark.parametrize(("values", "name"), [([[1, 2], [np.nan] * 2], "row"), ([[1, np.nan], [3, np.nan]], "column")])
@pytest.mark.parametrize("hide", [0.0, 0.01])
def test_a_row_or_column_of_missing_entries_is_told(tmp_path, values, name, hide):
    file = npy_file(tmp_path, np.array(values))
    where = (f"data.file={file!r}", f"{name} 2 has no observed entry", "nothing determines", f"remove that {name}")
    told(lambda: module_of(file, missing=True, hide=hide), *where)


def test_a_row_of_hidden_entries_is_told():
    told(lambda: module_of(rows=3, columns=1, hide=0.3), "data.hide=0.3", "has no observed entry", "hide less")
    told(lambda: module_of(rows=1, columns=9, hide=0.3), "data.hide=0.3", "column", "(3 such column(s)", "hide less")


def test_the_values_of_a_file_keep_their_digits(tmp_path):
    assert matrix_of(csv_file(tmp_path, "0.1,779.4453145\n")).values.tolist() == [[0.1, 779.4453145]]
