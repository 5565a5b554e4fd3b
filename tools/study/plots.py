"""Plots of a training from its sample grids, which all start from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from training.grids import grids
from utils.images import image_grid, save_gif, save_image

GRID_SIDE = 8  # images in a row of a sample grid, and rows
MARGIN = 2  # white pixels between two images
FRAME_SIDE = 4  # images in a row of a GIF frame
FRAME_SECONDS = 0.15
MIN_IMAGE_SIDE = 64  # smaller images are enlarged


def draw_plots(folder: Path, epochs: Sequence[int]) -> None:
    """Draw stages.png, a row of images for each of these epochs, and training.gif from the grids of a run."""
    sheets = grids(folder)
    drawn = [epoch for epoch in epochs if epoch in sheets]
    if drawn:
        rows = torch.cat([grid_images(sheets[epoch])[:GRID_SIDE] for epoch in drawn])
        sheet = image_grid(rows, GRID_SIDE, _scale(rows), [f"epoch {epoch}" for epoch in drawn])
        save_image(sheet, folder / "stages.png")
    if len(sheets) > 1:
        frames = [_frame(grid_images(path)[:FRAME_SIDE**2], f"epoch {epoch}") for epoch, path in sheets.items()]
        save_gif(frames, folder / "training.gif", seconds=FRAME_SECONDS * len(frames))


def grid_images(path: Path) -> torch.Tensor:
    """Return the images of a sample grid, uint8 [64, 3, S, S]."""
    sheet = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())[MARGIN:, MARGIN:]
    side = len(sheet) // GRID_SIDE
    cells = sheet.view(GRID_SIDE, side, GRID_SIDE, side, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return cells[..., :-MARGIN, :-MARGIN]


def _frame(images: torch.Tensor, title: str) -> Image.Image:
    sheet = image_grid(images, FRAME_SIDE, _scale(images))
    frame = Image.new("RGB", (sheet.width, sheet.height + 20), "white")
    frame.paste(sheet, (0, 20))
    ImageDraw.Draw(frame).text((4, 2), title, fill=(40, 40, 40), font=ImageFont.load_default(size=14))
    return frame


def _scale(images: torch.Tensor) -> int:
    return max(1, MIN_IMAGE_SIDE // images.shape[-1])
