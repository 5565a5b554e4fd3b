"""From tensors to files: grids with names at their side, animations, and pictures that know how they were made.

    save_picture(grid(images, columns=8), "outputs/generated.png", seed=7, sampler="ddim")
    save_animation([grid(x_t, columns=8) for x_t in frames], "outputs/generated.gif")
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

# Of the files that a grid can be written to, with the longest side in pixels that each format can hold.
LONGEST_SIDE = {".png": 2**16, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images [..., 3, H, W] in [-1, 1] as uint8 of the same shape; what is outside of the range is cut off."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """One picture, uint8 [3, H, W], for Pillow."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def enlarge(pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """Each pixel of [..., H, W] as a square of scale x scale."""
    return pixels.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)


def grid(pixels: torch.Tensor, columns: int, scale: int = 1, row_names: Sequence[str] = ()) -> Image.Image:
    """Pictures, uint8 [N, 3, H, W], in rows on white, each row with its name on the left where there are any."""
    sheet = to_image(make_grid(enlarge(pixels, scale), nrow=columns, padding=2 * scale, pad_value=255))
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


def save_picture(image: Image.Image, path: str | Path, **settings) -> None:
    """Write a picture; a PNG also gets how it was made, as text that image viewers show and `read_settings` reads."""
    info = None
    if Path(path).suffix.lower() == ".png":
        info = PngInfo()
        info.add_itxt("PokeDiff", json.dumps(settings))
    image.save(path, pnginfo=info)


def read_settings(path: str | Path) -> dict:
    """The settings that `save_picture` wrote into a PNG; empty for any other picture."""
    with Image.open(path) as image:
        return json.loads(image.info.get("PokeDiff", "{}"))


def save_animation(frames: Sequence[Image.Image], path: str | Path, seconds: float = 4.0, hold: float = 2.0) -> None:
    """Write an endless GIF that plays for `seconds`, and then stands still on its last frame for `hold` seconds."""
    # One palette for all, since with a palette each the colours would flicker: that of some frames, side by side.
    chosen = [*frames[:: math.ceil(len(frames) / 8)], frames[-1]]
    together = Image.new("RGB", (chosen[0].width * len(chosen), chosen[0].height))
    for i, frame in enumerate(chosen):
        together.paste(frame, (i * frame.width, 0))
    palette = together.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each = max(20, round(1000 * seconds / len(frames)))  # in milliseconds; browsers slow down what is below 20
    durations = [each] * (len(frames) - 1) + [each + round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
