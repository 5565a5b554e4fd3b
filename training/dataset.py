"""Data sets: a folder of images, or a .zip of one, with optional labels; or the built-in critters.

    dataset = load_images("data/pokemon_jpg", 64)               # decoded once, kept as uint8 if they fit
    dataset = encode_dataset(dataset, space, "flip", "fp32")    # latents, where that can be done once

A folder may hold images of any format, mode, size and shape: each is decoded to the same small square, transparent
parts become white, and a file that cannot be read is named and left out. `python -m tools.preview_data FOLDER` shows
the result.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from critters import TYPES, draw_critters
from training.augment import augment, fixed_augmentations
from training.folder import DataError, DataFolder
from training.labels import BEFORE_METADATA, LabelError, find_labels, multi_hot
from training.splits import describe_splits, names_held_out
from utils.archive import ArchiveError, ZipMember
from utils.errors import printable
from utils.images import decode_error, decode_image

if TYPE_CHECKING:
    from models.space import LatentSpace, PixelSpace

POKEMON_FOLDER = "data/pokemon_jpg"
POKEMON_SOURCE = "https://www.kaggle.com/datasets/kvpratama/pokemon-images-dataset"
NUM_CRITTERS = 2000
MOST_NAMED = 10  # unreadable files that are named one by one


# ---------------------------------------------------------------------------------------------------------------------
# names


def find_images(folder: str | Path) -> list[Path | ZipMember]:
    """Find every image file in a folder at any depth, or in a .zip of one, except hidden files and folders.

    They are sorted by relative posix path, so that the order is the same on every machine.

    Raises:
        DataError, ArchiveError: as `DataFolder` does.
    """
    found = DataFolder(folder)
    return [found.files[name] for name in found.images]


def has_images(folder: str | Path) -> bool:
    """Return whether `folder` exists and holds an image file."""
    try:
        return bool(find_images(folder))
    except (DataError, ArchiveError):
        return False


def image_names(data: str, num_critters: int = NUM_CRITTERS) -> list[str]:
    """Return `ImageFolder.names` of `load_images` without reading an image."""
    if data == "critters":
        return _numbered(num_critters)
    return DataFolder(data).images


def held_out_names(names: Sequence[str], fraction: float, splits: str = "none") -> list[str]:
    """Choose the images that are held out of training, sorted: those of the splits validation and test, if the folder
    has splits, and `fraction` of the others, in [0, 1).

    These are the ones whose names have the lowest hashes: the same on every machine, and nearly the same after some
    images were added or removed.
    """
    named = names_held_out(names, splits)
    others = set(names) - set(named)
    by_hash = sorted(others, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return sorted([*named, *by_hash[: round(fraction * len(others))]])


def _numbered(count: int) -> list[str]:
    return [f"{i:05d}" for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# images


class ImageFolder(Dataset):
    """The images of a folder, or of a .zip of one, as uint8 tensors [3, S, S], and their labels if there are any.

    Each image is decoded once and kept in memory if all of them take at most `memory_limit` bytes. Otherwise `images`
    is None, and files are read as they are needed.

    Args:
        image_size: S, at least 8.
        memory_limit: default: a quarter of the machine's memory.
        label_source, label_columns, splits: where the labels come from, see `find_labels`.
        keep: leave out the images for whose names this is false. The class names are the whole folder's all the same.

    Attributes:
        files, names: each image's file, and its path relative to the folder.
        images: uint8 [N, 3, S, S], or None.
        class_names: the types, sorted; empty without labels.
        labels: uint8 [N, len(class_names)], 1 for each type that an image has.
        left_out: how many files could not be read.
        origin: what was used for labels and splits, in words.

    Raises:
        DataError: for a folder without images, labels that `find_labels` refuses, or if no file can be read.
        ArchiveError: as `zip_files` does.
    """

    def __init__(self, folder: str | Path, image_size: int, memory_limit: int | None = None, *,
                 label_source: str = "auto", label_columns: Sequence[str] = (), splits: str = "auto",
                 keep: Callable[[str], bool] | None = None):
        if image_size < 8:
            raise DataError(f"an image size of {image_size} pixels is too small: give 8 or more")
        found = DataFolder(folder)
        self.names, self.image_size, self.left_out = list(found.images), image_size, 0
        self.files = [found.files[name] for name in self.names]
        self.images: torch.Tensor | None = None
        self._warned: set[int] = set()

        # Labels, of all images: the class names must not depend on what is kept.
        try:
            labels = find_labels(found, label_source, label_columns, splits)
        except LabelError as error:
            raise DataError(str(error)) from error
        described = ("" if label_source == "none" else f"labels: {labels.origin}", describe_splits(self.names, splits))
        self.origin = "; ".join(filter(None, described))
        types = labels.types or [()] * len(self.files)
        self.class_names = tuple(sorted(set().union(*types)))
        self.labels = torch.from_numpy(multi_hot(types, self.class_names))
        if keep is not None:
            self.keep_only([i for i, name in enumerate(self.names) if keep(name)])
            if not self.files:
                raise DataError(f"none of the wanted images is in {folder}: give the folder that was trained on")

        # Images.
        limit = _default_memory_limit() if memory_limit is None else memory_limit
        if len(self.files) * 3 * image_size**2 <= limit:
            self._decode_all(folder)
        else:
            self[0]  # fails here, in one line, if no file can be read

    @classmethod
    def from_array(cls, images: np.ndarray | torch.Tensor, types: Sequence[Sequence[str]] | None = None,
                   class_names: Sequence[str] = ()) -> ImageFolder:
        """Make a data set of square images in memory, whose names are numbers.

        Args:
            images: uint8 [N, S, S, 3] or [N, 3, S, S].
            types: the names of each image's types, all of them in `class_names`; default: no labels.
        """
        images = torch.as_tensor(images)
        if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        n, size = len(images), images.shape[-1]
        if images.shape != (n, 3, size, size) or images.dtype != torch.uint8 or n == 0:
            raise ValueError(f"want uint8 [N, S, S, 3] or [N, 3, S, S], got {images.dtype} {list(images.shape)}")
        self = cls.__new__(cls)
        self.images, self.image_size, self.left_out, self.origin = images.contiguous(), size, 0, ""
        self.names = _numbered(n)
        self.files = [Path(name) for name in self.names]
        self.class_names = tuple(class_names)
        self.labels = torch.from_numpy(multi_hot(types or [()] * n, self.class_names))
        return self

    def keep_only(self, indices: Sequence[int]) -> None:
        """Remove all images but these, whose indices must rise."""
        self.files, self.names = [self.files[i] for i in indices], [self.names[i] for i in indices]
        self.labels = self.labels[indices]
        if self.images is None:
            return
        if len(indices) < len(self.images):
            for new, old in enumerate(indices):
                self.images[new] = self.images[old]  # in place: a copy would take the memory twice
        self.images = self.images[: len(indices)]

    def fingerprint(self) -> str:
        """Hash the names and labels, to recognise a data set without reading its images."""
        names = b"\0".join(map(os.fsencode, [*self.names, *self.class_names]))
        return hashlib.sha256(names + self.labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image `i`, uint8 [3, S, S], and its row of `labels`.

        A file that cannot be read is named, and the next one that can takes its place.
        """
        if self.images is not None:
            return self.images[i], self.labels[i]
        first = range(len(self))[i]
        for j in itertools.chain(range(first, len(self)), range(first)):
            try:
                return torch.from_numpy(decode_image(self.files[j], self.image_size)), self.labels[j]
            except Exception as error:  # a damaged file can make a decoder raise nearly anything
                if j not in self._warned:
                    print(f"warning: cannot read {printable(self.files[j])}: {decode_error(error)}; using the next "
                          f"image", file=sys.stderr)
                    self._warned.add(j)
        raise DataError(f"none of the {len(self)} image files, from {self.files[0]} on, can be read")

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels of `indices` as one batch; DataLoader calls this instead of B single look-ups."""
        if self.images is not None:
            indices = torch.as_tensor(indices)
            return self.images[indices], self.labels[indices]
        images, labels = zip(*(self[i] for i in indices))
        return torch.stack(images), torch.stack(labels)

    def _decode_all(self, folder: str | Path) -> None:
        images = torch.empty(len(self.files), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def decode(i: int) -> str | None:
            try:
                images[i] = torch.from_numpy(decode_image(self.files[i], self.image_size))
            except Exception as error:  # a damaged file can make a decoder raise nearly anything
                return decode_error(error)

        # Decode in threads: Pillow releases Python's lock while it decodes and scales.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            problems = list(tqdm(pool.map(decode, range(len(self.files))), total=len(self.files),
                                 desc="decoding", unit="image", delay=2, leave=False))

        # Name and leave out what cannot be read.
        unreadable = [(path, problem) for path, problem in zip(self.files, problems) if problem]
        for path, problem in unreadable[:MOST_NAMED]:
            print(f"warning: left out {printable(path)}: {problem}", file=sys.stderr)
        if len(unreadable) > MOST_NAMED:
            print(f"warning: left out {len(unreadable) - MOST_NAMED} more files that cannot be read", file=sys.stderr)
        readable = [i for i, problem in enumerate(problems) if not problem]
        if not readable:
            raise DataError(f"none of the {len(unreadable)} image files in {folder} can be read: give a folder of "
                            f"images")
        self.images, self.left_out = images, len(unreadable)
        self.keep_only(readable)


def load_images(data: str, image_size: int, *, label_source: str = "auto", label_columns: Sequence[str] = (),
                splits: str = "auto", keep: Callable[[str], bool] | None = None, num_critters: int = NUM_CRITTERS,
                seed: int = 0) -> ImageFolder:
    """Load the images of a folder or .zip, or draw the built-in critters if `data` is "critters"; see `ImageFolder`.

    Args:
        num_critters, seed: how many critters, and which. The seed belongs to the data: runs that differ in their own
            seed train on the same critters.

    Raises:
        DataError, ArchiveError: as `ImageFolder` does, and for critters with labels of another source than their own.
    """
    if data != "critters":
        return ImageFolder(data, image_size, label_source=label_source, label_columns=label_columns, splits=splits,
                           keep=keep)
    if label_source not in ("auto", "none", BEFORE_METADATA) or label_columns:
        flag = f"--label_column {' '.join(label_columns)}" if label_columns else f"--labels {label_source}"
        raise DataError(f"critters come with their own types: leave out {flag}, or say --labels none")
    images, types = draw_critters(num_critters, image_size, seed)
    if label_source == "none":
        dataset = ImageFolder.from_array(images)
    else:
        dataset = ImageFolder.from_array(images, types, TYPES)
    if keep is not None:
        dataset.keep_only([i for i, name in enumerate(dataset.names) if keep(name)])
    return dataset


def _default_memory_limit() -> int:
    """Return a quarter of the machine's memory in bytes, divided by the processes that torchrun started here.

    2 GiB where the system does not report its memory (Windows).
    """
    try:
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):
        quarter = 2 * 1024**3
    return quarter // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---------------------------------------------------------------------------------------------------------------------
# latents that are encoded once


def encode_dataset(dataset: ImageFolder, space: PixelSpace | LatentSpace, mode: str, precision: str,
                   num_augmentations: int = 0, blank: bool = False) -> ImageFolder:
    """Encode a data set once and for all, if the space is latent and the augmentations are few.

    Args:
        mode: one of AUGMENT_MODES.
        precision: of the encoder's arithmetic.
        num_augmentations: `count` of `fixed_augmentations`; 0: those of the mode "full" are not fixed.
        blank: leave the latents zero, to time a training without encoding anything.

    Returns:
        A copy of the data set whose `images` are latents [N, W, C, h, w] on the CPU, each image by each of the W
        `fixed_augmentations`: float32, or float16 in the mode "full". The data set itself where nothing can be encoded
        in advance: in pixel space, in the mode "full" without a number, and if the images do not fit in memory.

    Raises:
        DataError: if the latents do not fit in memory.
    """
    if not space.is_latent or (mode == "full" and not num_augmentations) or dataset.images is None:
        return dataset
    versions, shape = fixed_augmentations(mode, num_augmentations), space.shape(dataset.image_size)
    dtype = torch.float16 if mode == "full" else torch.float32
    room = _default_memory_limit() // (len(dataset) * math.prod(shape) * dtype.itemsize)
    if len(versions) > max(room, 2):
        raise DataError(f"{len(versions)} augmentations of {len(dataset):,} images do not fit in a quarter of the "
                        f"memory: give --fixed_augmentations {max(room - 2, 0)} or fewer")
    encoded = copy.copy(dataset)
    if blank:
        encoded.images = torch.zeros(1, len(versions), *shape, dtype=dtype).expand(len(dataset), -1, -1, -1, -1)
        return encoded
    encoded.images = torch.empty(len(dataset), len(versions), *shape, dtype=dtype)
    for indices in tqdm(torch.arange(len(dataset)).split(32), desc="encoding", unit="batch", delay=2, leave=False):
        images = dataset.images[indices].to(space.device)
        for i, version in enumerate(versions):
            x, _ = augment(images, mode=mode, augment_rand=version.repeat(len(images), 1))
            encoded.images[indices, i] = space.encode(x, precision).to("cpu", dtype)
    return encoded
