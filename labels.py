"""What the pictures show: types, from a labels.csv or from the names of sub-folders, as sets of words.

    labels = find_labels("data/critters", names)        # [("fire",), ("grass", "flying"), (), ...], or None
    types = sorted(set().union(*labels))                # ["fire", "flying", "grass"]
    rows = multi_hot(labels, types)                     # uint8 [N, 3], what the network is told

A labels.csv lies in the folder of images and has the columns `file` and `types`; several types are separated by spaces:

    file,types
    0001.png,fire flying

Without one, the name of the sub-folder that a picture lies in is its type, as in torchvision's ImageFolder; where
folders are nested, that of the outermost. A name of two words is two types here too.
"""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LABEL_SOURCES = ("auto", "none")  # or the path of a csv file


class LabelError(Exception):
    """A problem with the user's labels. Its message is one line: what is wrong, where, and what to do."""


def find_labels(folder: str | Path, names: Sequence[str], source: str = "auto") -> list[tuple[str, ...]] | None:
    """The types of each picture of `folder`, or None where there are none to tell apart.

    Args:
        names: the pictures' paths relative to the folder, with forward slashes.
        source: "auto": labels.csv in the folder, else the names of its sub-folders; "none"; or the path of a csv file.

    Returns:
        A tuple of types for each name, in lower case; empty for a picture without a label.

    Raises:
        LabelError: for a csv file that is missing, malformed, or of other pictures.
    """
    if source == "none":
        return None
    path = Path(source) if source != "auto" else Path(folder).expanduser() / "labels.csv"
    if source != "auto" or os.path.lexists(path):  # a link to nowhere is an error, and not a folder without labels
        table = read_labels(path)
        # A file's name alone will do where no two folders have a picture of that name.
        count = Counter(name.rsplit("/", 1)[-1] for name in names)
        keys = [name if name in table or count[last := name.rsplit("/", 1)[-1]] > 1 else last for name in names]
        found = [key in table for key in keys]
        if not any(found):
            raise LabelError(f"{path} names none of the images in {folder}: its column 'file' must hold their names")
        if not all(found):
            print(f"warning: {path} says nothing of {found.count(False)} of the {len(names)} images in {folder}, "
                  f"{names[found.index(False)]} for one; they are taken to be of no type", file=sys.stderr)
        return [table.get(key, ()) for key in keys]
    labels = [tuple(split_types(name.split("/", 1)[0])) if "/" in name else () for name in names]
    return labels if len(set(labels) - {()}) > 1 else None  # a single sub-folder tells nothing apart


def read_labels(path: str | Path) -> dict[str, tuple[str, ...]]:
    """A csv file with the columns `file` and `types` (others are ignored) as {file: types}.

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
    """The words of "fire flying", in lower case, each once, in their order."""
    return list(dict.fromkeys(text.lower().split()))


def parse_types(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The types of "fire flying", as a user asks for them.

    Raises:
        ValueError: if there is none, or one that is not among the `known`.
    """
    types = split_types(text)
    unknown = [name for name in types if name not in known]
    if unknown or not types:
        wrong = f"unknown type {', '.join(map(repr, unknown))}" if unknown else "no type given"
        raise ValueError(f"{wrong}: choose one or more of {', '.join(known)}")
    return tuple(types)


def multi_hot(labels: Sequence[Sequence[str]], types: Sequence[str]) -> np.ndarray:
    """uint8 [len(labels), len(types)]: 1 where a picture has a type, 0 elsewhere."""
    column = {name: i for i, name in enumerate(types)}
    rows = np.zeros((len(labels), len(types)), np.uint8)
    for row, names in zip(rows, labels):
        row[[column[name] for name in names]] = 1
    return rows
