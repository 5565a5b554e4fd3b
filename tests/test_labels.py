"""Labels from a csv file and from sub-folders, and how a set of types is parsed and encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from training.dataset import DataError, ImageFolder
from training.folder import DataFolder
from training.labels import BEFORE_METADATA, LabelError, find_labels, multi_hot, parse_types, read_labels
from training.splits import SPLIT_NAMES


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)


def types_in(folder: Path, *names: str, source: str = "auto", splits: str = "auto") -> list[tuple[str, ...]] | None:
    """Write images to an empty folder, and return the types that are found for them."""
    write_images(folder, *names)
    return find_labels(DataFolder(folder), source, splits=splits).types


def test_labels_csv(tmp_path):
    write_images(tmp_path, "a.png", "deep/b.png", "c.png", "none.png")
    (tmp_path / "labels.csv").write_text("\ufefffile,name,types\nb.png,Bee,Flying  fire flying\na.png,Ay,water\n"
                                         "elsewhere.png,El,ghost\nc.png,See,\n", encoding="utf-8")
    dataset = ImageFolder(tmp_path, 16)
    assert dataset.names == ["a.png", "c.png", "deep/b.png", "none.png"]
    assert dataset.class_names == ("fire", "flying", "water")  # ghost has no image here
    assert dataset.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert ImageFolder(tmp_path, 16, label_source="none").class_names == ()
    assert ImageFolder(tmp_path, 16, label_source="none").labels.shape == (4, 0)


def test_labels_from_another_file(tmp_path):
    write_images(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "mine.csv").write_text("types,file\nice,a.png\n")
    dataset = ImageFolder(tmp_path / "images", 16, label_source=str(tmp_path / "mine.csv"))
    assert dataset.class_names == ("ice",) and dataset.labels.tolist() == [[1], [0]]


def test_labels_from_sub_folders(tmp_path):
    names = ("fire/1.png", "fire/deep/2.png", "water flying/3.png", "4.png")
    assert types_in(tmp_path / "a", *names) == [(), ("fire",), ("fire",), ("water", "flying")]
    # The names of sub-folders tell nothing where there is only one of them.
    assert types_in(tmp_path / "b", "all/1.png", "all/2.png", "3.png") is None
    assert types_in(tmp_path / "c", "1.png", "2.png") is None
    # A labels.csv comes before the names of sub-folders, unless these are asked for.
    (tmp_path / "a/labels.csv").write_text("file,types\n3.png,ice\n")
    assert types_in(tmp_path / "a") == [(), (), (), ("ice",)] == types_in(tmp_path / "a", source=BEFORE_METADATA)
    assert types_in(tmp_path / "a", source="folders") == [(), ("fire",), ("fire",), ("water", "flying")]


def test_sub_folders_named_like_splits_that_are_types_are_warned_of(tmp_path, capsys):
    names = ["Train/1.png", "test/2.png", "validation/deep/3.png", "4.png"]
    assert types_in(tmp_path / "a", *names, splits="none") == [(), ("train",), ("test",), ("validation",)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the sub-folders Train, test, validation of ") and "taken for types" in line
    assert "--labels none" in line and f"--data {tmp_path / 'a/Train'}" in line
    assert types_in(tmp_path / "a") is None  # splits, within which nothing tells the images apart
    types_in(tmp_path / "a", source="none", splits="none")
    (tmp_path / "a/labels.csv").write_text("file,types\n" + "".join(f"{name},fire\n" for name in names))
    types_in(tmp_path / "a", splits="none")
    assert capsys.readouterr().err == ""

    for name in SPLIT_NAMES:
        other = "val" if name == "train" else "train"
        types_in(tmp_path / f"with {name}", f"{name}/1.png", f"{other}/2.png", splits="none")
        (line,) = capsys.readouterr().err.splitlines()
        assert "taken for types" in line and f"--data {tmp_path / f'with {name}' / 'train'}" in line
    for i, others in enumerate((["train/1.png"], ["train/1.png", "fire/2.png"], ["trains/1.png", "test/2.png"])):
        types_in(tmp_path / f"{i}", *others)  # no types at all, or types of other names too
    assert capsys.readouterr().err == ""


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
    write_images(tmp_path, "a.png")
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


def test_a_file_name_alone_will_do_if_it_is_unique(tmp_path, capsys):
    write_images(tmp_path, "x/a.png", "y/a.png", "y/b.png")
    (tmp_path / "labels.csv").write_text("file,types\n./y/a.png,ice\nb.png,fire\n,\n")
    assert ImageFolder(tmp_path, 16).labels.tolist() == [[0, 0], [0, 1], [1, 0]]
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no line for 1 of the 3 images" in line and "x/a.png" in line
    (tmp_path / "labels.csv").write_text("file,types\na.png,ice\nb.png,\n")  # which a.png?
    assert ImageFolder(tmp_path, 16).class_names == ()


def test_parse_types():
    class_names = ("fire", "flying", "water")
    assert parse_types("Flying  FIRE fire", class_names) == ("flying", "fire")
    with pytest.raises(ValueError, match="unknown type 'air', 'rock': choose one or more of fire, flying, water"):
        parse_types("fire air rock", class_names)
    with pytest.raises(ValueError, match="no type given"):
        parse_types("  ", class_names)
    assert multi_hot([("water", "fire"), ()], class_names).tolist() == [[1, 0, 1], [0, 0, 0]]
