"""Images as files: decoding of every format and colour mode; grids, GIFs, recorded settings; PSNR and SSIM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.images import (
    LONGEST_SIDE,
    SUFFIXES,
    decode_error,
    decode_image,
    enlarge,
    image_grid,
    psnr,
    read_settings,
    save_gif,
    save_image,
    square_grid,
    ssim,
    to_pil,
    to_uint8,
)

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


# ---------------------------------------------------------------------------------------------------------------------
# tensors


def test_to_uint8_rounds_to_the_nearest():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    assert torch.equal(to_uint8((levels / 127.5 - 1).bfloat16()), to_uint8((levels / 127.5 - 1).bfloat16().float()))


def test_to_pil_and_enlarge():
    pixels = torch.randint(0, 256, (3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert np.array_equal(np.asarray(to_pil(pixels)), pixels.permute(1, 2, 0).numpy())
    large = enlarge(pixels, 3)
    assert large.shape == (3, 12, 15) and all(large[:, i::3, j::3].equal(pixels) for i in range(3) for j in range(3))
    assert enlarge(pixels, 1).equal(pixels)


def test_psnr():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    assert psnr(images, images).tolist() == [120, 120]  # the cap
    torch.testing.assert_close(psnr(images + 0.02, images), torch.full((2,), 40.0), rtol=0, atol=1e-3)


def test_ssim():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 24, 24, generator=generator) * 2 - 1
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    noise = torch.randn(images.shape, generator=generator)
    values = [ssim(images + level * noise, images) for level in (0.05, 0.2, 0.8)]
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all() and values[2].max() < 0.8
    # Of constant images only the means' factor is left: (2 a b + c_1) / (a^2 + b^2 + c_1).
    grey = ssim(torch.full((1, 3, 16, 16), 0.0), torch.full((1, 3, 16, 16), 0.5))
    assert grey.item() == pytest.approx((2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# grids


def test_a_grid_is_made_of_its_images():
    pixels = torch.randint(0, 200, (5, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for scale in (1, 2):
        grid = np.asarray(image_grid(pixels, columns=3, scale=scale))
        side, gap = 6 * scale, 2 * scale
        assert grid.shape == (2 * side + 3 * gap, 3 * side + 4 * gap, 3)
        for i, image in enumerate(enlarge(pixels, scale).permute(0, 2, 3, 1).numpy()):
            top, left = gap + i // 3 * (side + gap), gap + i % 3 * (side + gap)
            assert np.array_equal(grid[top : top + side, left : left + side], image)
        assert (grid[:gap] == 255).all() and (grid[-side:, -side:] == 255).all()  # the sixth place is empty


def test_row_names_stand_beside_their_rows():
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    plain, named = image_grid(pixels, 2), image_grid(pixels, 2, row_names=["fire", "electric"])
    margin = np.asarray(named)[:, : named.width - plain.width].astype(int)
    assert np.array_equal(np.asarray(named)[:, named.width - plain.width :], np.asarray(plain))
    ink = [(255 - margin[18 * row : 18 * row + 18]).sum() for row in range(2)]
    assert margin.shape[0] == plain.height and ink[1] > ink[0] > 0  # the longer name has more ink
    assert (margin[:, -6:] == 255).all()  # no name touches its row


def test_square_grid():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert np.array_equal(np.asarray(square_grid(images)), np.asarray(image_grid(to_uint8(images), columns=3)))
    assert square_grid(images[:4]).size == (2 * 10 + 2, 2 * 10 + 2) and square_grid(images[:1]).size == (8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_a_png_records_its_settings(tmp_path):
    settings = dict(seed=2**62, types="fire flying", guidance=3.0, interpolate=[3, 8], name="é 日")
    image = Image.new("RGB", (4, 4), RED)
    save_image(image, tmp_path / "new folder/a.png", **settings)
    assert read_settings(tmp_path / "new folder/a.png") == settings
    save_image(image, tmp_path / "b.jpg", **settings)
    image.save(tmp_path / "c.png")
    assert read_settings(tmp_path / "b.jpg") == read_settings(tmp_path / "c.png") == {}


@pytest.mark.parametrize("suffix", [suffix for suffix in LONGEST_SIDE if suffix != ".gif"] + [".PNG", ".JPG"])
def test_every_format_of_a_grid_can_be_written(tmp_path, suffix):
    save_image(Image.fromarray(quarters()), tmp_path / f"grid{suffix}")
    assert_quarters(decode_image(tmp_path / f"grid{suffix}", 16), RED, GREEN, BLUE, WHITE, tolerance=40)
    assert [path.name for path in tmp_path.iterdir()] == [f"grid{suffix}"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    for name in ("a.png", "a.gif"):
        (tmp_path / name).write_bytes(b"an older file")
    monkeypatch.setattr(Image.Image, "save", fail)
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    for write in (lambda: save_image(frames[0], tmp_path / "a.png"), lambda: save_gif(frames, tmp_path / "a.gif")):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.png": b"an older file", "a.gif": b"an older file"}


def test_a_gif_keeps_the_colours_of_both_ends(tmp_path):
    """Though all frames share one palette."""
    ramp = torch.linspace(0, 1, 12).view(-1, 1, 1, 1)
    red, blue = (torch.tensor(colour).view(1, 3, 1, 1) for colour in ((240.0, 30, 20), (20.0, 60, 220)))
    shade = torch.linspace(0.5, 1, 64).view(1, 1, 8, 8)
    frames = [image_grid(frame[None].to(torch.uint8), columns=1) for frame in (red + ramp * (blue - red)) * shade]
    walk = frames + frames[-2:0:-1]
    save_gif(walk, tmp_path / "walk.gif")
    film = Image.open(tmp_path / "walk.gif")
    for i in range(film.n_frames):
        film.seek(i)
        difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(walk[i])
        assert np.abs(difference).mean() < 12, i


def test_the_timing_of_a_gif(tmp_path):
    def durations(seconds, hold, count=3):
        ramp = torch.arange(0, 192, 3, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, -1, -1)
        # In one palette, but not the same, or Pillow would merge them.
        frames = [image_grid(ramp.roll(turn, dims=-1), columns=1) for turn in range(count)]
        save_gif(frames, tmp_path / "a.gif", seconds=seconds, hold=hold)
        film, found = Image.open(tmp_path / "a.gif"), []
        assert film.info["loop"] == 0
        for i in range(film.n_frames):
            film.seek(i)
            found.append(film.info["duration"])
        return found

    assert durations(0.6, 1.0) == [200, 200, 1200]
    assert durations(0.001, 0.0) == [20, 20, 20]  # browsers slow down what is below
    assert durations(4.0, 2.0, count=2) == [2000, 4000] and len(durations(4.0, 2.0, count=1)) == 1
