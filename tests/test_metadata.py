"""Labels in Hugging Face's metadata.csv and metadata.jsonl: what is read, and what is refused with one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from training.dataset import DataError, ImageFolder
from training.folder import DataFolder
from training.labels import BEFORE_METADATA, LabelError, find_labels


def write_images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * i,) * 3).save(folder / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the images 1.png, 2.png and deep/3.png."""
    write_images(tmp_path / "images", "1.png", "2.png", "deep/3.png")
    return tmp_path / "images"


def write_jsonl(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def types_in(folder: Path, source: str = "auto", *columns: str) -> list[tuple[str, ...]] | None:
    return find_labels(DataFolder(folder), source, columns).types


def test_a_row_names_an_image_relative_to_its_table(folder, capsys):
    (folder / "metadata.csv").write_text("file_name,label\n./2.png,Fire flying\ndeep\\3.png,\n1.png,water\n")
    assert types_in(folder) == [("water",), ("fire", "flying"), ()]
    (folder / "metadata.csv").rename(folder / "deep/metadata.csv")
    (folder / "deep/metadata.csv").write_text("label,file_name\nfire,3.png\nwater,../1.png\n")
    assert types_in(folder) == [("water",), (), ("fire",)]
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no line for 1 of the 3 images" in line and "2.png" in line and "no type" in line


@pytest.mark.parametrize("cell, types", [
    ("fire", ["fire"]), (" Fire  fire ", ["fire"]), ("['fire' 'flying']", ["fire", "flying"]),
    ("\"['fire', 'flying']\"", ["fire", "flying"]), ("\"['fire'\n 'ice']\"", ["fire", "ice"]), ("[]", []),
    ('"[""a b\'s""]"', ["a", "b's"]), (r"['it\'s']", ["it's"]), ("nan", []), ("None", []), ("", []),
    ("0", ["0"]), ("2.0", ["2"]), ("[0 12]", ["0", "12"]), ("-1", []), ("True", ["true"]), ("1.5", ["1.5"]),
])
def test_values_of_a_csv(folder, cell, types):
    (folder / "metadata.csv").write_text(f"file_name,label\n1.png,{cell}\n")
    assert types_in(folder) == [tuple(types), (), ()]


def test_values_of_a_jsonl(folder):
    values = [["fire", "flying", None], 3, -1, None, float("nan"), "two words", [[0], 1], True]
    expected = [("fire", "flying"), ("3",), (), (), (), ("two", "words"), ("0", "1"), ("true",)]
    for value, types in zip(values, expected):
        write_jsonl(folder / "metadata.jsonl", {"file_name": "1.png", "label": value}, {"file_name": "2.png"})
        assert types_in(folder)[:2] == [types, ()]


def test_numbers_have_the_names_that_dataset_info_gives_them(folder):
    (folder / "metadata.csv").write_text("file_name,label\n1.png,1\n2.png,0\ndeep/3.png,-1\n")
    info = {"features": {"label": {"names": ["fire", "Sea Water"], "_type": "ClassLabel"}, "file_name": {}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert types_in(folder) == [("sea", "water"), ("fire",), ()]
    info["features"]["label"] = {"feature": info["features"]["label"], "_type": "List"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "metadata.csv").write_text("file_name,label\n1.png,[1 0]\n2.png,[0]\ndeep/3.png,[]\n")
    assert types_in(folder) == [("sea", "water", "fire"), ("fire",), ()]
    (folder / "metadata.csv").write_text("file_name,label\n1.png,2\n")
    with pytest.raises(DataError, match="line 2: there is no class 2"):
        ImageFolder(folder, 16)
    (folder / "dataset_info.json").write_text("[not JSON")  # says nothing
    assert types_in(folder) == [("2",), (), ()]


def test_a_table_that_is_given_has_the_names_of_classes_that_it_has_if_found(folder, tmp_path):
    """dataset_info.json may lie in the outermost folder, and a table may be a link, as in Hugging Face's cache."""
    info = {"features": {"label": {"names": ["fire", "ice"], "_type": "ClassLabel"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "blob").write_text("file_name,label\n3.png,1\n")
    try:
        (folder / "deep/metadata.csv").symlink_to(tmp_path / "blob")
    except OSError:  # Windows may not allow it
        (folder / "deep/metadata.csv").write_bytes((tmp_path / "blob").read_bytes())
    assert types_in(folder) == types_in(folder, str(folder / "deep/metadata.csv")) == [(), (), ("ice",)]
    (folder / "deep/mine.csv").write_text("file_name,label\n3.png,0\n")
    assert types_in(folder, str(folder / "deep/mine.csv")) == [(), (), ("fire",)]


def test_to_what_the_names_in_a_table_are_relative(folder, tmp_path):
    (tmp_path / "mine.csv").write_text("file_name,label\nimages/1.png,a\n")
    with pytest.raises(LabelError, match=re.escape(f"relative to {folder}")):
        types_in(folder, str(tmp_path / "mine.csv"))
    (folder / "deep/metadata.csv").write_text("file_name,label\ndeep/3.png,a\n")
    with pytest.raises(LabelError, match="relative to the table's own folder"):
        types_in(folder)


def test_which_columns_hold_the_labels(folder):
    def columns_of(header: str, *wanted: str) -> str:
        row = ",".join("1.png" if name == "file_name" else f"a{i}" for i, name in enumerate(header.split(",")))
        (folder / "metadata.csv").write_text(f"{header}\n{row}\n")
        return find_labels(DataFolder(folder), "auto", wanted).origin

    for name in ("label", "Labels", "type", "types", "class", "classes", "category", "categories", "type 1", "class_2"):
        assert f"column {name} of" in columns_of(f"id,file_name,{name},text")
    assert "columns Type1, Type2 of" in columns_of("file_name,Type1,Type2,name")
    assert "columns colour, shape of" in columns_of("file_name,label,shape,colour", "colour", "shape")
    assert columns_of("file_name,text,caption") == "none found"  # sentences are no labels
    (folder / "metadata.csv").write_text("file_name,width,score\n1.png,16,1e-3\n2.png,16,\n")
    assert types_in(folder) is None  # nor are numbers of an unknown kind


def test_without_labels_in_the_metadata_the_sub_folders_have_them(tmp_path):
    write_images(tmp_path, "fire/1.png", "ice/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nfire/1.png,a hot one\nice/2.png,a cold one\n")
    assert types_in(tmp_path) == [("fire",), ("ice",)]
    (tmp_path / "metadata.csv").write_text("file_name,label\nfire/1.png,cold\nice/2.png,hot\n")
    assert types_in(tmp_path) == [("cold",), ("hot",)]
    assert types_in(tmp_path, "folders") == types_in(tmp_path, BEFORE_METADATA) == [("fire",), ("ice",)]
    assert types_in(tmp_path, "none") is None


def test_tables_that_agree_and_that_do_not(folder, capsys):
    (folder / "labels.csv").write_text("file,types\n1.png,fire\n2.png,ice fire\n3.png,\n")
    write_jsonl(folder / "metadata.jsonl", {"file_name": "2.png", "types": ["fire", "ice"]},
                {"file_name": "1.png", "types": ["fire"]}, {"file_name": "deep/3.png", "types": []})
    labels = find_labels(DataFolder(folder))
    assert labels.types == [("fire",), ("ice", "fire"), ()]
    assert labels.origin.endswith("labels.csv (metadata.jsonl agrees)") and capsys.readouterr().err == ""

    # Metadata that cannot be read does not matter to a folder that has a labels.csv; it did not before.
    (folder / "metadata.jsonl").write_text("no JSON\n")
    assert types_in(folder) == labels.types
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "line 1: not JSON" in line and line.endswith("labels.csv is used")

    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,label,mood\n1.png,water,sad\n2.png,ice fire,glad\n")
    with pytest.raises(DataError) as error:
        ImageFolder(folder, 16)
    for words in ("labels.csv and ", "metadata.csv disagree on 1 images, such as 1.png (fire; water)", "--labels"):
        assert words in str(error.value)
    # Which is right can be said.
    assert types_in(folder, str(folder / "labels.csv")) == labels.types
    assert types_in(folder, str(folder / "metadata.csv")) == [("water",), ("ice", "fire"), ()]
    assert types_in(folder, "auto", "mood") == [("sad",), ("glad",), ()]


def test_a_table_elsewhere(folder, tmp_path):
    (tmp_path / "mine.csv").write_text("species,file_name\nice,deep/3.png\n")
    assert types_in(folder, str(tmp_path / "mine.csv"), "species") == [(), (), ("ice",)]
    (folder / "deep/mine.csv").write_text("label,file_name\nice,3.png\n")  # relative to itself, if it is in the folder
    assert types_in(folder, str(folder / "deep/mine.csv")) == [(), (), ("ice",)]
    write_jsonl(tmp_path / "mine.jsonl", {"file_name": "1.png", "label": 7})
    assert types_in(folder, str(tmp_path / "mine.jsonl")) == [("7",), (), ()]
    (tmp_path / "labels.csv").write_text("file,kind\n3.png,ice\n")
    assert types_in(folder, str(tmp_path / "labels.csv"), "kind") == [(), (), ("ice",)]


@pytest.mark.parametrize("name, text, words", [
    ("metadata.csv", "file_name,label,types\n1.png,a,b\n", "several columns of labels, label, types"),
    ("metadata.csv", "file_name,species,id\n1.png,cat,4\n", "no column with a usual name"),
    ("metadata.csv", "file_name,species,id\n1.png,cat,4\n", "--label_column with one or more of species, or"),
    ("metadata.csv", "image,label\n1.png,a\n", "no column 'file_name'"),
    ("metadata.csv", "file_name;label\n1.png;a\n", "no column 'file_name'"),
    ("metadata.csv", "file_name,label\n", "has no rows"),
    ("metadata.csv", "", "has no rows"),
    ("metadata.csv", "file_name,label\n1.png,a,b\n", "line 2: more cells"),
    ("metadata.csv", "file_name,label\n1.png,a\n2.png,\"a, b\"\n", "line 3: labels in one cell are separated by"),
    ("metadata.csv", "file_name,label\n,a\n", "line 2: no file_name"),
    ("metadata.csv", "file_name,label\n1.png,a\n1.png,a\n1.png,b\n", "line 4: '1.png' has other labels in line 2"),
    ("metadata.csv", "file_name,label\n../4.png,a\n/etc/x.png,a\n", "names none of the images"),
    ("metadata.jsonl", '{"file_name": "1.png", "label": "a"}\n\n{"file_name": "2.png"\n', "line 3: not JSON"),
    ("metadata.jsonl", '["1.png", "a"]\n', "line 1: not an object"),
    ("metadata.jsonl", '{"file_name": 1, "label": "a"}\n', "line 1: no file_name"),
    ("metadata.jsonl", '{"file_name": "1.png", "label": {"a": 1}}\n', "line 1: .* is no label"),
    ("metadata.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
    ("metadata.parquet", "", "parquet is not read"),
])
def test_bad_metadata_is_one_clear_line(folder, name, text, words):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=words) as error:
        ImageFolder(folder, 16)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)
    assert ImageFolder(folder, 16, label_source="none").class_names == ()


def test_a_table_that_is_not_utf_8(folder):
    (folder / "metadata.csv").write_bytes("file_name,label\n1.png,pokémon\n".encode("latin-1"))
    with pytest.raises(DataError, match="metadata.csv is not a table in UTF-8"):
        ImageFolder(folder, 16)


def test_metadata_may_name_files_that_are_not_there(folder, capsys):
    (folder / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\ndeep/3.png,a\n4.png,ghost\n5.tif,b\n")
    assert ImageFolder(folder, 16).class_names == ("a", "b")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "files that are not among the images" in line and "2, such as 4.png" in line


@pytest.mark.parametrize("source, columns, words", [
    ("auto", ["kind"], "has no column 'kind': --label_column must name .* it has label, mood"),
    ("auto", ["label", "x", "y"], "has no column 'x' and no column 'y'"),
    ("none", ["label"], "--label_column label names a column of a table, and --labels is none"),
    ("folders", ["label"], "--labels is folders"),
    ("missing.csv", [], "cannot read the labels in missing.csv"),
    ("missing.jsonl", [], "cannot read the labels in missing.jsonl"),
    ("labels.parquet", [], "parquet is not read"),
])
def test_bad_sources_are_one_clear_line(folder, source, columns, words):
    (folder / "metadata.csv").write_text("file_name,label,mood\n1.png,a,b\n")
    with pytest.raises(DataError, match=words) as error:
        ImageFolder(folder, 16, label_source=source, label_columns=columns)
    assert "\n" not in str(error.value)


def test_a_column_needs_a_table(folder):
    with pytest.raises(DataError, match="has no labels.csv, metadata.csv or metadata.jsonl with a column 'kind'"):
        ImageFolder(folder, 16, label_columns=["kind"])
    (folder / "labels.csv").write_text("file,kind\n1.png,a\n")
    assert ImageFolder(folder, 16, label_columns=["kind"]).class_names == ("a",)
