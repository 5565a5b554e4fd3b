"""Tests of dataset.py: decoding of every format, broken files, labels, what is held out, order and resuming.

    python -m pytest tests/test_dataset.py
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset as data
from dataset import DataError, ImageFolder, ShuffledBatches, decode_image, find_images, make_loader
from scripts import assert_one_line, call

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(top_left=RED, top_right=GREEN, bottom_left=BLUE, bottom_right=WHITE, size=32) -> np.ndarray:
    """A picture [size, size, 3] whose four quarters have four colours, so that any turn or mirroring shows."""
    picture, half = np.empty((size, size, 3), np.uint8), size // 2
    picture[:half, :half], picture[:half, half:] = top_left, top_right
    picture[half:, :half], picture[half:, half:] = bottom_left, bottom_right
    return picture


def quarter_colours(decoded: np.ndarray) -> np.ndarray:
    """The colours [4, 3] at the middle of the four quarters of a decoded image [3, S, S]."""
    a, b = decoded.shape[1] // 4, decoded.shape[1] * 3 // 4
    return np.stack([decoded[:, a, a], decoded[:, a, b], decoded[:, b, a], decoded[:, b, b]]).astype(int)


def assert_quarters(decoded: np.ndarray, *expected, tolerance=2) -> None:
    assert np.abs(quarter_colours(decoded) - np.array(expected)).max() <= tolerance, quarter_colours(decoded)


def write_folder(folder: Path, count: int, size=16) -> None:
    """`count` PNGs 000.png ..., each of one grey level that is its number times 7."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (size, size), (i * 7,) * 3).save(folder / f"{i:03d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# decoding


@pytest.mark.parametrize("name, options, tolerance", [
    ("a.png", {}, 2), ("a.bmp", {}, 2), ("a.gif", {}, 2), ("a.jpg", {"quality": 95}, 6), ("a.JPEG", {"quality": 95}, 6),
    ("a.webp", {"lossless": True}, 2)])
def test_formats(tmp_path, name, options, tolerance):
    Image.fromarray(quarters()).save(tmp_path / name, **options)
    assert find_images(tmp_path) == [tmp_path / name]
    decoded = decode_image(tmp_path / name, 16)
    assert decoded.dtype == np.uint8 and decoded.shape == (3, 16, 16)
    assert_quarters(decoded, RED, GREEN, BLUE, WHITE, tolerance=tolerance)


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "RGBA"])
def test_colour_modes(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(quarters()).convert(mode).save(path, **({"quality": 100} if mode == "CMYK" else {}))
    assert Image.open(path).mode == mode
    assert_quarters(decode_image(path, 16), RED, GREEN, BLUE, WHITE, tolerance=6)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_modes(tmp_path, mode):
    grey = quarters((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3)
    Image.fromarray(grey).convert("L").convert(mode).save(tmp_path / "a.png")
    assert_quarters(decode_image(tmp_path / "a.png", 16), (0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = quarters((0,) * 3, (1,) * 3, (2,) * 3, (3,) * 3)[..., 0].astype(np.uint16) * 21845  # thirds of 65535
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    assert_quarters(decode_image(tmp_path / "a.png", 16), (0,) * 3, (85,) * 3, (170,) * 3, (255,) * 3, tolerance=1)


def test_transparency_becomes_white(tmp_path):
    rgba = np.concatenate([quarters(RED, GREEN, BLUE, (0, 0, 0)), np.full((32, 32, 1), 255, np.uint8)], axis=-1)
    rgba[:16, 16:, 3] = 0  # green is gone altogether,
    rgba[16:, :16, 3] = 128  # blue half
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba).save(tmp_path / "a.webp", lossless=True)
    for name in ("a.png", "a.webp"):
        assert_quarters(decode_image(tmp_path / name, 16), RED, WHITE, (127, 127, 255), (0, 0, 0))

    grey = Image.fromarray(rgba).convert("LA")
    grey.save(tmp_path / "la.png")
    assert Image.open(tmp_path / "la.png").mode == "LA"
    assert_quarters(decode_image(tmp_path / "la.png", 16), (76,) * 3, WHITE, (142,) * 3, (0,) * 3)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_transparency_becomes_white(tmp_path, name):
    picture = Image.fromarray(np.kron([[0, 1], [2, 3]], np.ones((16, 16))).astype(np.uint8))
    picture.putpalette([*RED, *GREEN, *BLUE, 0, 0, 0])
    picture.save(tmp_path / name, transparency=1)
    assert Image.open(tmp_path / name).mode == "P"
    assert_quarters(decode_image(tmp_path / name, 16), RED, WHITE, BLUE, (0, 0, 0))


# What a viewer must do to the stored picture, for each value of EXIF's orientation tag (EXIF 2.3, section 4.6.4).
EXIF_STORED = {1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
               5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, 1),
               7: lambda p: p[::-1, ::-1].transpose(1, 0, 2), 8: lambda p: np.rot90(p, -1)}


@pytest.mark.parametrize("orientation", EXIF_STORED)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(EXIF_STORED[orientation](quarters(size=256))))
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)  # 256 to 16 pixels: JPEG's reduced decoding is at work too
    assert_quarters(decode_image(tmp_path / "a.jpg", 16), RED, GREEN, BLUE, WHITE, tolerance=6)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50,
                   **({"lossless": True} if name == "a.webp" else {}))
    assert Image.open(tmp_path / name).n_frames == 3
    assert_quarters(decode_image(tmp_path / name, 16), *[RED] * 4)


