"""replacing: a file or folder is whole or not there, and an error leaves the old one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from utils.files import naming, replacing, replacing_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("old", [None, b"old"])
def test_the_new_file_takes_the_place_of_the_old_one(tmp_path, sync, old):
    path = tmp_path / "a.png"
    if old is not None:
        path.write_bytes(old)
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path and temporary != path
        assert path.exists() == (old is not None) and (old is None or path.read_bytes() == old)  # not yet
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("written", [False, True])
def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path, error, written):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as raised:
        with replacing(path) as temporary:
            if written:
                temporary.write_bytes(b"half")
            raise error
    assert raised.value is error and path.read_bytes() == b"old" and names(tmp_path) == ["a.pt"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no rename")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").is_dir()


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_missing_folders_are_made(tmp_path):
    with replacing(str(tmp_path / "new/folder/a.txt")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "new/folder/a.txt").read_text() == "new"
    with pytest.raises(OSError), replacing(tmp_path / "new/folder/a.txt/b.txt"):
        pass


def test_the_temporary_name_is_hidden_and_keeps_the_suffix(tmp_path):
    """Pillow and matplotlib choose a format by it; whoever looks for files must not find half of one."""
    for name in ("a.png", "latest.pt", "report.html"):
        with replacing(tmp_path / name) as temporary:
            assert temporary.name.startswith(".") and temporary.suffix == Path(name).suffix
            temporary.write_text("new")


def test_a_temporary_file_of_a_killed_run_is_no_obstacle(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    temporary.write_text("half, then killed")
    with replacing(tmp_path / "a.txt") as again:
        assert again == temporary
        again.write_text("newer")
    assert (tmp_path / "a.txt").read_text() == "newer" and names(tmp_path) == ["a.txt"]


def test_sync_comes_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    for sync, expected in ((False, ["rename"]), (True, ["sync", "rename"] + ["sync"] * (os.name == "posix"))):
        calls.clear()
        with replacing(tmp_path / "a.txt", sync=sync) as temporary:
            temporary.write_text("new")
        assert calls == expected  # the last one is the folder's


def test_a_failed_sync_is_an_error_but_not_that_of_the_folder(tmp_path, monkeypatch):
    def fail(path, where):
        if where(path):
            raise OSError("cannot sync")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr("utils.files._sync", lambda path: fail(path, Path.is_file))
    with pytest.raises(OSError, match="cannot sync"), replacing(tmp_path / "a.txt", sync=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]
    monkeypatch.setattr("utils.files._sync", lambda path: fail(path, Path.is_dir))
    with replacing(tmp_path / "a.txt", sync=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


# ---------------------------------------------------------------------------------------------------------------------
# folders


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.txt").write_text(text)


@pytest.mark.parametrize("old", [False, True])
def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path, old):
    if old:
        fill(tmp_path / "x", "old")
    with replacing_folder(tmp_path / "x", names=["sub", "other"]) as temporary:
        fill(temporary, "new")
        assert (tmp_path / "x").exists() == old
    assert (tmp_path / "x/sub/a.txt").read_text() == "new" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_an_error_leaves_the_old_folder(tmp_path, error, old):
    if old:
        fill(tmp_path / "x", "old")
    with pytest.raises(type(error)), replacing_folder(tmp_path / "x", names=["sub"]) as temporary:
        fill(temporary, "half")
        raise error
    assert names(tmp_path) == ["x"] * old and (not old or (tmp_path / "x/sub/a.txt").read_text() == "old")


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    fill(tmp_path / "x", "old")
    replace = os.replace

    def fail(source, target):
        if Path(source).name == ".x.tmp":
            raise OSError("no rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"), replacing_folder(tmp_path / "x", names=["sub"]) as temporary:
        fill(temporary, "new")
    assert (tmp_path / "x/sub/a.txt").read_text() == "old" and names(tmp_path) == ["x"]


def test_what_kills_left_is_cleared_and_an_old_folder_restored(tmp_path):
    fill(tmp_path / ".x.old", "old")  # a kill between the two renames
    fill(tmp_path / ".x.tmp", "half")
    with pytest.raises(ValueError), replacing_folder(tmp_path / "x", names=["sub"]):
        assert (tmp_path / "x/sub/a.txt").read_text() == "old"
        raise ValueError
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("other", ["thesis.txt", ".git"])
def test_a_folder_with_something_else_in_it_is_never_replaced(tmp_path, other):
    fill(tmp_path / "x", "old")
    (tmp_path / "x" / other).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {other}"), replacing_folder(tmp_path / "x", names=["sub"]):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"), replacing_folder(tmp_path / "file", names=["sub"]):
        pass
    assert names(tmp_path) == ["file", "x"] and names(tmp_path / "x") == sorted([other, "sub"])


def test_an_error_of_the_disk_names_the_file():
    with pytest.raises(OSError, match=r"could not write a.txt \(No space left on device\)"), naming("a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
