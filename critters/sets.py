"""Sets of critters: as arrays, as a folder with labels.csv, as a contact sheet; and those that nobody trains on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from critters.critter_types import TYPES
from critters.draw import WHITE, draw_critter

# Critters for measurements on what a model has not seen: each purpose has a seed of its own, far away from those that
# people choose for training sets.
UNSEEN_SEEDS = dict(recognizer=1_000_003, samplers=2_000_003, evaluation=3_000_003, autoencoder=4_000_003)


def draw_critters(count: int, image_size: int = 64, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Draw critters 0 ... count-1: uint8 [count, image_size, image_size, 3], and the types of each."""
    drawn = [draw_critter(index, image_size, seed) for index in range(count)]
    return np.stack([np.asarray(image) for image, _ in drawn]), [types for _, types in drawn]


def unseen_critters(purpose: str, count: int, image_size: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Draw critters that no model was trained on, as `draw_critters` does; `purpose` is a key of UNSEEN_SEEDS."""
    return draw_critters(count, image_size, UNSEEN_SEEDS[purpose])


def write_critters(folder: str | Path, count: int, image_size: int = 64, seed: int = 0) -> None:
    """Write critter_00000.png ... and labels.csv (columns file,types; two types are separated by a space).

    metadata.csv is the same table as Hugging Face's imagefolder reads it, with the columns file_name,types.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("critter_" + 5 * "[0-9]" + ".png"):  # images of a larger set would stay, without labels
        old.unlink()
    rows = []
    for index in range(count):
        image, types = draw_critter(index, image_size, seed)
        image.save(folder / f"critter_{index:05d}.png")
        rows.append([f"critter_{index:05d}.png", " ".join(types)])
    for name, column in (("labels.csv", "file"), ("metadata.csv", "file_name")):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([[column, "types"], *rows])


def contact_sheet(image_size: int = 64, seed: int = 0, columns: int = 10) -> Image.Image:
    """Draw a row of critters for each type, its name on the left; the last third of the columns adds a second type."""
    gap, margin = max(2, image_size // 16), 64
    cell = image_size + gap
    sheet = Image.new("RGB", (margin + columns * cell, len(TYPES) * cell + gap), WHITE)
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(TYPES):
        y = gap + row * cell
        pen.text((gap, y + image_size // 2 - 6), name, fill=(40, 40, 40))
        for column in range(columns):
            second = TYPES[(row + 1 + column % (len(TYPES) - 1)) % len(TYPES)]
            types = (name, second) if column >= columns - columns // 3 else (name,)
            image, _ = draw_critter(row * columns + column, image_size, seed, types)
            sheet.paste(image, (margin + column * cell, y))
    return sheet
