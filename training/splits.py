"""Splits: top folders named train, validation and test, which divide a data set and say nothing about its images.

    train/fire/1.png            is trained on, and its type is fire
    validation/2.png            is held out
    test/3.png                  is held out

Names are those of Hugging Face's imagefolder, in any case. They count as splits only where all top folders with images
have such a name, and one of them holds the training images: a folder `train` among `car` and `ship` is a type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SPLITS = dict(
    train=("train", "training"),
    validation=("validation", "valid", "val", "dev"),
    test=("test", "testing", "eval", "evaluation"),
)
SPLIT_NAMES = tuple(name for names in SPLITS.values() for name in names)
SPLIT_SETTINGS = ("auto", "none")


def split_of(folder: str) -> str | None:
    """Return the split that a folder is named after, a key of SPLITS."""
    return next((split for split, names in SPLITS.items() if folder.lower() in names), None)


def top_folder(name: str) -> str:
    """Return the outermost folder of an image's relative path; empty if it has none."""
    return name.split("/", 1)[0] if "/" in name else ""


def find_splits(names: Sequence[str], splits: str = "auto") -> dict[str, str]:
    """Return the top folders that are splits and what they are, as {"train": "train", "val": "validation"}.

    Args:
        names: the images' relative paths.
        splits: one of SPLIT_SETTINGS; with "none", no folder is a split.
    """
    found = {folder: split_of(folder) for folder in sorted({top_folder(name) for name in names} - {""})}
    if splits == "none" or None in found.values() or "train" not in found.values():
        return {}
    return found


def names_held_out(names: Sequence[str], splits: str = "auto") -> list[str]:
    """Return the images in the folders of the splits validation and test."""
    found = find_splits(names, splits)
    return [name for name in names if found.get(top_folder(name), "train") != "train"]


def describe_splits(names: Sequence[str], splits: str = "auto") -> str:
    """Say how many images each split has and what becomes of them; empty without splits."""
    found = find_splits(names, splits)
    if not found:
        return ""
    count = Counter(top_folder(name) for name in names)
    parts = {use: [f"{folder}/ ({count[folder]:,})" for folder, split in found.items() if (split == "train") == trained]
             for use, trained in (("trained on", True), ("held out", False))}
    if count[""]:
        parts["trained on"].append(f"{count['']:,} beside it")
    return "splits: " + ", ".join(f"{' and '.join(folders)} {use}" for use, folders in parts.items() if folders)
