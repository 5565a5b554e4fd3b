"""Folders as users have them: images and label files that are damaged, hostile, or not what their name says.

Each is named on a line and left out, or refused on a line if nothing is left; no file of the user's is touched.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from scripts import ROOT, TINY, assert_one_line, call, tree

import train
from tools import preview_data
from utils.errors import printable

pytestmark = [pytest.mark.usefixtures("own_folder"),
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]  # pytest resets the filters


def encoded(name: str, size: int = 40, **options) -> bytes:
    file = BytesIO()
    Image.effect_noise((size, size), 80).convert("RGB").save(file, name, **options)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes = b"", bits: int = 8, more: bytes = b"") -> bytes:
    """A grey PNG that claims any dimensions, whatever it then holds."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + (chunk(b"zTXt", more) if more else b"")
            + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b""))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


BAD_IMAGES = {
    "zero bytes.png": (b"", "not an image, or an empty file"),
    "cut.jpg": (half(encoded("JPEG")), "truncated"),
    "cut.png": (half(encoded("PNG")), "truncated"),
    "cut.gif": (half(encoded("GIF")), ""),
    "cut.webp": (half(encoded("WEBP", lossless=True)), ""),
    "cut.bmp": (half(encoded("BMP")), "truncated"),
    "only its first bytes.jpg": (b"\xff\xd8\xff\xe0", "not an image"),
    "text.jpg": (b"this is not an image\n" * 20, "not an image"),
    "page.png": (b"<!DOCTYPE html><html>404 not found</html>", "not an image"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not an image"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n", "not an image"),
    "scan.jpg": (encoded("TIFF"), "not an image"),  # Pillow could read it, with a decoder that may not run
    "noise.png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ""),
    "a lie about the size.png": (png(60_000, 60_000), "decompression bomb"),
    "bomb.png": (png(20_000, 20_000, bytes(20_000 * 2_501), bits=1), "decompression bomb"),
    "just over the limit.png": (png(10_000, 9_000), "10000 x 9000 pixels are too many"),
    "line.png": (png(2**31 - 1, 1), "decompression bomb"),
    "no width.png": (png(0, 7), ""),
    "no pixels.png": (png(30, 30), ""),
    "swelling text.png": (png(8, 8, bytes(72), more=b"k\0\0" + zlib.compress(bytes(70_000_000), 1)), "Decompressed"),
    "name\nof two lines.png": (b"", "not an image"),
    "\x1b[2Jclears the screen.png": (b"", "not an image"),
}


def good_images(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names or ("good 1.png", "good 2.png", "good 3.png"):
        Image.new("RGB", (20, 24), (80, 90, 200)).save(folder / name, "PNG")


def assert_named_and_left_out(name: str, why: str, capsys) -> None:
    """Among good images it costs a line; alone in its folder it is an error."""
    good_images(Path("mine"))
    before = tree()
    assert call(preview_data, "mine", "--image_size", 16, "--output", "seen.png") == 0
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("warning: left out mine") and printable(name) in line and why in line
    assert "3 images in mine, 1 files left out" in printed.out
    Path("seen.png").unlink()
    for path in Path("mine").glob("good*"):
        path.unlink()
    code = call(train, *TINY, "--data", "mine")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: left out")
    assert_one_line(code, capsys, "none of the 1 image files in mine can be read")
    assert tree() == {path: content for path, content in before.items() if "good" not in path}


@pytest.mark.parametrize("name", BAD_IMAGES, ids=lambda name: name.strip("\x1b[2J").replace("\n", " "))
def test_a_bad_image(name, capsys):
    content, why = BAD_IMAGES[name]
    Path("mine").mkdir()
    Path("mine", name).write_bytes(content)
    assert_named_and_left_out(name, why, capsys)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("kind", ["nowhere", "itself", "pipe", "no permission"])
def test_links_and_pipes(kind, capsys, monkeypatch):
    Path("mine").mkdir()
    path, why = Path("mine/odd.png"), "not a file, or a link to nowhere"
    if kind == "nowhere":
        path.symlink_to("nowhere.png")
    elif kind == "itself":
        path.symlink_to("odd.png")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(encoded("PNG"))
        path.chmod(0)
        why = "Permission denied"
        if os.access(path, os.R_OK):  # root may read it nevertheless
            read = Image.open

            def refuse(file, **options):
                if Path(file).name == "odd.png":
                    raise PermissionError(13, why, str(file))
                return read(file, **options)

            monkeypatch.setattr(Image, "open", refuse)
            monkeypatch.setattr(Path, "read_bytes", lambda path: b"")
    assert_named_and_left_out("odd.png", why, capsys)


GOOD_NAMES = ["with spaces  .png", "Pokémon.png", "ポケモン.png", "بوكيمون.png", "🐉.png", "-rf.png",
              "a'b\"c$(d)`e`.png", "%s{0}.png", "x" * 200 + ".png", "CON.PNG", "a.tar.gz.jpeg", "back\\slash.png"]


@pytest.mark.skipif(os.name != "posix", reason="Windows allows fewer names")
def test_names_of_any_script_and_bytes_that_are_not_text(capsys):
    """Train, hold out, resume, in a folder whose name is not text either."""
    folder = Path(os.fsdecode(b"caf\xe9 \xff"))
    names = [*GOOD_NAMES, os.fsdecode(b"latin-1 \xe9.png"), "two\nlines.png"]
    try:
        good_images(folder, *names)
    except OSError as error:
        pytest.skip(f"this file system does not take such names: {error}")
    before = tree()
    assert call(train, *TINY, "--data", folder, "--holdout", 0.3, "--max_steps", 2) == 0
    assert call(train, "--resume", "--max_steps", 3) == 0
    assert f"images     {len(names) - 4} of 16 x 16" in capsys.readouterr().out
    assert {path: content for path, content in tree().items() if path in before} == before


@pytest.mark.skipif(os.name != "posix", reason="Windows allows fewer names")
def test_the_real_commands_with_a_name_that_is_not_text():
    """stdout may be of any encoding, and strict."""
    folder = os.fsdecode(b"caf\xe9")
    good_images(Path(folder))
    preview = [sys.executable, "-m", "tools.preview_data", folder]
    training = [sys.executable, ROOT / "train.py", *TINY, "--data", f"{folder}/none"]
    for command, status in (preview, 0), (training, 1):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200,
                              env={**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)})
        assert "Traceback" not in done.stderr and "caf\\udce9" in done.stdout + done.stderr
        assert done.returncode == status
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1  # of train.py


