"""Atomic file replacement: write beside the target, then rename."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
