"""What nothing has foreseen is one line, and a file with all that a report needs."""

import re
from pathlib import Path

import pytest
import torch
from repository import ROOT

from metalit.__main__ import main
from metalit.cli.messages import failed_constructor
from metalit.modules import MetaLearner

MAML = "configs/sine_maml.yaml"


@pytest.fixture
def broken(monkeypatch):
    """Fits fail at outer step 3 with this error."""

    def at_step_3(error):
        steps_on = MetaLearner.steps_on

        def fail(module, batch):
            if module.global_step == 3:
                raise error
            return steps_on(module, batch)

        monkeypatch.setattr(MetaLearner, "steps_on", fail)

    return at_step_3


def only_line(output):
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("metalit: error: ")]
    assert len(line) <= 500
    return line


def test_it_is_told_and_written_into_the_folder_of_the_run(metalit, broken, tmp_path):
    broken(RuntimeError("a very\n" + "long " * 200 + "story"))
    status, output = metalit("fit", MAML)
    assert status == 3
    line, file = only_line(output), tmp_path / "lightning_logs/sine_maml/version_0/error.txt"
    assert line.startswith("metalit: error: RuntimeError in fit at outer step 3: a very long long ")
    assert str(file)[:20] in line or str(file) in line
    written = file.read_text()
    assert "Please report it" in written
    assert "command: metalit fit --config configs/sine_maml.yaml" in written
    assert re.search(r"^torch: 2\.", written, re.MULTILINE)
    assert "Traceback (most recent call last)" in written
    assert written.rstrip().endswith("story")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("Unable to allocate 74.5 GiB for an array"), "there is not enough memory: 74.5 GiB more were "),
        (RuntimeError("can't allocate memory: you tried to allocate 2147483648 bytes. Error"), "memory: 2 GiB more "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "memory: 20.00 MiB more"),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), "there is not enough memory; take"),
    ],
)
def test_memory_that_is_not_there_is_told(error, told, monkeypatch, capsys):
    monkeypatch.setattr("metalit.__main__._run", raising(error))
    assert main(["fit"]) == 1
    line = only_line(capsys.readouterr().err)
    assert told in line
    assert "take fewer tasks" in line
    built = failed_constructor(error)
    assert "it cannot be built: there is not enough memory" in str(built)


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_the_traceback_is_printed_where_it_is_asked_for(metalit, broken):
    broken(KeyError("here"))
    status, output = metalit("fit", MAML, "--traceback")
    assert status == 3
    assert "Traceback (most recent call last)" in output
    assert "metalit: error: KeyError in fit at outer step 3: 'here'; " in output


def test_before_a_run_is_opened_it_is_written_elsewhere(metalit, monkeypatch, tmp_path):
    def fail(*_):
        raise ZeroDivisionError("in the parser")

    monkeypatch.setattr("metalit.cli.command_line.find_start", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, output = metalit("fit", MAML)
    assert status == 3
    line = only_line(output)
    assert "ZeroDivisionError in fit: in the parser" in line
    (file,) = tmp_path.glob("metalit_*/error.txt")
    assert str(file) in line
    assert not (tmp_path / "lightning_logs").exists()
    # the command holds the folder of this test, and the traceback may; the head of the file names no place
    head = file.read_text().split("\n\n")[0]
    assert str(tmp_path) not in head
    assert str(ROOT) not in head


def test_no_disk_to_write_to_is_no_second_error(metalit, broken, monkeypatch):
    broken(RuntimeError("first"))
    write = Path.write_text

    def full(path, *arguments, **options):
        if path.name == "error.txt":
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    status, output = metalit("fit", MAML)
    assert status == 3
    assert "the traceback cannot be written" in only_line(output)
