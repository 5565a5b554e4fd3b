"""replacing: a file or folder is whole or not there, and an error leaves the old one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from scripts import tree

from utils.files import MANIFEST, naming, replacing, replacing_folder


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


def write(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a.txt").write_text(text)


def export(path: Path, text: str) -> None:
    with replacing_folder(path) as temporary:
        write(temporary, text)


@pytest.mark.parametrize("old", ["none", "an export", "empty"])
def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path, old):
    if old == "an export":
        export(tmp_path / "x", "old")
    elif old == "empty":
        (tmp_path / "x").mkdir()
    with replacing_folder(tmp_path / "x") as temporary:
        write(temporary, "new")
        assert (tmp_path / "x/sub/a.txt").exists() == (old == "an export")
    assert (tmp_path / "x/sub/a.txt").read_text() == "new" and names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == [MANIFEST, "sub"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_an_error_leaves_the_old_folder(tmp_path, error, old):
    if old:
        export(tmp_path / "x", "old")
    with pytest.raises(type(error)), replacing_folder(tmp_path / "x") as temporary:
        write(temporary, "half")
        raise error
    assert names(tmp_path) == ["x"] * old and (not old or (tmp_path / "x/sub/a.txt").read_text() == "old")


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    export(tmp_path / "x", "old")
    replace = os.replace

    def fail(source, target):
        if Path(source).name == ".x.tmp":
            raise OSError("no rename")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        export(tmp_path / "x", "new")
    assert (tmp_path / "x/sub/a.txt").read_text() == "old" and names(tmp_path) == ["x"]


def test_what_kills_left_is_cleared_and_an_old_folder_restored(tmp_path):
    export(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".x.old")  # a kill between the two renames
    write(tmp_path / ".x.tmp", "half")
    (tmp_path / ".x.tmp" / MANIFEST).touch()
    with pytest.raises(ValueError), replacing_folder(tmp_path / "x"):
        assert (tmp_path / "x/sub/a.txt").read_text() == "old"
        raise ValueError
    assert names(tmp_path) == ["x"]


def test_what_a_kill_leaves_of_an_old_folder_is_no_obstacle(tmp_path, monkeypatch):
    """Whatever is removed first, the manifest goes last."""
    export(tmp_path / "x", "old")

    def die(folder, *_, **__):
        raise SystemExit(137)

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(SystemExit):
        export(tmp_path / "x", "new")
    assert (tmp_path / ".x.old" / MANIFEST).is_file() and (tmp_path / "x/sub/a.txt").read_text() == "new"
    monkeypatch.undo()
    export(tmp_path / "x", "newer")
    assert names(tmp_path) == ["x"] and (tmp_path / "x/sub/a.txt").read_text() == "newer"


def add_to_an_export(path: Path) -> None:
    export(path, "old")
    (path / "sub/.mine").write_text("mine")


def change_an_export(path: Path) -> None:
    export(path, "old")
    (path / "sub/a.txt").write_text("mine")


def link_in_an_export(path: Path) -> None:
    export(path, "old")
    (path / "sub/a.txt").unlink()
    write(path.parent / "mine", "old")
    (path / "sub/a.txt").symlink_to(path.parent / "mine/sub/a.txt")


def damage_the_manifest(path: Path) -> None:
    export(path, "old")
    (path / MANIFEST).write_text("[")


NOT_EXPORTS = {
    r"holds sub and no pokediff_export\.json": lambda path: write(path, "mine"),
    r"holds \.git and no": lambda path: (path / ".git").mkdir(parents=True),
    r"holds sub/\.mine, which": add_to_an_export,
    r"a\.txt was changed since": change_an_export,
    r"x/sub/a\.txt was changed": link_in_an_export,
    r"holds sub/a\.txt, which": damage_the_manifest,
    r"x is a file": lambda path: path.write_text("mine"),
    r"\.x\.old holds sub and no": lambda path: write(path.with_name(".x.old"), "mine"),
    r"\.x\.tmp holds sub and no": lambda path: write(path.with_name(".x.tmp"), "mine"),
}


@pytest.mark.parametrize("words", NOT_EXPORTS)
def test_what_no_export_wrote_is_never_replaced(tmp_path, words):
    NOT_EXPORTS[words](tmp_path / "x")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=words) as refused:
        export(tmp_path / "x", "new")
    assert tree(tmp_path) == before and "\n" not in str(refused.value)


def test_what_is_added_while_the_new_folder_is_written_is_not_lost(tmp_path):
    export(tmp_path / "x", "old")
    with pytest.raises(ValueError, match="holds mine"), replacing_folder(tmp_path / "x") as temporary:
        write(temporary, "new")
        (tmp_path / "x/mine").write_text("mine")
    assert names(tmp_path) == ["x"] and (tmp_path / "x/mine").is_file()


def test_an_error_of_the_disk_names_the_file():
    with pytest.raises(OSError, match=r"could not write a.txt \(No space left on device\)"), naming("a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_names_its_file_once():
    with pytest.raises(OSError) as error, naming("folder"), naming("folder/a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == ("could not write folder/a.txt (No space left on device); what stood there before is "
                                "untouched")
