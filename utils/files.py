"""Atomic replacement of files and folders (write beside the target, then rename), and JSON files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "pokediff_export.json"  # in a folder that `replacing_folder` wrote


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place if the block ends well.

    A kill or a full disk at any moment leaves the old file or the new one. The temporary name keeps the suffix, from
    which image libraries choose a format, and starts with a dot. With `sync` the bytes reach the disk before the
    rename, so that the file also survives a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # same folder: a rename is atomic in one file system
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync and os.name == "posix":
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder; the file is safe by now
            _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place if the block ends well.

    The new folder gets a manifest, a file with the hash of each other file in it. Only what this function wrote is
    replaced: a folder with a manifest, and nothing in it that was added or changed since. An error or a full disk
    leaves the old folder as it was. A kill in the instant between two renames leaves it as `.NAME.old`, from which the
    next call restores it.

    Raises:
        ValueError: for any other folder that is not empty, and for a file.
    """
    path = Path(path).resolve()
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if (old / MANIFEST).is_file() and not path.exists():
        os.replace(old, path)
    for folder in (path, old):
        _check_replaceable(folder)
    if _is_there(temporary) and not (temporary / MANIFEST).is_file():
        _check_empty(temporary)
    for left_over in (temporary, old):
        if left_over.exists():
            _remove(left_over)
    temporary.mkdir(parents=True)
    try:
        (temporary / MANIFEST).touch()  # from here on a kill leaves a folder that is known as ours
        yield temporary
        content = {name: _sha256(temporary / name) for name in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps({"written by": "PokeDiff", "sha256": content}, indent=1) + "\n",
                                          encoding="utf-8")
        _check_replaceable(path)  # again: the block can take minutes
        if path.is_dir():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.is_dir():
                os.replace(old, path)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise
    with contextlib.suppress(OSError):
        if old.is_dir():
            _remove(old)


def _check_replaceable(path: Path) -> None:
    """Raise ValueError for a folder that is neither missing, nor empty, nor as `replacing_folder` left it."""
    if not (path / MANIFEST).is_file():
        return _check_empty(path)
    try:
        written = dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (ValueError, TypeError, KeyError, RecursionError):
        written = {}  # then each file counts as added
    for name in _files(path):
        if name not in written:
            raise ValueError(f"{path} holds {name}, which would be lost; name another folder, or a new one")
        if (path / name).is_symlink() or _sha256(path / name) != written[name]:
            raise ValueError(f"{path / name} was changed since it was written, which would be lost; name another "
                             f"folder, or a new one")


def _check_empty(path: Path) -> None:
    if not _is_there(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder")
    if content := min(path.iterdir(), default=None):
        raise ValueError(f"{path} holds {content.name} and no {MANIFEST}, the mark of an export, and would be lost; "
                         f"name another folder, or a new one")


def _remove(folder: Path) -> None:
    """Remove a folder of ours; its manifest last, so that what a kill leaves of it is known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    shutil.rmtree(folder)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _files(folder: Path) -> list[str]:
    """Return the paths of all files and links below a folder, but the manifest."""
    return [name for path in sorted(folder.rglob("*"))
            if (path.is_symlink() or not path.is_dir()) and (name := path.relative_to(folder).as_posix()) != MANIFEST]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class WriteError(OSError):
    """A file or folder that could not be written, named in the message."""


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name `path` in the OSError of a block that replaces it; one that names its file already stays as it is."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"could not write {path} ({error.strerror or error}); what stood there before is untouched"
                         ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole at any moment."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, whole at any moment."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if there is none. Raises ValueError, naming it, if it is damaged."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, or restore it from a copy") from error


def keep_settings(path: str | Path, settings: dict[str, Any]) -> None:
    """Write the settings that some long work is begun with; when it is continued, check that they are the same.

    Raises:
        ValueError: if the file has other settings, or is damaged.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))  # as they come back from the file
    if not path.exists():
        return write_json(path, settings)
    try:
        before = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove {path.parent}, or choose another --name") from error
    different = [f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                 for name, value in before.items() if settings.get(name) != value]
    if different or before.keys() != settings.keys():
        raise ValueError(f"{path.parent} was begun with {', '.join(different) or 'another version'}: give the same "
                        f"flags to continue, or another --name")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
