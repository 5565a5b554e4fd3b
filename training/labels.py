"""Labels: the types of each image, from a labels.csv or from the names of sub-folders.

    types = find_labels("data/critters", names)         # [("fire",), ("grass", "flying"), (), ...], or None
    class_names = sorted(set().union(*types))           # ["fire", "flying", "grass"]
    labels = multi_hot(types, class_names)              # uint8 [N, 3], the network's input

A labels.csv lies in the folder of images and has the columns `file` and `types`; several types are separated by spaces:

    file,types
    0001.png,fire flying

Without one, the sub-folder that an image lies in names its type, as in torchvision's ImageFolder; in nested folders the
outermost one does. A folder name of two words is two types.
"""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, printable

LABEL_SOURCES = ("auto", "none")  # or the path of a csv file
# Sub-folders of these names divide a data set into parts. They say nothing about what an image shows.
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")


class LabelError(UserError):
    """A problem with the labels of a data set."""


def find_labels(folder: str | Path, names: Sequence[str], source: str = "auto") -> list[tuple[str, ...]] | None:
    """Find the types of each image in `folder`.

    Args:
        names: the images' paths relative to the folder, with forward slashes.
        source: "auto": labels.csv in the folder, else the names of its sub-folders; "none"; or the path of a csv file.

    Returns:
        A tuple of types for each name, in lower case, empty for an image without a label; or None if nothing tells the
        images apart.

    Raises:
        LabelError: for a csv file that is missing or malformed, or that names none of the images.
    """
    if source == "none":
        return None
    if source != "auto":
        return _types_from_csv(Path(source), folder, names)
    default = Path(folder).expanduser() / "labels.csv"
    if os.path.lexists(default):  # also for a broken link, which is an error and not a folder without labels
        return _types_from_csv(default, folder, names)
    return _types_from_folders(folder, names)


def _types_from_csv(path: Path, folder: str | Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    table = read_labels(path)
    # The csv may give a path, or the file name alone where no two folders have a file of that name.
    file_names = [name.rsplit("/", 1)[-1] for name in names]
    count = Counter(file_names)
    keys = [name if name in table or count[file_name] > 1 else file_name for name, file_name in zip(names, file_names)]

    missing = [name for name, key in zip(names, keys) if key not in table]
    if len(missing) == len(names):
        raise LabelError(f"{path} names none of the images in {folder}: its column 'file' must hold their names")
    if missing:
        print(f"warning: {printable(path)} has no line for {len(missing)} of the {len(names)} images in "
              f"{printable(folder)}, such as {printable(missing[0])}; they get no type", file=sys.stderr)
    return [table.get(key, ()) for key in keys]


def _types_from_folders(folder: str | Path, names: Sequence[str]) -> list[tuple[str, ...]] | None:
    sub_folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    types = [tuple(split_types(sub_folder)) for sub_folder in sub_folders]
    if len(set(types) - {()}) < 2:
        return None  # a single sub-folder tells nothing apart

    named = sorted(set(sub_folders) - {""})
    if all(name.lower() in SPLIT_NAMES for name in named):
        example = next((name for name in named if name.lower().startswith("train")), named[0])
        print(f"warning: the sub-folders {', '.join(named)} of {printable(folder)} are taken for types, but look like "
              f"the parts of a data set: train with --labels none, or on one of them with --data "
              f"{printable(Path(folder, example))}", file=sys.stderr)
    return types


def read_labels(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a csv file with the columns `file` and `types` as {file: types}; other columns are ignored.

    Raises:
        LabelError: if it cannot be read, lacks a column, or names a file twice.
    """
    table: dict[str, tuple[str, ...]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets begin a file with a mark
            rows = csv.DictReader(file)
            missing = {"file", "types"} - set(rows.fieldnames or ())
            if missing:
                raise LabelError(f"{path} has no column {' and no column '.join(map(repr, sorted(missing)))}: its "
                                 f"first line must be file,types")
            for row in rows:
                if None in row:
                    raise LabelError(f"{path}, line {rows.line_num}: more cells than in the first line; types in one "
                                     f"cell are separated by spaces")
                name = (row["file"] or "").strip().replace("\\", "/").removeprefix("./")
                if not name:
                    continue  # spreadsheets leave empty lines at the end
                if set(row["types"] or "") & set(",;/|"):
                    raise LabelError(f"{path}, line {rows.line_num}: types in one cell are separated by spaces, not as "
                                     f"in {row['types']!r}")
                if name in table:
                    raise LabelError(f"{path}, line {rows.line_num}: {name!r} is there twice; keep one line, with all "
                                     f"of its types in one cell, separated by spaces")
                table[name] = tuple(split_types(row["types"] or ""))
    except OSError as error:
        raise LabelError(f"cannot read the labels in {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path} is not a csv file in UTF-8: {error}") from error
    return table


def split_types(text: str) -> list[str]:
    """Split "fire flying" into its words, in lower case, each once, in their order."""
    return list(dict.fromkeys(text.lower().split()))


def parse_types(text: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """Parse the types that a user gives as "fire flying".

    Raises:
        ValueError: if there is none, or one that is not in `class_names`.
    """
    types = split_types(text)
    unknown = [name for name in types if name not in class_names]
    if unknown or not types:
        problem = f"unknown type {', '.join(map(repr, unknown))}" if unknown else "no type given"
        raise ValueError(f"{problem}: choose one or more of {', '.join(class_names)}")
    return tuple(types)


def multi_hot(types: Sequence[Sequence[str]], class_names: Sequence[str]) -> np.ndarray:
    """Encode the types of each image as uint8 [len(types), len(class_names)]: 1 where it has the type, else 0."""
    column = {name: i for i, name in enumerate(class_names)}
    labels = np.zeros((len(types), len(class_names)), np.uint8)
    for row, names in zip(labels, types):
        row[[column[name] for name in names]] = 1
    return labels
