"""The built-in data set: the same for the same seed, clean at the border, with types that their colours tell."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import ROOT, assert_one_line, call

from critters import (
    PALETTES,
    TYPES,
    UNSEEN_SEEDS,
    __main__,
    contact_sheet,
    draw_critter,
    draw_critters,
    unseen_critters,
    write_critters,
)
from critters.critter_types import CRITTER_TYPES, CritterType, Feature, Palette
from critters.shapes import HORN

TYPES_OF_SEED_0 = [("psychic",), ("fairy",), ("dark",), ("grass",), ("fairy",), ("flying", "water")]
COLOURS_OF_SEED_0 = [[204.0, 182.3, 216.3], [227.4, 187.7, 207.9], [174.6, 172.2, 174.1], [186.4, 206.7, 178.2],
                     [229.5, 190.9, 206.3], [178.8, 179.6, 189.9]]  # mean R, G, B of 64x64 images
MAINS = np.array([PALETTES[t].main for t in TYPES], dtype=float)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def chroma(rgb: np.ndarray) -> np.ndarray:
    """Colour without brightness, as a vector [..., 2]: its angle is the hue, its length 0 (grey) ... 1."""
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    return np.stack([r - (g + b) / 2, np.sqrt(3) / 2 * (g - b)], axis=-1)


def nearest_type(rgb: np.ndarray) -> np.ndarray:
    """The index of the type whose main colour is nearest in RGB, for pixels [n, 3]."""
    return ((rgb[:, None] - MAINS) ** 2).sum(axis=-1).argmin(axis=1)


@pytest.fixture(scope="module")
def folder_of_200() -> tuple[np.ndarray, list[tuple[str, ...]]]:
    return draw_critters(200, image_size=32, seed=3)


def test_same_seed_same_image_and_another_seed_another() -> None:
    first, types = draw_critter(5, 64, seed=11)
    again, types_again = draw_critter(5, 64, seed=11)
    other, _ = draw_critter(5, 64, seed=12)
    assert first.mode == "RGB" and first.size == (64, 64)
    assert first.tobytes() == again.tobytes() and types == types_again
    assert first.tobytes() != other.tobytes()


def test_an_image_depends_on_its_index_alone(folder_of_200) -> None:
    images, types = folder_of_200
    np.random.seed(0)                   # the global state must not matter
    for index in (199, 0, 57):
        image, of_image = draw_critter(index, 32, seed=3)
        assert np.array_equal(np.asarray(image), images[index]) and of_image == types[index]


def test_a_seed_keeps_its_critters() -> None:
    """With others, documented results and data sets of old trainings could not be drawn again."""
    images, types = draw_critters(6, 64, seed=0)
    assert types == TYPES_OF_SEED_0
    assert np.abs(images.mean(axis=(1, 2)) - COLOURS_OF_SEED_0).max() < 0.5


@pytest.mark.parametrize("image_size", [8, 16, 31, 64])
def test_border_is_pure_white_and_the_critter_fills_the_frame(image_size: int) -> None:
    images, _ = draw_critters(40, image_size)
    assert images.shape == (40, image_size, image_size, 3) and images.dtype == np.uint8
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        assert (edge == 255).all()
    if image_size < 31:
        return
    for image in images:
        inked = (image != 255).any(axis=-1)
        extents = [np.flatnonzero(inked.any(axis=axis)) for axis in (0, 1)]
        assert max(e[-1] - e[0] + 1 for e in extents) >= 0.8 * image_size
        for e in extents:               # centred to a pixel and a half
            assert abs((e[0] + e[-1]) / 2 - (image_size - 1) / 2) <= 1.5


def test_folder_has_every_type_and_a_third_of_pairs(folder_of_200) -> None:
    _, types = folder_of_200
    assert len(TYPES) >= 8
    assert {t for of_image in types for t in of_image} == set(TYPES)
    assert all(len(set(of_image)) == len(of_image) for of_image in types)
    assert 0.2 < np.mean([len(of_image) == 2 for of_image in types]) < 0.47


def test_no_two_critters_are_alike(folder_of_200) -> None:
    images, _ = folder_of_200
    flat = images.reshape(len(images), -1).astype(np.float32)
    squares = (flat ** 2).sum(axis=1)
    distance = (squares[:, None] + squares - 2 * flat @ flat.T) / flat.shape[1]     # mean square difference, 8-bit
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 25


@pytest.mark.parametrize("name", TYPES)
def test_hue_tells_a_single_type(name: str) -> None:
    """The mean colour of the coloured pixels has the hue of the type's own palette; "dark" is the grey one."""
    colourful = [t for t in TYPES if np.linalg.norm(chroma(np.array(PALETTES[t].main))) > 0.2]
    own = np.array([chroma(np.array(PALETTES[t].main)) for t in colourful])
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    right = 0
    for index in range(40):
        c = chroma(pixels(draw_critter(index, 32, seed=1, types=(name,))[0])).reshape(-1, 2)
        coloured = c[np.linalg.norm(c, axis=1) > 0.15]
        if name not in colourful:
            right += len(coloured) < 0.2 * (32 * 32)
            continue
        right += colourful[int((own @ coloured.mean(axis=0)).argmax())] == name
    assert right >= 38


