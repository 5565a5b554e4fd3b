"""Atomic replacement of files and folders: write beside the target, then rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


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
def replacing_folder(path: str | Path, names: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place if the block ends well.

    An error or a full disk leaves the old folder as it was. A kill in the instant between two renames leaves it as
    `.NAME.old`, from which the next call restores it.

    Args:
        names: what a folder of this kind holds. One with anything else in it is not replaced, nor is a file.

    Raises:
        ValueError: for such a folder or file.
    """
    path = Path(path).resolve()
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)
    _check_replaceable(path, names)
    for left_over in (temporary, old):
        if left_over.exists():
            shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.is_dir():
                os.replace(old, path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, names: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a folder")
    for content in sorted(path.iterdir()) if path.is_dir() else ():
        if content.name not in names:
            raise ValueError(f"{path} holds {content.name}, which would be lost; name another folder, or a new one")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name `path` in the OSError of a block that replaces it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror or error}); what stood there before is untouched"
                      ) from error


def keep_settings(path: str | Path, settings: dict[str, Any]) -> None:
    """Write the settings that some long work is begun with; when it is continued, check that they are the same.

    Raises:
        ValueError: if the file has other settings, or is damaged.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))  # as they come back from the file
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n")
        return
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
