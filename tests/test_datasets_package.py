"""Folders whose tables the package `datasets` wrote are read as `datasets` itself reads them, and so are our own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import
datasets = pytest.importorskip("datasets", reason="needs the package datasets")

from critters import write_critters  # noqa: E402
from training.dataset import ImageFolder, held_out_names  # noqa: E402

NAMES = ["fire", "ice", "sea water"]
SPLITS = dict(train=7, validation=3, test=2)


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def rows_of(count: int, first: int) -> dict[str, list]:
    """Return the columns of a table about `count` images; the first one has no label of any kind."""
    numbers = range(first, first + count)
    return dict(
        file_name=[f"deep/{i}.png" if i % 3 else f"{i}.png" for i in numbers],
        label=[-1 if i == first else i % 3 for i in numbers],
        tags=[[] if i == first else [NAMES[i % 2], f"it's {i % 4}"][: 1 + i % 2] for i in numbers],
        numbers=[[] if i == first else [i % 3, 2] for i in numbers],
        mood=[None if i == first else ("glad", "sad")[i % 2] for i in numbers],
    )


FEATURES = datasets.Features(
    file_name=datasets.Value("string"), label=datasets.ClassLabel(names=NAMES), mood=datasets.Value("string"),
    tags=datasets.Sequence(datasets.Value("string")), numbers=datasets.Sequence(datasets.ClassLabel(names=NAMES)))


def write_folder(folder: Path, suffix: str, with_names: bool) -> None:
    """Write images of different grey levels in three splits, with the tables that `datasets` writes."""
    first = 0
    for split, count in SPLITS.items():
        rows = rows_of(count, first)
        for i, name in enumerate(rows["file_name"], start=first):
            (folder / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (9 * i,) * 3).save(folder / split / name)
        table = datasets.Dataset.from_dict(rows, features=FEATURES)
        write = table.to_csv if suffix == "csv" else table.to_json
        write(folder / split / f"metadata.{suffix}")
        if with_names:
            table.info.write_to_directory(folder / split)
        first += count


def read_by_datasets(path: Path, cache: Path) -> dict[str, dict[int, dict]]:
    """Return, by split and grey level, the row of each image."""
    source = dict(data_files=str(path)) if path.suffix == ".zip" else dict(data_dir=str(path))
    read = datasets.load_dataset("imagefolder", cache_dir=str(cache), **source)
    return {split: {int(np.asarray(row["image"])[0, 0, 0]): row for row in rows} for split, rows in read.items()}


def read_by_us(path: Path, **options) -> dict[int, tuple[str, set[str]]]:
    """Return, by grey level, the name and the types of each image."""
    dataset = ImageFolder(path, 16, **options)
    types = [{dataset.class_names[k] for k in row.nonzero().flatten()} for row in dataset.labels]
    return {int(image[0, 0, 0]): (name, have) for name, image, have in zip(dataset.names, dataset.images, types)}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("with_names", [False, True])
def test_what_datasets_wrote(tmp_path, suffix, with_names):
    folder = tmp_path / "images"
    write_folder(folder, suffix, with_names)
    theirs = read_by_datasets(folder, tmp_path / "cache")
    assert {split: len(rows) for split, rows in theirs.items()} == SPLITS
    names = [name for name, _ in read_by_us(folder, label_source="none").values()]
    held_out = held_out_names(names, 0, "auto")
    assert len(held_out) == 5

    for column in ("label", "tags", "numbers", "mood"):
        ours = read_by_us(folder, label_columns=[column])
        assert ours.keys() == set().union(*theirs.values())
        for split, rows in theirs.items():
            for grey, row in rows.items():
                name, types = ours[grey]
                assert name.startswith(f"{split}/") and (name in held_out) == (split != "train")
                assert types == expected_types(row, column, grey // 9, with_names), (name, column)


def expected_types(row: dict, column: str, i: int, with_names: bool) -> set[str]:
    """Return the types that are right for what `datasets` reads; in a csv, lists are texts to it."""
    value = row[column]
    if isinstance(value, str) and column in ("tags", "numbers"):
        original = rows_of(1, i)[column][0] if value == "[]" else rows_of(i + 1, i - 1)[column][1]
        value = original
    values = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if column in ("label", "numbers"):
        values = [NAMES[k] if with_names else str(k) for k in values]
    return {word for text in values for word in text.split()}


def test_a_zip_that_both_read(tmp_path):
    write_folder(tmp_path / "images", "jsonl", False)
    folder = tmp_path / "images/train"
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    theirs = read_by_datasets(packed, tmp_path / "cache")["train"]
    ours = read_by_us(packed, label_columns=["mood"])
    assert ours == read_by_us(folder, label_columns=["mood"]) and ours.keys() == theirs.keys()
    assert all(ours[grey][1] == set(filter(None, [row["mood"]])) for grey, row in theirs.items())


def test_sub_folders_of_splits(tmp_path):
    """Without a table, both take types from the folders within the splits."""
    for i, name in enumerate(("train/fire/1.png", "train/ice/2.png", "test/ice/3.png", "test/fire/4.png")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9 * i,) * 3).save(tmp_path / "images" / name)
    theirs = read_by_datasets(tmp_path / "images", tmp_path / "cache")
    ours = read_by_us(tmp_path / "images")
    for split, rows in theirs.items():
        for grey, row in rows.items():
            assert ours[grey][0].startswith(f"{split}/") and ours[grey][1] == {["fire", "ice"][row["label"]]}


def test_datasets_reads_our_critters(tmp_path):
    write_critters(tmp_path / "critters", 12, 16)
    read = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "critters"), cache_dir=str(tmp_path / "cache"))
    dataset = ImageFolder(tmp_path / "critters", 16)
    assert "metadata.csv agrees" in dataset.origin
    for i, row in enumerate(read["train"]):
        assert np.array_equal(np.asarray(row["image"]).transpose(2, 0, 1), dataset.images[i])
        types = {dataset.class_names[k] for k in dataset.labels[i].nonzero().flatten()}
        assert set(row["types"].split()) == types
