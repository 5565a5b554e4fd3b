"""Tests of labels.py, and of the labels and the held-out part of dataset.py.

    python -m pytest tests/test_labels.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from critters import TYPES, write_critters  # noqa: E402
from dataset import DataError, ImageFolder, held_out_names, image_names, load_images, make_loader  # noqa: E402
from labels import LabelError, find_labels, multi_hot, parse_types, read_labels  # noqa: E402


def write_pictures(folder: Path, *names: str) -> None:
    """Pictures of the grey levels 10, 20, ... in the order of the names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * (i + 1),) * 3).save(folder / name)


def grey_levels(dataset: ImageFolder) -> list[int]:
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def test_labels_csv(tmp_path):
    write_pictures(tmp_path, "a.png", "deep/b.png", "c.png", "none.png")
    (tmp_path / "labels.csv").write_text("\ufefffile,name,types\nb.png,Bee,Flying  fire flying\na.png,Ay,water\n"
                                         "elsewhere.png,El,ghost\nc.png,See,\n", encoding="utf-8")
    dataset = ImageFolder(tmp_path, 16)
    assert dataset.names == ["a.png", "c.png", "deep/b.png", "none.png"]
    assert dataset.types == ("fire", "flying", "water")  # ghost has no picture here
    assert dataset.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert ImageFolder(tmp_path, 16, labels="none").types == ()
    assert ImageFolder(tmp_path, 16, labels="none").labels.shape == (4, 0)


def test_labels_from_another_file(tmp_path):
    write_pictures(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "mine.csv").write_text("types,file\nice,a.png\n")
    dataset = ImageFolder(tmp_path / "images", 16, labels=str(tmp_path / "mine.csv"))
    assert dataset.types == ("ice",) and dataset.labels.tolist() == [[1], [0]]


def test_labels_from_sub_folders(tmp_path):
    write_pictures(tmp_path, "fire/1.png", "fire/deep/2.png", "water flying/3.png", "4.png")
    assert find_labels(tmp_path, image_names(str(tmp_path))) == [(), ("fire",), ("fire",), ("water", "flying")]
    # The names of sub-folders tell nothing where there is only one of them.
    assert find_labels(tmp_path, ["all/1.png", "all/2.png", "3.png"]) is None
    assert find_labels(tmp_path, ["1.png", "2.png"]) is None
    # A labels.csv comes before the names of sub-folders.
    (tmp_path / "labels.csv").write_text("file,types\n3.png,ice\n")
    assert find_labels(tmp_path, ["fire/1.png", "water flying/3.png"]) == [(), ("ice",)]


@pytest.mark.parametrize("text, message", [
    ("", "no column 'file' and no column 'types'"),
    ("file;types\na.png;fire\n", "no column"),
    ("file,types\na.png,fire\na.png,water\n", "line 3: 'a.png' is there twice"),
    ("file,types\nother.png,fire\n", "names none of the images"),
    ("file,types\na.png,fire/flying\n", "line 2: types in one cell are separated by spaces"),
    ('file,types\na.png,"fire, flying"\n', "separated by spaces"),
    ("file,types\n", "names none of the images"),
])
def test_bad_label_files_are_one_clear_line(tmp_path, text, message):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        ImageFolder(tmp_path, 16)
    assert "labels.csv" in str(error.value) and "\n" not in str(error.value)


def test_unreadable_label_files(tmp_path):
    (tmp_path / "latin.csv").write_bytes("file,types\npokémon.png,fire\n".encode("latin-1"))
    for path, message in ((tmp_path / "missing.csv", "No such file"), (tmp_path, "directory"),
                          (tmp_path / "latin.csv", "UTF-8")):
        with pytest.raises(LabelError, match=message):
            read_labels(path)


