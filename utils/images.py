"""Images as files: decoding, grids with row names, animations, and PNGs that record how they were made.

    save_image(image_grid(to_uint8(images), columns=8), "outputs/generated.png", seed=7, sampler="ddim")
    save_gif([image_grid(frame, columns=8) for frame in frames], "outputs/generated.gif")
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from utils.archive import ZipMember
from utils.errors import printable
from utils.files import replacing

# Suffixes of the files that are read as images.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# Pillow goes by the content of a file. Only these decoders may run: some others start external programs.
DECODERS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
# Suffixes of the files that a grid can be written to, with the longest side in pixels that each format can hold.
LONGEST_SIDE = {".png": 2**16, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode_image refuses what Pillow only warns of


# ---------------------------------------------------------------------------------------------------------------------
# reading


def decode_image(path: str | Path | ZipMember, image_size: int) -> np.ndarray:
    """Read an image file as uint8 RGB `[3, image_size, image_size]`.

    The shorter side is scaled to `image_size` with antialiasing, and the centre is cropped. Transparent parts become
    white, the EXIF rotation is applied, 16-bit grey is scaled to 8 bits, and an animation gives its first frame.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read; DecompressionBombError for one of more than
            Image.MAX_IMAGE_PIXELS pixels.
    """
    if not isinstance(path, ZipMember) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a file, or a link to nowhere", str(path))
    with open_image(path) as image:
        # Pillow only warns up to twice its limit, and a warning filter is not thread-safe.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
        # JPEG can decode at 1/2, 1/4 or 1/8 of its size for less work; twice image_size is left for the antialiasing.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255, to white
            grey = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def open_image(path: str | Path | ZipMember) -> Image.Image:
    """Open an image file of one of the formats that are read, without decoding it."""
    return Image.open(path.open() if isinstance(path, ZipMember) else path, formats=DECODERS)


def upright_size(path: str | Path) -> tuple[int, int]:
    """Return width and height of an image file in pixels, after its EXIF rotation."""
    with open_image(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def decode_error(error: Exception) -> str:
    """Say on one line why `decode_image` failed."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or an empty file"  # Pillow's own message repeats the path
    return printable((getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0])


def read_settings(path: str | Path | ZipMember) -> dict:
    """Return the settings that `save_image` wrote into a PNG; empty for any other image."""
    with open_image(path) as image:
        return json.loads(image.info.get("PokeDiff", "{}"))


# ---------------------------------------------------------------------------------------------------------------------
# tensors


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert images [..., 3, H, W] in [-1, 1], clipped to that range, to uint8 of the same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Convert uint8 [3, H, W] to a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def enlarge(pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """Repeat each pixel of [..., H, W] as a square of scale x scale."""
    return pixels.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image [B, 3, H, W] in [-1, 1]; capped at 120."""
    error = ((images - originals) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()


def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image [B, 3, H, W] in [-1, 1] to its original, at most 1 (Wang et al. 2004).

    Per colour channel, with their Gaussian window of 11 x 11 pixels and standard deviation 1.5.
    """
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).to(images)

    def blur(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], window.view(1, 1, 1, 11))
        return F.conv2d(x, window.view(1, 1, 11, 1)).unflatten(0, images.shape[:2])

    x, y = (images + 1) / 2, (originals + 1) / 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c_1, c_2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
                  / ((mean_x**2 + mean_y**2 + c_1) * (variance_x + variance_y + c_2)))
    return similarity.mean(dim=(1, 2, 3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# writing


def image_grid(pixels: torch.Tensor, columns: int, scale: int = 1, row_names: Sequence[str] = ()) -> Image.Image:
    """Arrange images, uint8 [N, 3, H, W], in rows on white, each row with its name on the left if there are any.

    Two pixels, times `scale`, separate the images.
    """
    sheet = to_pil(make_grid(enlarge(pixels, scale), nrow=columns, padding=2 * scale, pad_value=255))
    if not row_names:
        return sheet
    row_height = (pixels.shape[-2] + 2) * scale
    font = ImageFont.load_default(size=max(10, min(20, row_height // 3)))
    margin = max(round(font.getlength(name)) for name in row_names) + 12
    named = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    named.paste(sheet, (margin, 0))
    pen = ImageDraw.Draw(named)
    for row, name in enumerate(row_names):
        pen.text((6, row * row_height + scale + row_height / 2), name, fill=(40, 40, 40), font=font, anchor="lm")
    return named


def square_grid(images: torch.Tensor) -> Image.Image:
    """Arrange images [N, 3, H, W] in [-1, 1] in a grid that is as near to a square as N allows."""
    return image_grid(to_uint8(images), columns=math.ceil(math.sqrt(len(images))))


def save_image(image: Image.Image, path: str | Path, **settings) -> None:
    """Write an image; a PNG also records `settings`, which image viewers show and `read_settings` reads."""
    info = None
    if Path(path).suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt("PokeDiff", json.dumps(settings))
    with replacing(path) as temporary:
        image.save(temporary, pnginfo=info)


def save_images(images: torch.Tensor, folder: str | Path) -> Path:
    """Write images, uint8 [N, 3, H, W], as 00000.png ..., less those that are there already; return the folder."""
    folder = Path(folder)
    for i, image in enumerate(images):
        if not (folder / f"{i:05d}.png").exists():
            save_image(to_pil(image), folder / f"{i:05d}.png")
    return folder


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 4.0, hold: float = 2.0) -> None:
    """Write an endless GIF that plays for `seconds` and holds its last frame for `hold` more."""
    # One palette for all frames, or colours would flicker: that of some frames side by side.
    chosen = [*frames[:: math.ceil(len(frames) / 8)], frames[-1]]
    together = Image.new("RGB", (chosen[0].width * len(chosen), chosen[0].height))
    for i, frame in enumerate(chosen):
        together.paste(frame, (i * frame.width, 0))
    palette = together.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = max(20, round(1000 * seconds / len(frames)))  # milliseconds; browsers slow down what is below 20
    durations = [duration] * (len(frames) - 1) + [duration + round(1000 * hold)]
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
