"""Decoding of image files: every format and colour mode, transparency, rotation, shape, reduced size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from utils.images import SUFFIXES, decode_error, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(top_left=RED, top_right=GREEN, bottom_left=BLUE, bottom_right=WHITE, size=32) -> np.ndarray:
    """An image [size, size, 3] whose quarters have four colours, so that any rotation or mirroring shows."""
    image, half = np.empty((size, size, 3), np.uint8), size // 2
    image[:half, :half], image[:half, half:] = top_left, top_right
    image[half:, :half], image[half:, half:] = bottom_left, bottom_right
    return image


def quarter_colours(decoded: np.ndarray) -> np.ndarray:
    """The colours [4, 3] at the centres of the four quarters of a decoded image [3, S, S]."""
    a, b = decoded.shape[1] // 4, decoded.shape[1] * 3 // 4
    return np.stack([decoded[:, a, a], decoded[:, a, b], decoded[:, b, a], decoded[:, b, b]]).astype(int)


def assert_quarters(decoded: np.ndarray, *expected, tolerance=2) -> None:
    assert np.abs(quarter_colours(decoded) - np.array(expected)).max() <= tolerance, quarter_colours(decoded)


@pytest.mark.parametrize("name, options, tolerance", [
    ("a.png", {}, 2), ("a.bmp", {}, 2), ("a.gif", {}, 2), ("a.jpg", {"quality": 95}, 6), ("a.JPEG", {"quality": 95}, 6),
    ("a.webp", {"lossless": True}, 2)])
def test_formats(tmp_path, name, options, tolerance):
    Image.fromarray(quarters()).save(tmp_path / name, **options)
    assert name.lower().endswith(SUFFIXES)
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
    rgba[:16, 16:, 3] = 0  # green: fully transparent
    rgba[16:, :16, 3] = 128  # blue: half
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
    image = Image.fromarray(np.kron([[0, 1], [2, 3]], np.ones((16, 16))).astype(np.uint8))
    image.putpalette([*RED, *GREEN, *BLUE, 0, 0, 0])
    image.save(tmp_path / name, transparency=1)
    assert Image.open(tmp_path / name).mode == "P"
    assert_quarters(decode_image(tmp_path / name, 16), RED, WHITE, BLUE, (0, 0, 0))


# The image as it is stored, for each value of EXIF's orientation tag (EXIF 2.3, section 4.6.4).
EXIF_STORED = {1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
               5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, 1),
               7: lambda p: p[::-1, ::-1].transpose(1, 0, 2), 8: lambda p: np.rot90(p, -1)}


@pytest.mark.parametrize("orientation", EXIF_STORED)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(EXIF_STORED[orientation](quarters(size=256))))
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)  # 256 to 16 pixels: decoded at a reduced size
    assert_quarters(decode_image(tmp_path / "a.jpg", 16), RED, GREEN, BLUE, WHITE, tolerance=6)


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
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


@pytest.mark.parametrize("transposed", [False, True])
def test_the_centre_is_cropped(tmp_path, transposed):
    side = np.zeros((64, 40, 3), np.uint8)
    wide = np.concatenate([side, quarters(size=64), side], axis=1)
    if transposed:
        wide = wide.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(wide)).save(tmp_path / "a.png")
    expected = (RED, BLUE, GREEN, WHITE) if transposed else (RED, GREEN, BLUE, WHITE)
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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own warning comes before our error
def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    decode_image(tmp_path / "a.png", 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1600 pixels: Pillow itself would only warn
    with pytest.raises(Image.DecompressionBombError, match="too many"):
        decode_image(tmp_path / "a.png", 16)


def test_errors_are_explained_on_one_line(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for path, words in ((tmp_path / "text.png", "not an image, or an empty file"),
                        (tmp_path / "missing.png", "not a file, or a link to nowhere")):
        with pytest.raises(OSError) as error:
            decode_image(path, 16)
        assert decode_error(error.value) == words
    assert decode_error(ValueError("two\nlines")) == "two" and decode_error(ValueError("\x1b[2J")) == "\\x1b[2J"
    assert decode_error(ValueError()) == "ValueError"