def test_parse_types():
    known = ("fire", "flying", "water")
    assert parse_types("Flying  FIRE fire", known) == ("flying", "fire")
    with pytest.raises(ValueError, match="unknown type 'air', 'rock': choose one or more of fire, flying, water"):
        parse_types("fire air rock", known)
    with pytest.raises(ValueError, match="no type given"):
        parse_types("  ", known)
    assert multi_hot([("water", "fire"), ()], known).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_critters_have_the_labels_that_their_folder_has(tmp_path):
    write_critters(tmp_path, 30, 16, seed=5)
    drawn, folder = load_images("critters", 16, num_critters=30, seed=5), ImageFolder(tmp_path, 16)
    assert drawn.types == TYPES and set(folder.types) <= set(TYPES)
    columns = [TYPES.index(name) for name in folder.types]
    assert torch.equal(drawn.labels[:, columns], folder.labels) and drawn.labels.sum() == folder.labels.sum()
    assert torch.equal(drawn.images, folder.images)
    assert load_images("critters", 16, labels="none", num_critters=3).types == ()
    with pytest.raises(DataError, match="leave out --labels my.csv"):
        load_images("critters", 16, labels="my.csv")


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_a_picture_keeps_its_label(tmp_path, memory_limit):
    """Through broken files, what is held out, and any order."""
    names = [f"{i:02d}.png" for i in range(9)]
    write_pictures(tmp_path, *names)
    (tmp_path / "labels.csv").write_text("file,types\n" + "".join(f"{n},t{n[:2]}\n" for n in names))
    (tmp_path / "03.png").write_bytes(b"")
    dataset = ImageFolder(tmp_path, 16, memory_limit, keep=lambda name: name != "05.png")
    assert dataset.types == tuple(f"t{i:02d}" for i in range(9))
    seen = set()
    for images, labels in make_loader(dataset, 4, seed=0, last_step=6):
        assert labels.sum(1).tolist() == [1] * 4
        assert torch.equal(images[:, 0, 0, 0] // 10 - 1, labels.argmax(1))
        seen |= set(labels.argmax(1).tolist())
    assert seen == {0, 1, 2, 4, 6, 7, 8}


def test_held_out_names_do_not_depend_on_the_order_and_hardly_on_the_others():
    names = [f"creature {i}.jpg" for i in range(1000)]
    held = held_out_names(names, 0.1)
    assert len(held) == 100 and held == sorted(held) == held_out_names(names[::-1], 0.1)
    assert held[:3] == ["creature 100.jpg", "creature 105.jpg", "creature 126.jpg"]  # the same on every machine
    assert held_out_names(names, 0.0) == []
    fewer = held_out_names(names[:950], 0.1)
    assert len(fewer) == 95 and len(set(fewer) - set(held)) < 5
    assert len(set(held_out_names(names, 0.2)) & set(held)) == 100
    counts = np.bincount([int(name.split()[1][:-4]) // 250 for name in held_out_names(names, 0.4)])
    assert counts.min() > 70  # spread over all of them


def test_keep_and_what_is_held_out_make_the_whole(tmp_path):
    write_pictures(tmp_path, *(f"{i}.png" for i in range(8)))
    held = set(held_out_names(image_names(str(tmp_path)), 0.25))
    rest, aside = (ImageFolder(tmp_path, 16, keep=keep) for keep in (lambda n: n not in held, lambda n: n in held))
    assert len(rest) == 6 and set(aside.names) == held
    assert sorted(grey_levels(rest) + grey_levels(aside)) == [10 * (i + 1) for i in range(8)]
    with pytest.raises(DataError, match="none of the images wanted"):
        ImageFolder(tmp_path, 16, keep=lambda name: False)


def test_a_file_name_alone_will_do_where_it_is_the_only_one(tmp_path, capsys):
    write_pictures(tmp_path, "x/a.png", "y/a.png", "y/b.png")
    (tmp_path / "labels.csv").write_text("file,types\n./y/a.png,ice\nb.png,fire\n,\n")
    assert ImageFolder(tmp_path, 16).labels.tolist() == [[0, 0], [0, 1], [1, 0]]
    (line,) = capsys.readouterr().err.splitlines()
    assert "says nothing of 1 of the 3 images" in line and "x/a.png" in line
    (tmp_path / "labels.csv").write_text("file,types\na.png,ice\nb.png,\n")  # which a.png?
    assert ImageFolder(tmp_path, 16).types == ()
