"""Labels: the types of each image, from a table or from the names of sub-folders.

    folder = DataFolder("data/critters")
    types = find_labels(folder).types                   # [("fire",), ("grass", "flying"), (), ...], or None
    class_names = sorted(set().union(*types))           # ["fire", "flying", "grass"]
    labels = multi_hot(types, class_names)              # uint8 [N, 3], the network's input

A labels.csv lies in the folder of images and has the columns `file` and `types`; several types are separated by spaces:

    file,types
    0001.png,fire flying

A metadata.csv or metadata.jsonl is as in Hugging Face's imagefolder, see training/metadata.py. Without a table, the
sub-folder that an image lies in names its type, as in torchvision's ImageFolder; in nested folders the outermost one
below the folders of splits does. A folder name of two words is two types.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.folder import DATASET_INFO, LABELS_CSV, METADATA_PARQUET, METADATA_READ, DataFolder
from training.metadata import (
    FILE_NAME,
    SEPARATORS,
    LabelError,
    Table,
    read_class_names,
    read_metadata,
    split_types,
)
from training.splits import SPLIT_NAMES, find_splits, top_folder
from utils.errors import printable

# "folders": the names of sub-folders alone. Otherwise a table's path.
LABEL_SOURCES = ("auto", "none", "folders")
BEFORE_METADATA = "csv_or_folders"  # what "auto" meant for runs from before metadata was read; see utils/checkpoint.py


@dataclass
class Labels:
    """The labels of a data set.

    Attributes:
        types: a tuple of types for each image, in lower case, empty for one without; None if nothing tells them apart.
        origin: where they come from, for people.
    """

    types: list[tuple[str, ...]] | None
    origin: str


def find_labels(folder: DataFolder, source: str = "auto", columns: Sequence[str] = (), splits: str = "auto") -> Labels:
    """Find the types of the images in a folder.

    Args:
        source: "auto": labels.csv in the folder, else metadata.csv or metadata.jsonl in any folder, else the names of
            sub-folders; "folders": these names alone; "none"; or the path of a .csv or .jsonl.
        columns: the columns of the labels in a table; with "auto", in the metadata. Default: those with a usual name.
        splits: whether top folders may be splits, see `find_splits`.

    Raises:
        LabelError: for a table that is missing or malformed, or that names none of the images; for two tables that
            disagree; and for metadata of which it is not clear what holds the labels.
    """
    if columns and source in ("none", "folders", BEFORE_METADATA):
        raise LabelError(f"--label_column {' '.join(columns)} names a column of a table, and --labels is {source}: "
                         f"leave out one of the two")
    if source == "none":
        return Labels(None, "none")
    if source not in LABEL_SOURCES and source != BEFORE_METADATA:
        return _from_file(Path(source), folder, columns)
    labels = None
    if source == "auto":
        labels = _from_tables(folder, columns)
    elif source == BEFORE_METADATA and LABELS_CSV in folder.files:
        labels = _labels_csv(folder).labels(folder)
    return labels or _from_folders(folder, splits)


# ---------------------------------------------------------------------------------------------------------------------
# tables


@dataclass
class Source:
    """A table of labels, or several of one format.

    Attributes:
        path: of the table, or the first of them.
        origin: the same in words.
        types: of each image in the folder that is named there.
    """

    path: str
    origin: str
    types: dict[str, tuple[str, ...]]

    def labels(self, folder: DataFolder) -> Labels:
        return Labels([self.types.get(name, ()) for name in folder.images], self.origin)


def _from_tables(folder: DataFolder, columns: Sequence[str]) -> Labels | None:
    """Return the labels in labels.csv, else those in the metadata, with which it must agree; None if there are none."""
    groups = [tables for tables in map(folder.tables, METADATA_READ) if tables]
    sources: list[Source] = []
    if LABELS_CSV in folder.files and not (columns and groups):
        sources.append(_labels_csv(folder, columns))
    elif columns and not groups:
        raise LabelError(f"{folder.path} has no {LABELS_CSV}, {' or '.join(METADATA_READ)} with a column "
                         f"{', '.join(map(repr, columns))}: leave out --label_column, or give --labels FILE")
    elif folder.tables(METADATA_PARQUET) and not groups:
        raise LabelError(f"{folder.path}/{folder.tables(METADATA_PARQUET)[0]}: parquet is not read here; write the "
                         f"table as metadata.csv or metadata.jsonl, or give --labels none")
    for tables in groups:
        try:
            source = _metadata([_table(folder, name) for name in tables], folder, columns)
        except LabelError as error:
            if not sources:
                raise
            print(f"warning: {printable(error)}; {sources[0].origin} is used", file=sys.stderr)
            continue
        if source is not None:
            sources.append(source)
    for other in sources[1:]:
        _check_agreement(sources[0], other)
    if not sources:
        return None
    labels = sources[0].labels(folder)
    labels.origin += "".join(f" ({other.path.rsplit('/', 1)[-1]} agrees)" for other in sources[1:])
    return labels


def _from_file(path: Path, folder: DataFolder, columns: Sequence[str]) -> Labels:
    """Return the labels in a file of either format."""
    if path.suffix.lower() == ".parquet":
        raise LabelError(f"{path}: parquet is not read here; write the table as .csv or .jsonl")
    if not _has_metadata_format(path):
        return Source(str(path), str(path), _by_image(read_labels(path, columns), path, folder)).labels(folder)
    file, root = path.expanduser().parent.resolve() / path.name, folder.path.resolve()
    open_file = functools.partial(open, file, "rb")
    if file.is_relative_to(root):  # also under a name that `DataFolder` does not list
        table = replace(_table(folder, file.relative_to(root).as_posix()), path=str(path), open=open_file)
    else:
        info = file.parent / DATASET_INFO
        table = Table(str(path), "", open_file, read_class_names(info.read_bytes()) if info.is_file() else {})
    source = _metadata([table], folder, columns)
    if source is None:
        raise LabelError(f"{path} has no column of labels: name one with --label_column")
    return source.labels(folder)


def _has_metadata_format(path: Path) -> bool:
    if path.suffix.lower() == ".jsonl":
        return True
    with contextlib.suppress(OSError, UnicodeDecodeError, csv.Error):  # read_labels says what is wrong
        with open(path.expanduser(), newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        return FILE_NAME in header and "file" not in header
    return False


def _table(folder: DataFolder, name: str) -> Table:
    """Return a metadata file of a folder, with the names of classes that lie beside it or in the outermost folder."""
    parent = name.rpartition("/")[0]
    info = next((info for info in (f"{parent}/{DATASET_INFO}", DATASET_INFO) if info in folder.files), None)
    class_names = read_class_names(folder.open(info).read()) if info else {}
    return Table(f"{folder.path}/{name}", parent, functools.partial(folder.open, name), class_names)


def _metadata(tables: Sequence[Table], folder: DataFolder, columns: Sequence[str]) -> Source | None:
    """Read metadata of one format; None if it clearly has no labels.

    Raises:
        LabelError: as `read_metadata` does, if it is not clear what holds the labels, or if no image is named.
    """
    metadata, path = read_metadata(tables, columns), tables[0].path
    more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
    if not metadata.types:
        raise LabelError(f"{path} has no rows: name the images there, or give --labels none")
    if not metadata.columns:
        if metadata.others:
            raise LabelError(f"{path} has no column with a usual name for labels, such as label or types: give "
                             f"--label_column with one or more of {', '.join(metadata.others)}, or --labels none")
        return None
    strangers = sorted(metadata.types.keys() - set(folder.images))
    if len(strangers) == len(metadata.types):
        base = "the table's own folder" if any(table.folder for table in tables) else folder.path
        raise LabelError(f"{path}{more} names none of the images in {folder.path}, but {strangers[0]}: '{FILE_NAME}' "
                         f"must hold their paths, relative to {base}")
    if strangers:
        print(f"warning: {printable(path)}{more} names files that are not among the images in "
              f"{printable(folder.path)}: {len(strangers)}, such as {printable(strangers[0])}", file=sys.stderr)
    types = {name: metadata.types[name] for name in folder.images if name in metadata.types}
    _report_unnamed(path + more, types, folder)
    which = "column" if len(metadata.columns) == 1 else "columns"
    return Source(path, f"{which} {', '.join(metadata.columns)} of {path}{more}", types)


def _labels_csv(folder: DataFolder, columns: Sequence[str] = ()) -> Source:
    path = f"{folder.path}/{LABELS_CSV}"
    table = read_labels(path, columns, functools.partial(folder.open, LABELS_CSV))
    return Source(path, path, _by_image(table, path, folder))


def _by_image(table: dict[str, tuple[str, ...]], path: str | Path, folder: DataFolder
              ) -> dict[str, tuple[str, ...]]:
    """Return the types of the images that a labels.csv names.

    It may give a path, or the file name alone where no two folders have a file of that name.
    """
    file_names = [name.rsplit("/", 1)[-1] for name in folder.images]
    count = Counter(file_names)
    keys = [name if name in table or count[file_name] > 1 else file_name
            for name, file_name in zip(folder.images, file_names)]
    types = {name: table[key] for name, key in zip(folder.images, keys) if key in table}
    if not types:
        raise LabelError(f"{path} names none of the images in {folder.path}: its column 'file' must hold their names")
    _report_unnamed(path, types, folder)
    return types


def _report_unnamed(path: str | Path, types: dict[str, tuple[str, ...]], folder: DataFolder) -> None:
    """Warn of images that a table does not name."""
    unnamed = [name for name in folder.images if name not in types]
    if unnamed:
        print(f"warning: {printable(path)} has no line for {len(unnamed)} of the {len(folder.images)} images in "
              f"{printable(folder.path)}, such as {printable(unnamed[0])}; they get no type", file=sys.stderr)


def _check_agreement(ours: Source, theirs: Source) -> None:
    """Raise LabelError if two tables give an image different types."""
    different = [name for name in ours.types if name in theirs.types
                 and set(ours.types[name]) != set(theirs.types[name])]
    if different:
        first = different[0]
        said = [" ".join(source.types[first]) or "no type" for source in (ours, theirs)]
        raise LabelError(f"{ours.path} and {theirs.path} disagree on {len(different)} images, such as {first} "
                         f"({said[0]}; {said[1]}): remove one of the two, or give --labels with the one that is right")


def read_labels(path: str | Path, columns: Sequence[str] = (), open_file: Callable[[], BinaryIO] | None = None
                ) -> dict[str, tuple[str, ...]]:
    """Read a csv file with the columns `file` and `types` as {file: types}; other columns are ignored.

    Args:
        columns: those that hold the types instead.
        open_file: opens the file, if it is not to be found at `path`.

    Raises:
        LabelError: if it cannot be read, lacks a column, or names a file twice.
    """
    table: dict[str, tuple[str, ...]] = {}
    columns = tuple(columns) or ("types",)
    try:
        with (open_file or functools.partial(open, Path(path).expanduser(), "rb"))() as binary:
            rows = csv.DictReader(io.TextIOWrapper(binary, "utf-8-sig", newline=""))  # -sig: a mark of spreadsheets
            missing = {"file", *columns} - set(rows.fieldnames or ())
            if missing:
                raise LabelError(f"{path} has no column {' and no column '.join(map(repr, sorted(missing)))}: its "
                                 f"first line must be file,{','.join(columns)}")
            for row in rows:
                if None in row:
                    raise LabelError(f"{path}, line {rows.line_num}: more cells than in the first line; types in one "
                                     f"cell are separated by spaces")
                name = (row["file"] or "").strip().replace("\\", "/").removeprefix("./")
                if not name:
                    continue  # spreadsheets leave empty lines at the end
                if name in table:
                    raise LabelError(f"{path}, line {rows.line_num}: {name!r} is there twice; keep one line, with all "
                                     f"of its types in one cell, separated by spaces")
                cells = [row[column] or "" for column in columns]
                if SEPARATORS & set("".join(cells)):
                    raise LabelError(f"{path}, line {rows.line_num}: types in one cell are separated by spaces, not as "
                                     f"in {next(cell for cell in cells if SEPARATORS & set(cell))!r}")
                table[name] = tuple(split_types(" ".join(cells)))
    except FileNotFoundError as error:
        raise LabelError(f"cannot read the labels in {path}: {error.strerror}; --labels is auto, none, folders or a "
                         f"file") from error
    except OSError as error:
        raise LabelError(f"cannot read the labels in {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path} is not a csv file in UTF-8: {error}") from error
    return table


# ---------------------------------------------------------------------------------------------------------------------
# sub-folders


def _from_folders(folder: DataFolder, splits: str) -> Labels:
    parts = find_splits(folder.images, splits)
    inner = [name.split("/", 1)[1] if top_folder(name) in parts else name for name in folder.images]
    sub_folders = [top_folder(name) for name in inner]
    types = [tuple(split_types(sub_folder)) for sub_folder in sub_folders]
    if len(set(types) - {()}) < 2:
        return Labels(None, "none found")  # a single sub-folder tells nothing apart

    named = sorted(set(sub_folders) - {""})
    if all(name.lower() in SPLIT_NAMES for name in named):
        example = next((name for name in named if name.lower().startswith("train")), named[0])
        print(f"warning: the sub-folders {', '.join(named)} of {printable(folder.path)} are taken for types, but look "
              f"like the parts of a data set: train with --labels none, or on one of them with --data "
              f"{printable(folder.path / example)}", file=sys.stderr)
    return Labels(types, "the names of sub-folders")


# ---------------------------------------------------------------------------------------------------------------------
# types


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
