"""The files of a data set: images and tables of labels, in a folder at any depth, or in a .zip of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from training.splits import split_of
from utils.archive import ZipMember, zip_files
from utils.errors import UserError
from utils.images import SUFFIXES

LABELS_CSV = "labels.csv"  # in the outermost folder
# Of Hugging Face's imagefolder, in any folder.
METADATA_READ = ("metadata.csv", "metadata.jsonl")
METADATA_PARQUET = "metadata.parquet"  # not read, but noticed
DATASET_INFO = "dataset_info.json"  # where Hugging Face's datasets keeps the names of classes


class DataError(UserError):
    """A problem with the data set."""


class DataFolder:
    """A folder, or a .zip of one, without its hidden files and folders.

    Attributes:
        path: where it is.
        is_zip: it is an archive, which stays packed.
        files: images and tables by their paths relative to the folder, with forward slashes on every system.
        images: the names of the images, sorted, so that their order is the same on every machine.

    Raises:
        DataError: if it does not exist, is another file, cannot be listed, or has no image.
        ArchiveError: as `zip_files` does.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise DataError(f"no folder {self.path}: give a folder of images, or a .zip of one")
        self.is_zip = self.path.is_file() and self.path.suffix.lower() == ".zip"
        if not self.is_zip and not self.path.is_dir():
            raise DataError(f"{self.path} is a file: give the folder that holds the images, or a .zip of it")
        found = _without_wrapper(_visible(zip_files(self.path))) if self.is_zip else _walk(self.path)
        self.files: dict[str, Path | ZipMember] = {name: found[name] for name in sorted(found) if _is_read(name)}
        self.images = [name for name in self.files if is_image(name)]
        if not self.images:
            suffixes = " ".join(suffix[1:] for suffix in SUFFIXES)
            raise DataError(f"no image in {self.path}: put {suffixes} files there, at any depth{_hint(found)}")

    def open(self, name: str) -> BinaryIO:
        """Open one of the `files` for reading. Raises OSError or ArchiveError."""
        file = self.files[name]
        return file.open() if isinstance(file, ZipMember) else file.open("rb")

    def tables(self, file_name: str) -> list[str]:
        """Return the names of the files called `file_name`, in whatever folder."""
        return [name for name in self.files if name.rsplit("/", 1)[-1] == file_name]


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_read(name: str) -> bool:
    return is_image(name) or name == LABELS_CSV or name.rsplit("/", 1)[-1] in (
        *METADATA_READ, METADATA_PARQUET, DATASET_INFO)


def _walk(root: Path) -> dict[str, Path]:
    """Return the files below a folder, also behind links, by their relative names."""
    def fail(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename} ({error.strerror}): change its permissions or give another "
                        f"folder")

    found, visited = {}, set()
    for parent, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(parent) in visited:  # a link that leads back up would be followed for ever
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        for name in names:
            if not name.startswith("."):
                path = Path(parent, name)
                found[path.relative_to(root).as_posix()] = path
    if (root / LABELS_CSV).is_dir():  # a mistake that must not go unnoticed
        found[LABELS_CSV] = root / LABELS_CSV
    return found


def _visible(members: Mapping[str, ZipMember]) -> dict[str, ZipMember]:
    """Leave out hidden files and folders, and those that macOS adds to archives."""
    return {name: member for name, member in members.items()
            if not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))}


def _without_wrapper(members: Mapping[str, ZipMember]) -> dict[str, ZipMember]:
    """Leave out the name of a folder around all files, so that a packed folder has the names that the folder has.

    A folder with the name of a split is no such wrapper.
    """
    tops = {name.split("/", 1)[0] for name in members}
    if len(tops) != 1 or any("/" not in name for name in members) or split_of(next(iter(tops))):
        return dict(members)
    return {name.split("/", 1)[1]: member for name, member in members.items()}


def _hint(found: Mapping[str, object]) -> str:
    """Say what to do with files of data sets that are not read."""
    suffixes = {os.path.splitext(name)[1].lower() for name in found}
    if suffixes & {".parquet", ".arrow"}:
        return " (parquet and arrow files are not read: save their images as files)"
    if suffixes & {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"}:
        return " (archives within it are not read: unpack them, or give one .zip)"
    return ""
