"""Zip archives that are read as folders: nothing is unpacked to the disk.

    files = zip_files("my_images.zip")                  # {"fire/1.png": ZipFile member, ...}
    with files["fire/1.png"].open() as file: ...

A member is decompressed into memory when it is opened, and never to more bytes than the archive's directory says. What
that directory says is checked first, so an archive that swells without bounds is refused before any of it is read.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, first_line

MAX_BYTES = 64 * 2**30  # of all members together, unpacked
MAX_MEMBER_BYTES = 2**30  # of one member, which is held in memory
MAX_RATIO = 100  # unpacked to packed; images hardly shrink
SMALL_BYTES = 2**28  # an archive may swell to this much at any ratio: drawings on white shrink well
UTF_8_NAME = 0x800  # flag of a member whose name is UTF-8
ENCRYPTED = 0x1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others decompress without a bound on memory


class ArchiveError(UserError):
    """An archive that is damaged, or that must not be trusted."""


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip archive. It can be sent to other processes, each of which opens the archive for itself.

    Attributes:
        archive: path of the archive.
        key: the member's name in the archive's directory.
        stamp: size and time of the archive when its directory was read.
    """

    archive: str
    key: str
    stamp: tuple[int, int]

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]

    def open(self) -> io.BytesIO:
        """Return the content of the file. Raises ArchiveError if it cannot be read."""
        try:
            archive = _opened(self.archive, self.stamp, os.getpid())
            with archive.open(self.key) as file:
                return io.BytesIO(file.read(archive.getinfo(self.key).file_size))  # no more, whatever the data holds
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ArchiveError(f"cannot read {self} ({first_line(error)}): pack the folder anew") from error

    def __str__(self) -> str:
        return f"{self.archive}/{self.key}"


def zip_files(path: str | Path) -> dict[str, ZipMember]:
    """List the files in a zip archive by their names, with forward slashes.

    Raises:
        ArchiveError: if the archive is damaged, encrypted or packed by a rare method, names a file outside of itself,
            or would unpack to far more than its own size.
    """
    try:
        with open(path, "rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ArchiveError(f"{path} is no zip archive, or a damaged one ({first_line(error)}): pack the folder anew"
                           ) from error
    names = [_name(path, member) for member in members]
    _check_sizes(path, members, packed=stamp[0])
    for member in members:
        if member.flag_bits & ENCRYPTED or member.compress_type not in METHODS:
            problem = "encrypted" if member.flag_bits & ENCRYPTED else "packed by a method other than deflate"
            raise ArchiveError(f"{path} is {problem}: unpack it, and give the folder")
    return {name: ZipMember(str(path), member.filename, stamp) for name, member in zip(names, members)}


def _name(path: str | Path, member: zipfile.ZipInfo) -> str:
    """Return the name of a member with forward slashes; raise ArchiveError if it leads out of the archive."""
    name = member.filename
    if not member.flag_bits & UTF_8_NAME:  # Python takes it for an old DOS name; many programs mean UTF-8
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    name = name.replace("\\", "/")
    parts = name.split("/")
    if ".." in parts or name.startswith("/") or parts[0].endswith(":"):
        raise ArchiveError(f"{path} names a file outside of itself, {name}: do not trust it; pack the folder anew")
    return "/".join(part for part in parts if part not in ("", "."))


def _check_sizes(path: str | Path, members: list[zipfile.ZipInfo], packed: int) -> None:
    total = sum(member.file_size for member in members)
    largest = max((member.file_size for member in members), default=0)
    if total > MAX_BYTES or total > max(SMALL_BYTES, MAX_RATIO * packed) or largest > MAX_MEMBER_BYTES:
        raise ArchiveError(f"{path} holds {total / 2**20:,.0f} MiB in {packed / 2**20:,.1f} MiB, up to "
                           f"{largest / 2**20:,.0f} MiB in one file: more than images need, as in a zip bomb; if you "
                           f"trust it, unpack it and give the folder")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _opened(path: str, stamp: tuple[int, int], process: int) -> zipfile.ZipFile:
    """Open an archive once in each process: its threads may share it, but forked processes may not."""
    if _stamp(os.stat(path)) != stamp:
        raise OSError("the archive has changed since its files were listed")
    return zipfile.ZipFile(path)
