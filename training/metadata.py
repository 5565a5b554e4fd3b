"""Tables of labels as Hugging Face's imagefolder has them: metadata.csv, or metadata.jsonl with an object a line.

    file_name,label             {"file_name": "1.png", "types": ["fire", "flying"]}
    1.png,fire                  {"file_name": "deep/2.png", "types": ["water"]}

`file_name` is relative to the table's own folder. A label is a text whose words are types, a list, or the number of a
class. In a csv a list is what numpy or Python prints of it, ['fire' 'flying'].
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from utils.errors import UserError

FILE_NAME = "file_name"
LABEL_COLUMN = re.compile(r"(labels?|types?|class(es)?|categor(y|ies))[ _]?\d*", re.IGNORECASE)
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description")  # sentences, not labels
MISSING = ("", "nan", "none", "null", "na", "n/a")  # what pandas, and so `datasets`, takes for no value
NUMBER = re.compile(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?|true|false", re.IGNORECASE)
CLASS_NUMBER = re.compile(r"(-?\d+)(?:\.0*)?")
LIST_ITEM = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([^\s,'"]+)""")
SEPARATORS = set(",;/|")

Row = tuple[int, dict[str, Any]]  # number of the line, and its values by column


class LabelError(UserError):
    """A problem with the labels of a data set."""


@dataclass(frozen=True)
class Table:
    """A metadata file.

    Attributes:
        path: for messages; ends in .csv or .jsonl.
        folder: its folder relative to that of the data set; empty for that itself.
        open: opens it for reading.
        class_names: names of the classes whose numbers a column holds, by column.
    """

    path: str
    folder: str
    open: Callable[[], BinaryIO]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass
class Metadata:
    """The labels of one or more tables.

    Attributes:
        columns: those that hold the labels; empty if there is none.
        others: columns that could hold labels, by their values.
        types: the types of each image, by its path relative to the folder of the data set.
    """

    columns: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    types: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_metadata(tables: Sequence[Table], wanted: Sequence[str] = ()) -> Metadata:
    """Read the labels in metadata tables.

    Args:
        wanted: the columns of the labels; default: those with a usual name, such as label or types.

    Raises:
        LabelError: for a table that is malformed, lacks a column, or gives one image different labels.
    """
    found, places = Metadata(), {}
    for table in tables:
        rows = list(read_rows(table))
        columns = list(dict.fromkeys(name for _, row in rows for name in row))
        if rows and FILE_NAME not in columns:
            raise LabelError(f"{table.path} has no column '{FILE_NAME}' with the paths of images, but "
                             f"{', '.join(columns)}: rename one, or give --labels none")
        chosen = choose_columns(columns, wanted, table.path) if rows else ()
        found.columns = tuple(dict.fromkeys((*found.columns, *chosen)))
        found.others = tuple(dict.fromkeys((*found.others, *_possible_columns(columns, rows))))
        for (line, row), types in zip(rows, _types_of_rows(table, rows, chosen)):
            name = _image_path(table, line, row)
            if name in found.types and set(found.types[name]) != set(types):
                raise LabelError(f"{table.path}, line {line}: {name!r} has other labels in {places[name]}; keep one of "
                                 f"the two lines, with all of its labels")
            found.types.setdefault(name, types)
            places.setdefault(name, f"line {line} of {table.path}")
    return found


def choose_columns(columns: Sequence[str], wanted: Sequence[str], path: str) -> tuple[str, ...]:
    """Return the wanted columns, or else those with a usual name, as label, or type_1 and type_2.

    Raises:
        LabelError: if a wanted column is not there, or if several usual names differ in more than a number.
    """
    missing = [name for name in wanted if name not in columns]
    if missing:
        there = ", ".join(name for name in columns if name != FILE_NAME) or "no other"
        raise LabelError(f"{path} has no column {' and no column '.join(map(repr, missing))}: --label_column must name "
                         f"those that hold the labels; it has {there}")
    if wanted:
        return tuple(wanted)
    usual = tuple(name for name in columns if LABEL_COLUMN.fullmatch(name.strip()))
    if len({re.sub(r"[ _]?\d*$", "", name.strip().lower()) for name in usual}) > 1:
        raise LabelError(f"{path} has several columns of labels, {', '.join(usual)}: choose one or more with "
                         f"--label_column")
    return usual


