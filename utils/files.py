"""Atomic file replacement: write beside the target, then rename."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
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