def test_both_of_two_types_show() -> None:
    """Of the pixels that are near some type's colour, each of the two types has a fair share."""
    shares = []
    for index in range(150):
        a, b = (TYPES[i] for i in np.random.default_rng(index).permutation(len(TYPES))[:2])
        image, types = draw_critter(index, 32, seed=2, types=(a, b))
        assert types == (a, b)
        rgb = pixels(image).reshape(-1, 3)
        near = rgb[((rgb[:, None] - MAINS) ** 2).sum(axis=-1).min(axis=1) < 45 ** 2]
        counts = np.bincount(nearest_type(near), minlength=len(TYPES)) / len(near)
        shares.append(min(counts[TYPES.index(a)], counts[TYPES.index(b)]))
    assert np.mean(np.array(shares) > 0.08) >= 0.95


def test_labels_round_trip(tmp_path: Path) -> None:
    write_critters(tmp_path / "set", 33, image_size=8)         # nothing of a larger, older set stays behind
    write_critters(tmp_path / "set", 30, image_size=16, seed=4)
    images, types = draw_critters(30, image_size=16, seed=4)
    with open(tmp_path / "set" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row["types"].split(" ")) for row in rows] == types
    assert [row["file"] for row in rows] == sorted(p.name for p in (tmp_path / "set").glob("*.png"))
    for row, image in zip(rows, images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / row["file"])), image)


def test_unknown_types_are_refused_with_the_known_ones() -> None:
    for wrong in (("plasma",), (), ("fire", "water", "ice")):
        with pytest.raises(ValueError, match="fairy"):
            draw_critter(0, types=wrong)


def test_unseen_critters_have_a_seed_for_each_purpose() -> None:
    """The seeds are part of published results."""
    assert UNSEEN_SEEDS == dict(recognizer=1_000_003, samplers=2_000_003, evaluation=3_000_003, autoencoder=4_000_003)
    for purpose, seed in UNSEEN_SEEDS.items():
        images, types = unseen_critters(purpose, 3, 16)
        expected, expected_types = draw_critters(3, 16, seed)
        assert np.array_equal(images, expected) and types == expected_types


def test_a_new_type_is_one_entry(monkeypatch) -> None:
    palette = Palette(main=(10, 200, 10), light=(190, 250, 190), dark=(5, 100, 5), accent=(255, 255, 0))
    rock = CritterType(palette, head=(Feature("head", HORN, (20, 25)),), tail=(Feature("rump", HORN, (20, 25)),))
    monkeypatch.setitem(CRITTER_TYPES, "rock", rock)
    for types in (("rock",), ("rock", "fire"), ("fire", "rock")):
        image, drawn_types = draw_critter(0, 32, types=types)
        rgb = pixels(image)
        assert drawn_types == types and (((rgb - palette.main) ** 2).sum(axis=-1) < 60 ** 2).sum() > 20
    with pytest.raises(ValueError, match="unknown anchor 'nose': choose one of head, brow"):
        Feature("nose", HORN, (20, 25))


def test_contact_sheet_has_a_row_for_each_type() -> None:
    sheet = contact_sheet(image_size=16, columns=4)
    assert sheet.mode == "RGB" and sheet.height >= 16 * len(TYPES) and sheet.width >= 16 * 4


def test_command_line(tmp_path: Path) -> None:
    """As a module, from another folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-m", "critters", "--count", "3", "--image_size", "16", "--output",
                           "data/few"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data/few").iterdir()) == [
        "critter_00000.png", "critter_00001.png", "critter_00002.png", "labels.csv", "metadata.csv"]
    assert (tmp_path / "outputs/critters.png").is_file()


@pytest.mark.parametrize("flags", [("--count", "0"), ("--image_size", "7"), ("--seed", "-1"), ("--output", "a_file"),
                                   ("--output", "a_file/below")])
def test_bad_input_ends_with_one_line(own_folder, capsys, flags: tuple[str, str]) -> None:
    Path("a_file").write_text("not a folder")
    assert_one_line(call(__main__, "--count", "1", *flags), capsys, flags[0])
    assert not Path("outputs").exists()


@pytest.mark.parametrize("flags", [("--count", "many"), ("--number", "3"), ("--coun", "3"), ("a_folder",)])
def test_wrong_flags_end_with_one_line(own_folder, capsys, flags: tuple[str, ...]) -> None:
    assert call(__main__, *flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.err.endswith("see python -m critters --help\n")


def test_the_labels_of_other_images_are_left_alone(own_folder, capsys) -> None:
    Path("labels.csv").write_text("file,types\nmine.png,fire\n")
    assert_one_line(call(__main__, "--count", "1", "--output", "."), capsys, "labels.csv of other images")
    assert Path("labels.csv").read_text() == "file,types\nmine.png,fire\n"