@pytest.mark.parametrize("width, height", [(1, 1), (1, 70), (70, 1), (3, 1000), (17, 31), (400, 30)])
def test_odd_shapes(tmp_path, width, height):
    Image.new("RGB", (width, height), (10, 200, 60)).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png", 32)
    assert decoded.shape == (3, 32, 32)
    assert_quarters(decoded, *[(10, 200, 60)] * 4, tolerance=0)


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_is_cut_out(tmp_path, turned):
    side = np.zeros((64, 40, 3), np.uint8)
    wide = np.concatenate([side, quarters(size=64), side], axis=1)
    if turned:
        wide = wide.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(wide)).save(tmp_path / "a.png")
    expected = (RED, BLUE, GREEN, WHITE) if turned else (RED, GREEN, BLUE, WHITE)
    decoded = decode_image(tmp_path / "a.png", 32)
    assert_quarters(decoded, *expected)
    assert abs(decoded[:, 2:14, 0].astype(int) - np.array(RED)[:, None]).max() < 60  # nothing of the black sides


def test_scaling_down_is_antialiased(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    for name in ("a.png", "a.jpg"):
        Image.fromarray(stripes).save(tmp_path / name)
        decoded = decode_image(tmp_path / name, 16).astype(int)
        assert np.abs(decoded[:, :, 2:-2] - 127).max() < 12  # picking pixels would give 0 or 255


def test_jpeg_decoded_at_a_reduced_size_is_as_sharp(tmp_path):
    tiles = Image.fromarray(np.kron(np.indices((32, 32)).sum(0) % 2 * 255, np.ones((8, 8))).astype(np.uint8))
    tiles.save(tmp_path / "a.png")
    tiles.save(tmp_path / "a.jpg", quality=95)
    for size in (16, 64, 100):  # 256 pixels decode to 32, 128 and 256
        png, jpg = (decode_image(tmp_path / name, size).astype(int) for name in ("a.png", "a.jpg"))
        assert np.abs(png - jpg).mean() < 4


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, before our error
def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    decode_image(tmp_path / "a.png", 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1600 pixels: Pillow itself would only warn
    with pytest.raises(Image.DecompressionBombError, match="too many"):
        decode_image(tmp_path / "a.png", 16)


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_find_images_order_and_what_is_left_out(tmp_path):
    wanted = ["B/2.PNG", "a.jpg", "a/z.png", "b/c/d.WebP", "b/c/e.gif", "c.bmp", "d.jpeg"]
    for name in reversed(wanted + [".hidden.png", ".cache/a.png", "b/._a.png", "notes.txt", "labels.csv", "x.png.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == wanted
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_find_images_within_a_hidden_folder(tmp_path):
    write_folder(tmp_path / ".data", 1)
    assert len(find_images(tmp_path / ".data")) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_find_images_follows_links_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert [path.name for path in find_images(tmp_path / "data")] == ["000.png", "001.png"]


def test_folder_errors_are_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    for folder, what in [("missing", "no folder"), ("a.txt", "is a file"), ("", "no image")]:
        with pytest.raises(DataError, match=what) as error:
            ImageFolder(tmp_path / folder, 16)
        assert str(tmp_path / folder) in str(error.value) and "\n" not in str(error.value)


def break_files(folder: Path) -> list[str]:
    """Add four files that look like images and are not; return their names."""
    Image.fromarray(quarters(size=200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "000_cut.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "001_empty.png").touch()
    (folder / "003_text.jpg").write_text("this is no picture\n" * 20)
    (folder / "004_noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return ["000_cut.jpg", "001_empty.png", "003_text.jpg", "004_noise.png"]


def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    write_folder(tmp_path, 6)
    bad = break_files(tmp_path)
    dataset = ImageFolder(tmp_path, 16)
    assert [path.name for path in dataset.files] == [f"{i:03d}.png" for i in range(6)]
    assert dataset.left_out == 4 and len(dataset) == 6 and dataset.images.shape == (6, 3, 16, 16)
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 7, 14, 21, 28, 35]  # each image still belongs to its file
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(name in line for name, line in zip(bad, lines))


def test_at_most_ten_broken_files_are_named(tmp_path, capsys):
    write_folder(tmp_path, 2)
    for i in range(13):
        (tmp_path / f"bad{i:02d}.jpg").touch()
    assert len(ImageFolder(tmp_path, 16)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 11 and "bad09.jpg" in lines[9] and "3 more" in lines[10]


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_no_usable_image(tmp_path, memory_limit):
    break_files(tmp_path)
    with pytest.raises(DataError, match="none of the 4"):
        ImageFolder(tmp_path, 16, memory_limit)


def test_in_memory_and_as_needed_are_equal(tmp_path):
    write_folder(tmp_path, 5, size=20)
    Image.fromarray(quarters(size=100)).save(tmp_path / "q.jpg")
    need = 6 * 3 * 16 * 16
    kept, read = ImageFolder(tmp_path, 16, memory_limit=need), ImageFolder(tmp_path, 16, memory_limit=need - 1)
    assert kept.images is not None and read.images is None
    assert kept.files == read.files and len(kept) == len(read) == 6
    for i in range(6):
        assert kept[i][0].dtype == read[i][0].dtype == torch.uint8 and torch.equal(kept[i][0], read[i][0])
    assert torch.equal(kept.__getitems__([4, 5, 0, 4])[0], read.__getitems__([4, 5, 0, 4])[0])
    assert torch.equal(read.__getitems__([4, 5])[0][1], torch.from_numpy(decode_image(tmp_path / "q.jpg", 16)))
    for dataset in (kept, read):
        with pytest.raises(IndexError):
            dataset[6]


def test_as_needed_a_broken_file_is_replaced_by_the_next(tmp_path, capsys):
    write_folder(tmp_path, 5)
    (tmp_path / "002.png").write_bytes(b"")
    (tmp_path / "004.png").write_bytes(b"")
    dataset = ImageFolder(tmp_path, 16, memory_limit=0)
    assert [int(dataset[i][0][0, 0, 0]) for i in [0, 1, 2, 3, 4, 2]] == [0, 7, 21, 21, 0, 21]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "002.png" in lines[0] and "004.png" in lines[1]  # once each


def test_from_array():
    array = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for images in (array, array.transpose(0, 3, 1, 2), torch.from_numpy(array)):
        dataset = ImageFolder.from_array(images)
        assert len(dataset) == len(dataset.files) == 4 and dataset.image_size == 16
        assert np.array_equal(dataset[2][0].numpy(), array[2].transpose(2, 0, 1))
    for wrong in (array.astype(np.float32), array[..., 0], array[:, :8], array[:0]):
        with pytest.raises(ValueError):
            ImageFolder.from_array(wrong)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images", 3)
    (tmp_path / "images/bad.jpg").touch()
    assert call(data, "images", "--image_size", 16) == 0
    said = capsys.readouterr().out
    assert "3 images" in said and "1 files left out" in said
    assert Image.open("outputs/augmentation.png").size == (8 * 18, 8 * 18)
    assert_one_line(call(data, "missing"), capsys, "no folder missing")


# ---------------------------------------------------------------------------------------------------------------------
# order


def test_seed_from():
    inputs = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (5, 1), (5 + 2**32,), (2**64 - 1, 3), (-2, 3), (-3, 3)]
    seeds = [data.seed_from(*integers) for integers in inputs]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert data.seed_from(np.int32(-5), torch.tensor(1)) == data.seed_from(-5, 1)
    assert data.seed_from(1, 2) == 4013407976395716621  # the same in every version, or old runs would not resume


@pytest.mark.parametrize("num_images, batch_size", [(10, 4), (12, 4), (3, 8), (1, 4), (7, 1)])
def test_every_epoch_visits_every_image(num_images, batch_size):
    batches = ShuffledBatches(num_images, batch_size, seed=3, last_step=1000)
    steps = batches.steps_per_epoch
    assert steps == -(-num_images // batch_size)
    for epoch in range(3):
        epoch_batches = [batches.batch(epoch * steps + k) for k in range(steps)]
        assert all(len(batch) == batch_size for batch in epoch_batches)
        visits = np.bincount(np.concatenate(epoch_batches), minlength=num_images)
        assert len(visits) == num_images and visits.min() >= 1 and visits.max() <= visits.min() + 1


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        return ShuffledBatches(50, 50, seed).batch(number)

    orders = [tuple(epoch(seed, number)) for seed in range(4) for number in range(4)]
    assert len(set(orders)) == 16 and tuple(range(50)) not in orders
    torch.manual_seed(123)
    assert tuple(epoch(0, 0)) == orders[0]  # nothing but (seed, epoch) matters


def test_a_resumed_run_sees_the_same_batches():
    whole = list(ShuffledBatches(10, 4, seed=1, first_step=0, last_step=20))
    for first in (1, 3, 7, 20):
        assert list(ShuffledBatches(10, 4, seed=1, first_step=first, last_step=20)) == whole[first:]
    batches = ShuffledBatches(10, 4, seed=1, last_step=20)
    assert [batches.batch(step) for step in reversed(range(20))] == whole[::-1]
    assert len(batches) == 20 and list(batches) == list(batches) == whole
    endless = iter(ShuffledBatches(10, 4, seed=1))
    assert [next(endless) for _ in range(20)] == whole


def test_loader_is_the_same_for_any_number_of_workers(tmp_path):
    write_folder(tmp_path, 9)
    (tmp_path / "004.png").write_bytes(b"")

    def batches(first, workers, memory_limit=0):
        return [images for images, _ in make_loader(ImageFolder(tmp_path, 16, memory_limit), 4, 5, first, 7, workers)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = batches(0, 0)
    assert len(alone) == 7 and all(batch.shape == (4, 3, 16, 16) and batch.dtype == torch.uint8 for batch in alone)
    assert len({tuple(batch[:, 0, 0, 0].tolist()) for batch in alone}) == 7
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(0, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[3:], batches(3, 2), strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # a loader does not disturb the training's random numbers

    (tmp_path / "004.png").unlink()
    read, kept = batches(0, 0), batches(0, 2, memory_limit=None)
    assert all(torch.equal(a, b) for a, b in zip(read, kept, strict=True))
