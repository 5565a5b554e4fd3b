"""The drawn creatures: the same for the same seed, clean at the border, with types that their colours tell."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from critters import PALETTES, TYPES, contact_sheet, draw_critter, draw_critters, write_critters  # noqa: E402

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


def test_same_seed_same_picture_and_another_seed_another() -> None:
    first, types = draw_critter(5, 64, seed=11)
    again, types_again = draw_critter(5, 64, seed=11)
    other, _ = draw_critter(5, 64, seed=12)
    assert first.mode == "RGB" and first.size == (64, 64)
    assert first.tobytes() == again.tobytes() and types == types_again
    assert first.tobytes() != other.tobytes()


def test_a_picture_depends_on_its_index_alone(folder_of_200) -> None:
    images, types = folder_of_200
    np.random.seed(0)                   # the global state must not matter
    for index in (199, 0, 57):
        image, of_image = draw_critter(index, 32, seed=3)
        assert np.array_equal(np.asarray(image), images[index]) and of_image == types[index]


@pytest.mark.parametrize("image_size", [8, 16, 31, 64])
def test_border_is_pure_white_and_the_creature_fills_the_frame(image_size: int) -> None:
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


def test_no_two_creatures_are_alike(folder_of_200) -> None:
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


def test_contact_sheet_has_a_row_for_each_type() -> None:
    sheet = contact_sheet(image_size=16, columns=4)
    assert sheet.mode == "RGB" and sheet.height >= 16 * len(TYPES) and sheet.width >= 16 * 4


def run_script(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "critters.py"), *flags], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


def test_command_line(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--count", "3", "--image_size", "16", "--output", "data/few")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "data/few").iterdir()) == [
        "critter_00000.png", "critter_00001.png", "critter_00002.png", "labels.csv"]
    assert (tmp_path / "outputs/critters.png").is_file()


@pytest.mark.parametrize("flags", [("--count", "0"), ("--image_size", "7"), ("--seed", "-1"), ("--output", "a_file"),
                                   ("--output", "a_file/below")])
def test_bad_input_ends_with_one_line(tmp_path: Path, flags: tuple[str, str]) -> None:
    (tmp_path / "a_file").write_text("not a folder")
    done = run_script(tmp_path, "--count", "1", *flags)
    assert done.returncode != 0 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and flags[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_the_labels_of_other_pictures_are_left_alone(tmp_path):
    (tmp_path / "labels.csv").write_text("file,types\nmine.png,fire\n")
    done = subprocess.run([sys.executable, ROOT / "critters.py", "--count", "1", "--output", tmp_path], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "labels.csv" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "labels.csv").read_text() == "file,types\nmine.png,fire\n"