def _possible_columns(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return the columns that hold more than file names, sentences, numbers and objects."""
    def says_something(value: Any) -> bool:
        if isinstance(value, str):
            return value.strip().lower() not in MISSING and not NUMBER.fullmatch(value.strip())
        return isinstance(value, list)

    return [name for name in columns if name != FILE_NAME and name.strip().lower() not in TEXT_COLUMNS
            and any(says_something(row.get(name)) for _, row in rows)]


def _image_path(table: Table, line: int, row: Mapping[str, Any]) -> str:
    """Return the path of a row's image relative to the folder of the data set."""
    name = row.get(FILE_NAME)
    if not isinstance(name, str) or not name.strip():
        raise LabelError(f"{table.path}, line {line}: no {FILE_NAME}")
    return posixpath.normpath(posixpath.join(table.folder, name.strip().replace("\\", "/")))


# ---------------------------------------------------------------------------------------------------------------------
# rows of a file


def read_rows(table: Table) -> Iterator[Row]:
    """Yield the rows of a .csv or .jsonl with the numbers of their lines. Raises LabelError for a malformed one."""
    try:
        with table.open() as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            yield from (_json_rows if table.path.lower().endswith(".jsonl") else _csv_rows)(text, table.path)
    except OSError as error:
        raise LabelError(f"cannot read the labels in {table.path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{table.path} is not a table in UTF-8: {error}") from error


def _csv_rows(text: io.TextIOWrapper, path: str) -> Iterator[Row]:
    rows = csv.DictReader(text)
    for row in rows:
        if None in row:
            raise LabelError(f"{path}, line {rows.line_num}: more cells than in the first line; quote a cell that has "
                             f"a comma")
        if any(row.values()):  # spreadsheets leave empty lines at the end
            yield rows.line_num, row


def _json_rows(text: io.TextIOWrapper, path: str) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except (ValueError, RecursionError) as error:
            problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise LabelError(f"{path}, line {number}: not JSON ({problem}); each line must be one object, as "
                             f'{{"file_name": "1.png", "label": "fire"}}') from error
        if not isinstance(row, dict):
            raise LabelError(f"{path}, line {number}: not an object in braces; each line must be one, as "
                             f'{{"file_name": "1.png", "label": "fire"}}')
        yield number, row


def read_class_names(text: str | bytes) -> dict[str, list[str]]:
    """Return the names of classes by column, as `datasets` writes them to dataset_info.json; empty for other texts."""
    try:
        features = json.loads(text)["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = {}
    for column, feature in features:
        if isinstance(feature, list) and len(feature) == 1:  # a list of classes, as older versions write it
            feature = feature[0]
        elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
    return found


# ---------------------------------------------------------------------------------------------------------------------
# values of a label column


def split_types(text: str) -> list[str]:
    """Split "fire flying" into its words, in lower case, each once, in their order."""
    return list(dict.fromkeys(text.lower().split()))


def _types_of_rows(table: Table, rows: Sequence[Row], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the types of each row, of all columns together."""
    types: list[list[str]] = [[] for _ in rows]
    for column in columns:
        labels = [_labels_in(row.get(column), f"{table.path}, line {line}") for line, row in rows]
        if all(CLASS_NUMBER.fullmatch(label) for cell in labels for label in cell):
            names = table.class_names.get(column, ())
            labels = [[_class_name(label, names, f"{table.path}, line {line}") for label in cell]
                      for cell, (line, _) in zip(labels, rows)]
        for row_types, cell in zip(types, labels):
            row_types += [word for label in cell for word in split_types(label)]
    return [tuple(dict.fromkeys(row_types)) for row_types in types]


def _labels_in(value: Any, place: str) -> list[str]:
    """Return the labels in a cell as texts.

    Raises:
        LabelError: for a text in which something else than spaces separates the labels, and for an object.
    """
    if isinstance(value, list):
        return [label for item in value for label in _labels_in(item, place)]
    if isinstance(value, dict):
        raise LabelError(f"{place}: {json.dumps(value)[:60]} is no label: that is a text, a number or a list of them")
    if value is None or isinstance(value, float) and math.isnan(value):
        return []
    text = str(value).strip()
    if text.lower() in MISSING:
        return []
    if text.startswith("[") and text.endswith("]"):
        return [label for groups in LIST_ITEM.findall(text[1:-1]) for label in _labels_in(
            re.sub(r"\\(.)", r"\1", "".join(groups)), place)]
    if SEPARATORS & set(text):
        raise LabelError(f"{place}: labels in one cell are separated by spaces, not as in {text!r}")
    return [text]


def _class_name(label: str, names: Sequence[str], place: str) -> str:
    """Return the name of a class number, the number itself if there are no names, nothing for -1, "no label"."""
    number = int(CLASS_NUMBER.fullmatch(label)[1])
    if number < 0:
        return ""
    if names and number >= len(names):
        raise LabelError(f"{place}: there is no class {number}; dataset_info.json names {len(names)}")
    return names[number] if names else str(number)
