"""python -m tools.preview_data: counts, and a grid of augmented images."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import assert_one_line, call

from tools import preview_data
from training.dataset import load_images

pytestmark = pytest.mark.usefixtures("own_folder")


def write_images(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 24), 80).convert("RGB").save(name)


def test_counts_and_grid(capsys):
    write_images("images/fire/1.png", "images/fire/2.png", "images/ice/3.png")
    Path("images/bad.jpg").touch()
    assert call(preview_data, "images", "--image_size", 16) == 0
    output = capsys.readouterr().out
    assert "3 images in images, 1 files left out" in output and "     2 fire\n     1 ice\n" in output
    grid = np.asarray(Image.open("outputs/augmentation.png"))
    assert grid.shape == (8 * 18 + 2, 8 * 18 + 2, 3)
    tiles = grid[2:, 2:].reshape(8, 18, 8, 18, 3).transpose(0, 2, 1, 3, 4)[:, :, :16, :16]
    plain = {tile.tobytes() for tile in tiles[:, 0]}
    assert len(plain) == 3 and len({tile.tobytes() for tile in tiles[:, 1:].reshape(-1, 16, 16, 3)}) > 20

    assert call(preview_data, "images", "--image_size", 16, "--output", "again.png") == 0
    assert call(preview_data, "images", "--image_size", 16, "--output", "other.png", "--seed", 1) == 0
    assert np.array_equal(grid, Image.open("again.png")) and not np.array_equal(grid, Image.open("other.png"))


def test_critters(capsys, monkeypatch):
    monkeypatch.setattr(preview_data, "load_images", functools.partial(load_images, num_critters=10))
    assert call(preview_data, "critters", "--image_size", 8, "--output", "critters.jpg") == 0
    assert "10 images in critters, 0 files left out" in capsys.readouterr().out


def test_errors_are_one_line(capsys):
    assert_one_line(call(preview_data), capsys, "no folder data/pokemon_jpg")
    assert_one_line(call(preview_data, "missing"), capsys, "no folder missing")
    write_images("images/1.png")
    for output in ("grid.txt", "grid"):
        assert_one_line(call(preview_data, "images", "--output", output), capsys, "--output must end in", output)
    assert_one_line(call(preview_data, "images", "--image_size", 7), capsys, "--image_size must be at least 8")
    Path("file").touch()
    code = call(preview_data, "images", "--output", "file/grid.png")
    capsys.readouterr()
    assert_one_line(code, capsys, "file")
