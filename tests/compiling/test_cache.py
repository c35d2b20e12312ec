"""What is compiled is kept where nobody else can write: what lies there is loaded and run."""

import os
import tempfile
from pathlib import Path

import pytest

from metalit.compiling import cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder for a process of such an environment, and what is told."""

    def find(**environment):
        for name in ("HOME", "XDG_CACHE_HOME", VARIABLE):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        lines = []
        return cache._folder("/tmp/torchs", lines.append), lines

    return find


def mode(path):
    return path.stat().st_mode & 0o777


def test_it_is_the_users_own_in_the_folder_for_caches(place, tmp_path):
    old = os.umask(0)
    try:
        folder, told = place(HOME=tmp_path)
    finally:
        os.umask(old)
    assert folder == tmp_path / ".cache/metalit/inductor"
    assert mode(folder) == mode(folder.parent) == 0o700
    assert place(HOME=tmp_path)[0] == folder
    assert place(HOME="/nowhere", XDG_CACHE_HOME=tmp_path / "xdg")[0] == tmp_path / "xdg/metalit/inductor"
    assert told == []


def test_what_torch_has_set_by_itself_is_not_the_users_wish(place, tmp_path):
    assert place(HOME=tmp_path, **{VARIABLE: "/tmp/torchs"})[0] == tmp_path / ".cache/metalit/inductor"
    assert place(HOME=tmp_path, **{VARIABLE: tmp_path / "mine"}) == (tmp_path / "mine", [])


@pytest.mark.parametrize("part", ["metalit", "metalit/inductor"])
@pytest.mark.parametrize("permissions", [0o777, 0o720])
def test_a_folder_that_others_can_write_is_not_used(part, permissions, place, tmp_path):
    (tmp_path / part).mkdir(parents=True, mode=0o700)
    (tmp_path / part).chmod(permissions)
    folder, (line,) = place(XDG_CACHE_HOME=tmp_path)
    assert folder.parent == Path(tempfile.gettempdir())
    assert mode(folder) == 0o700
    assert f"{tmp_path / part} is writable by other users" in line
    assert VARIABLE in line


def test_nor_one_of_another_user(place, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    folder, (line,) = place(**{VARIABLE: tmp_path / "mine"})
    assert folder.parent == Path(tempfile.gettempdir())
    assert f"of user {user}" in line


def test_without_a_home_or_where_it_cannot_be_made(place, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for environment in ({"XDG_CACHE_HOME": tmp_path / "file"}, {"HOME": tmp_path / "file/home"}):
        folder, (line,) = place(**environment)
        assert folder.is_dir()
        assert "kept for this process alone" in line


@pytest.mark.long
def test_all_that_the_compiler_leaves_lies_there(shell, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    code = (
        "import torch, lightning.pytorch\n"
        "from metalit.compiling.compiled import Compiled\n"
        "double = Compiled(lambda tree: {'y': 2 * tree['x'].sin()})\n"
        "print(double({'x': torch.ones(3)}), double.failed)\n"
    )
    done = shell("-c", code)
    assert "False" in done.stdout, done.stdout + done.stderr
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert left == []
    kept = tmp_path / "caches/metalit/inductor"
    assert mode(kept) == 0o700
    assert (kept / "precompiled_headers").is_dir()
    assert list(kept.rglob("*.so"))
