"""The sample grids of a run as files: generated_epoch_0100.png and so on in its folder of outputs."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

GRID_NAME = "generated_epoch_{:04d}.png"


def grid_epoch(path: Path) -> int | None:
    """Return the epoch in the name of a sample grid; None for other files."""
    match = re.fullmatch(r"generated_epoch_(\d+)\.png", path.name)
    return int(match[1]) if match else None


def grids(folder: Path) -> dict[int, Path]:
    """Return the sample grids in a folder by their epochs, which rise."""
    numbered = [(grid_epoch(path), path) for path in folder.glob("generated_epoch_*.png")]
    return dict(sorted(pair for pair in numbered if pair[0] is not None))


def read_grid(path: Path) -> Image.Image | None:
    """Return a sample grid in RGB; None for a file that is missing or no image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