def test_all_of_them_at_once_and_training_goes_well(capsys):
    good_images(Path("mine"))
    for name, (content, _) in BAD_IMAGES.items():
        if os.name == "posix" or name[0].isalpha() and "\n" not in name:
            Path("mine", name).write_bytes(content)
    before = tree()
    assert call(train, *TINY, "--data", "mine", "--max_steps", 1) == 0
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("warning: left out")]
    assert len(lines) == 11 and f"{len(tree(Path('mine'))) - 3 - 10} more files" in lines[-1]
    assert "images     3 of 16 x 16" in printed.out
    assert {path: content for path, content in tree().items() if path in before} == before


BAD_LABELS = {
    "empty": (b"", "no column 'file' and no column 'types'"),
    "only a heading": (b"file,types\n", "names none of the images"),
    "semicolons": (b"file;types\na.png;fire\n", "no column"),
    "no heading": (b"good 1.png,fire\n", "no column"),
    "other images": (b"file,types\nother.png,fire\n", "names none of the images"),
    "a file twice": (b"file,types\ngood 1.png,fire\ngood 1.png,water\n", "line 3: 'good 1.png' is there twice"),
    "types in two cells": (b"file,types\ngood 1.png,fire,flying\n", "line 2: more cells"),
    "latin-1": ("file,types\npokémon.png,fire\n".encode("latin-1"), "UTF-8"),
    "utf-16": ("file,types\ngood 1.png,fire\n".encode("utf-16"), "UTF-8"),
    "an image": (encoded("PNG"), "UTF-8"),
    "zeros": (bytes(1000), ""),
    "a cell without an end": (b'file,types\n"good 1.png,fire\n' + b"x" * 200_000, ""),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels(kind, capsys):
    content, why = BAD_LABELS[kind]
    good_images(Path("mine"))
    Path("mine/labels.csv").write_bytes(content)
    before = tree()
    assert_one_line(call(train, *TINY, "--data", "mine"), capsys, "labels.csv", why)
    assert tree() == before


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("kind, why", [("folder", "directory"), ("nowhere", "No such file"),
                                       ("missing", "No such file")])
def test_labels_that_are_not_a_file(kind, why, capsys):
    good_images(Path("mine"))
    if kind == "folder":
        Path("mine/labels.csv").mkdir()
    elif kind == "nowhere":
        Path("mine/labels.csv").symlink_to("nowhere.csv")
    flags = ["--labels", "mine/labels.csv"] if kind == "missing" else []
    assert_one_line(call(train, *TINY, "--data", "mine", *flags), capsys, "labels.csv", why)
    assert not Path("checkpoints").exists()


def test_labels_that_change_under_a_run_are_noticed(capsys):
    good_images(Path("mine"))
    Path("mine/labels.csv").write_text("file,types\ngood 1.png,fire\ngood 2.png,water\n")
    assert call(train, *TINY, "--data", "mine", "--max_steps", 1) == 0
    Path("mine/labels.csv").write_text("file,types\ngood 1.png,water\ngood 2.png,fire\n")
    assert "other labels" in call(train, "--resume", "--max_steps", 2)
    Path("mine/labels.csv").write_text("file,types\ngood 1.png,water\ngood 2.png,ice\n")
    assert "the types ice water" in call(train, "--resume", "--max_steps", 2)


def test_images_of_other_names_are_noticed():
    good_images(Path("mine"))
    assert call(train, *TINY, "--data", "mine", "--max_steps", 1) == 0
    Path("mine/good 1.png").rename("mine/good 4.png")
    assert "other file names" in call(train, "--resume", "--max_steps", 2)
    assert not PngImagePlugin.ImageFile.LOAD_TRUNCATED_IMAGES  # half an image would be trained on as a half grey one
