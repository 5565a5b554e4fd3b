"""A .zip of a folder of images is read as the folder is, and an archive that must not be trusted is refused."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.data import load_samples, native_side
from training.dataset import DataError, ImageFolder, find_images, has_images, image_names
from utils import archive
from utils.archive import ArchiveError, zip_files
from utils.images import enlarge, save_image, to_pil


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of two types with a labels.csv, hidden files and a text."""
    for i, name in enumerate(("fire/1.png", "fire/deep/2.PNG", "ice/3.png", "4.png", ".hidden/5.png", "ice/._3.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 24 + i), 80).convert("RGB").save(tmp_path / "images" / name, "PNG")
    (tmp_path / "images/notes.txt").write_text("notes")
    return tmp_path / "images"


def pack(folder: Path, path: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write a folder's files to an archive, below a folder of the name `prefix`."""
    with zipfile.ZipFile(path, "w", method) as file:
        for member in sorted(folder.rglob("*"), reverse=True):
            file.write(member, f"{prefix}{member.relative_to(folder).as_posix()}")
    return path


@pytest.mark.parametrize("prefix, method", [("", zipfile.ZIP_STORED), ("images/", zipfile.ZIP_DEFLATED)])
@pytest.mark.parametrize("memory_limit", [None, 0])
def test_a_zip_is_the_folder(folder, tmp_path, prefix, method, memory_limit):
    packed = pack(folder, tmp_path / "images.ZIP", prefix, method)
    before = sorted(tmp_path.rglob("*"))
    ours, theirs = (ImageFolder(path, 16, memory_limit) for path in (packed, folder))
    assert image_names(str(packed)) == ours.names == theirs.names == ["4.png", "fire/1.png", "fire/deep/2.PNG",
                                                                     "ice/3.png"]
    assert ours.class_names == ("fire", "ice") and ours.fingerprint() == theirs.fingerprint()
    for a, b in zip(ours.__getitems__([0, 1, 2, 3]), theirs.__getitems__([0, 1, 2, 3])):
        assert torch.equal(a, b)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked
    assert str(ours.files[0]) == f"{packed}/{prefix}4.png" and has_images(packed)


def test_tables_in_a_zip(folder, tmp_path):
    (folder / "labels.csv").write_text("file,types\n4.png,water\n3.png,ice\n")
    assert ImageFolder(pack(folder, tmp_path / "a.zip"), 16).labels.tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]
    (folder / "labels.csv").unlink()
    (folder / "fire/metadata.csv").write_text("file_name,label\n1.png,hot\ndeep/2.PNG,deep\n")
    assert ImageFolder(pack(folder, tmp_path / "b.zip", "wrapped/"), 16).class_names == ("deep", "hot")
    (folder / "fire/metadata.csv").write_text("file_name,label\n1.png,a,b\n")
    with pytest.raises(DataError, match="c.zip/fire/metadata.csv, line 2: more cells"):
        ImageFolder(pack(folder, tmp_path / "c.zip", "wrapped/"), 16)


def test_the_folder_of_a_split_is_no_wrapper(folder, tmp_path):
    assert image_names(str(pack(folder, tmp_path / "a.zip", "train/")))[0] == "train/4.png"
    with zipfile.ZipFile(pack(folder, tmp_path / "b.zip", "all/"), "a") as file:
        file.writestr("__MACOSX/all/fire/._1.png", b"macOS adds these")
        file.writestr("all/fire\\5.png", b"as an old program writes it")
        name = zipfile.ZipInfo("all/Pok\u00e9mon.png")
        file.writestr(name, b"")
    assert image_names(str(tmp_path / "b.zip")) == ["4.png", "Pok\u00e9mon.png", "fire/1.png", "fire/5.png",
                                                    "fire/deep/2.PNG", "ice/3.png"]


def test_a_name_in_utf_8_without_its_flag(tmp_path):
    """Python reads such a name as that of an old DOS archive; macOS writes them."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("\u00e9.png", b"")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(signature) + offset + 1
        assert content[at] & 0x08
        content[at] &= ~0x08
    (tmp_path / "a.zip").write_bytes(content)
    assert list(zip_files(tmp_path / "a.zip")) == ["\u00e9.png"]


def test_an_unreadable_image_in_a_zip_is_named(folder, tmp_path, capsys):
    packed = pack(folder, tmp_path / "a.zip", method=zipfile.ZIP_STORED)
    with zipfile.ZipFile(packed, "a") as file:
        file.writestr("5.png", b"not an image")
    content = bytearray(packed.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255  # of one image: its check sum is wrong now
    packed.write_bytes(content)
    dataset = ImageFolder(packed, 16)
    lines = capsys.readouterr().err.splitlines()
    assert len(dataset) == 3 and dataset.left_out == 2 and len(lines) == 2
    assert any("CRC" in line and "a.zip/" in line for line in lines)
    assert any("a.zip/5.png: not an image" in line for line in lines)


def test_a_zip_can_be_read_in_other_processes(folder, tmp_path):
    dataset = ImageFolder(pack(folder, tmp_path / "a.zip"), 16, memory_limit=0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[i][0], dataset[i][0]) for i in range(4))
    # An archive that was replaced is noticed.
    Image.new("RGB", (16, 16)).save(folder / "6.png")
    pack(folder, tmp_path / "a.zip")
    archive._opened.cache_clear()
    with pytest.raises(ArchiveError, match="has changed"):
        copy.files[0].open()


def test_samples_in_a_zip(tmp_path):
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    (tmp_path / "samples").mkdir()
    save_image(to_pil(enlarge(pixels, 2)), tmp_path / "samples/0.png", image_size=16, scale=2)
    packed = pack(tmp_path / "samples", tmp_path / "samples.zip")
    assert native_side(packed) == 16 and load_samples(packed, 16).equal(pixels[None])


# ---------------------------------------------------------------------------------------------------------------------
# archives that are refused


def write(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:/evil.png"])
def test_a_path_that_leads_out_is_refused(tmp_path, name):
    path = write(tmp_path / "a.zip", **{"1.png": b"", name: b""})
    with pytest.raises(ArchiveError, match="names a file outside of itself, .*evil.png") as error:
        find_images(path)
    assert "\n" not in str(error.value) and not has_images(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.zip", **{f"{i}.bmp": bytes(100_000) for i in range(30)})  # 3 MB in some kB
    find_images(path)  # small enough for any ratio
    for limit, value in (("MAX_BYTES", 2**21), ("SMALL_BYTES", 2**21), ("MAX_MEMBER_BYTES", 2**16)):
        with monkeypatch.context() as patch, pytest.raises(ArchiveError, match="zip bomb") as error:
            patch.setattr(archive, limit, value)
            find_images(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    noise = write(tmp_path / "b.zip", **{f"{i}.bmp": os.urandom(100_000) for i in range(30)})
    monkeypatch.setattr(archive, "SMALL_BYTES", 0)
    find_images(noise)  # does not swell


def test_a_member_is_never_read_beyond_its_declared_size(tmp_path):
    path = write(tmp_path / "a.zip", **{"1.bmp": bytes(50_000_000)})
    content = path.read_bytes()
    size = (50_000_000).to_bytes(4, "little")
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    (member,) = zip_files(path).values()
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="1.bmp"):  # the check sum is that of another content
        member.open()
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("content, words", [
    (b"", "no zip archive"), (b"this is text", "no zip archive"), (None, "no zip archive"),
])
def test_a_damaged_archive_is_refused(folder, tmp_path, content, words):
    path = pack(folder, tmp_path / "a.zip")
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(ArchiveError, match=words) as error:
        ImageFolder(path, 16)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_other_archives_are_refused(folder, tmp_path):
    with pytest.raises(ArchiveError, match="method other than deflate"):
        find_images(pack(folder, tmp_path / "a.zip", method=zipfile.ZIP_LZMA))
    content = bytearray(pack(folder, tmp_path / "b.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match="encrypted"):
        find_images(tmp_path / "b.zip")
    with pytest.raises(DataError, match="no image in .*c.zip"):
        find_images(write(tmp_path / "c.zip", **{"notes.txt": b"notes", ".a.png": b""}))
    with pytest.raises(DataError, match="archives within it are not read"):
        find_images(write(tmp_path / "d.zip", **{"train.zip": b""}))
    with pytest.raises(DataError, match="parquet and arrow files are not read"):
        find_images(write(tmp_path / "e.zip", **{"data/train-00000-of-00001.parquet": b""}))
    (tmp_path / "f.tar").touch()
    with pytest.raises(DataError, match="f.tar is a file: give the folder that holds the images, or a .zip of it"):
        find_images(tmp_path / "f.tar")
