"""The images of an evaluation: training images, images that the model has not seen, and samples in a folder.

    infos = [read_info(path) for path in checkpoints]
    data = load_data(common_source(infos), infos[0].held_out, infos[0].class_names)
    data.train, data.unseen                                    # uint8 [N, 3, S, S]
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from critters import TYPES, unseen_critters
from evaluation.artifacts import find_artifacts
from evaluation.features import FeatureSpace
from evaluation.image_statistics import image_statistics
from evaluation.memorization import CopyThreshold, calibrate_thresholds, find_copies
from training.dataset import NUM_CRITTERS, DataError, ImageFolder, find_images, held_out_names, load_images
from training.labels import BEFORE_METADATA
from utils.archive import ZipMember
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.images import decode_image, open_image, read_settings, to_pil
from utils.seeding import seed_from

MAX_UNSEEN = 500  # critters that are drawn, and unseen images that are searched for copies
MAX_REAL = 2000  # images for the measures that do not need all of them
NOTHING_HELD_OUT = (
    "No images were held out of training (train.py --holdout 0.1 does that). There are therefore no bits of unseen "
    "images, and the false alarm rate of the copy test rests on the training images alone.")


@dataclass(frozen=True)
class CheckpointInfo:
    """What is needed of a checkpoint before its weights."""

    path: Path
    epoch: int
    settings: dict[str, Any]  # of the training
    held_out: tuple[str, ...]  # names of the images that it was not trained on
    class_names: tuple[str, ...]
    has_earlier: bool = False  # whether it holds a network of less training, for guidance


@dataclass(frozen=True)
class DataSource:
    """A data set: a folder of images, a .zip of one, or "critters"; where its labels come from, see `find_labels`."""

    data: str
    image_size: int
    label_source: str = "auto"
    num_critters: int = NUM_CRITTERS
    seed: int = 0  # of the critters
    label_columns: tuple[str, ...] = ()
    splits: str = "auto"


@dataclass
class EvaluationData:
    """Images that a model was trained on, and others that it has not seen; uint8 [N, 3, S, S].

    names: of the training images.
    class_names: the model's K classes.
    train_labels, unseen_labels: float [N, K], or None.
    description: one line for people.
    notes: what cannot be measured with these images.

    What several checkpoints are compared with is computed once.
    """

    train: torch.Tensor
    names: list[str]
    unseen: torch.Tensor
    class_names: tuple[str, ...] = ()
    train_labels: torch.Tensor | None = None
    unseen_labels: torch.Tensor | None = None
    description: str = ""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def real(self) -> torch.Tensor:
        """Up to 2,000 training and unseen images in random order."""
        generator = torch.Generator().manual_seed(seed_from(len(self.train), stream="evaluate"))
        real = torch.cat([self.train, self.unseen])
        return real[torch.randperm(len(real), generator=generator)[:MAX_REAL]]

    @cached_property
    def feature_space(self) -> FeatureSpace:
        return FeatureSpace(self.real)

    @cached_property
    def copy_thresholds(self) -> dict[str, CopyThreshold]:
        """Raises ValueError, as `calibrate_thresholds` does, if there are too few training images."""
        return calibrate_thresholds(self.train, self.feature_space)

    @cached_property
    def false_alarms(self) -> dict[str, torch.Tensor] | None:
        """Which unseen images count as copies, see `find_copies`; None without unseen images."""
        if len(self.unseen) == 0:
            return None
        return find_copies(self.unseen[:MAX_UNSEEN], self.train, self.copy_thresholds, self.feature_space)[1]

    @cached_property
    def real_artifacts(self) -> dict[str, torch.Tensor]:
        return find_artifacts(self.real)

    @cached_property
    def real_statistics(self) -> dict[str, torch.Tensor]:
        return image_statistics(self.real)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def read_info(path: Path) -> CheckpointInfo:
    """Read what a checkpoint says of its training; the weights stay in the file.

    Raises:
        CheckpointError: as `load_checkpoint` does, and if it holds no diffusion model, or does not say what it was
            trained on.
    """
    content = load_checkpoint(path, mmap=True)
    if "network" not in content:
        raise CheckpointError(f"{path} holds no diffusion model; choose the checkpoint of a train.py run")
    try:
        return CheckpointInfo(path, content["epoch"], content["config"], tuple(content.get("held_out", ())),
                              tuple(content.get("types", ())), "earlier" in content)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not say what it was trained on; choose another file") from error


def common_source(infos: Sequence[CheckpointInfo]) -> DataSource:
    """Return the data set that all checkpoints were trained on.

    Raises:
        ValueError: if they differ in it, in the images that were held out, or in the types.
    """
    sources = [_source_of(info) for info in infos]
    compared = [(_comparable(source), info.held_out, info.class_names) for source, info in zip(sources, infos)]
    if any(other != compared[0] for other in compared):
        raise ValueError("the checkpoints were trained on different data; evaluate them one at a time")
    return sources[0]


def _source_of(info: CheckpointInfo) -> DataSource:
    settings = info.settings
    try:
        return DataSource(
            settings["data"], settings["image_size"], settings.get("labels") or "auto",
            settings.get("num_critters", NUM_CRITTERS),
            settings.get("data_seed", settings.get("seed", 0)),  # older trainings drew the critters from their own seed
            tuple(settings.get("label_column") or ()), settings.get("splits", "none"),
        )
    except KeyError as error:
        raise CheckpointError(f"{info.path} does not say what it was trained on; choose another file") from error


def _comparable(source: DataSource) -> DataSource:
    """Leave out what older checkpoints call otherwise; what they found shows in held-out images and types."""
    label_source = "auto" if source.label_source == BEFORE_METADATA else source.label_source
    return replace(source, label_source=label_source, splits="auto")


# ---------------------------------------------------------------------------------------------------------------------
# real images


def load_data(source: DataSource, held_out: Sequence[str] | None = (), class_names: Sequence[str] = ()
              ) -> EvaluationData:
    """Load a data set, and divide it into training and unseen images.

    Unseen are the images with the names `held_out`; if that is None, those of the splits validation and test. If there
    are none and the data set is the critters, others are drawn that no model is trained on.

    Raises:
        DataError, ArchiveError: as `load_images` does.
        ValueError: if the images do not fit in memory, or none of the held-out images is among them.
    """
    label_source, label_columns = (source.label_source, source.label_columns) if class_names else ("none", ())
    dataset = load_images(source.data, source.image_size, label_source=label_source, label_columns=label_columns,
                          splits=source.splits, num_critters=source.num_critters, seed=source.seed)
    images = _in_memory(dataset, source.data)
    held_out = set(held_out_names(dataset.names, 0, source.splits) if held_out is None else held_out)
    is_unseen = torch.tensor([name in held_out for name in dataset.names])
    if held_out and not is_unseen.any():
        raise ValueError(f"none of the {len(held_out)} images that were held out of the training is in {source.data}: "
                         f"--data must be the folder of the training, or a copy of it")
    labels = _labels_for(dataset, class_names) if class_names else None
    names = [name for name in dataset.names if name not in held_out]
    data = EvaluationData(images[~is_unseen], names, images[is_unseen], tuple(class_names))
    if labels is not None:
        data.train_labels, data.unseen_labels = labels[~is_unseen], labels[is_unseen]

    data.description = (f"{len(names):,} training images of {source.image_size} x {source.image_size} from "
                        f"{source.data}")
    if is_unseen.any():
        data.description += f", {is_unseen.sum():,} held out"
    elif source.data == "critters":
        _add_unseen_critters(data, source.image_size, class_names)
        data.description += f", {len(data.unseen):,} unseen ones drawn for comparison"
    else:
        data.description += ", none held out"
        data.notes.append(NOTHING_HELD_OUT)
    return data


def _add_unseen_critters(data: EvaluationData, image_size: int, class_names: Sequence[str]) -> None:
    images, types = unseen_critters("evaluation", min(MAX_UNSEEN, len(data.train)), image_size)
    dataset = ImageFolder.from_array(images, types, TYPES)
    data.unseen = dataset.images
    if class_names:
        data.unseen_labels = _labels_for(dataset, class_names)


def _labels_for(dataset: ImageFolder, class_names: Sequence[str]) -> torch.Tensor:
    """Return the labels of a data set in the order of a model's classes, float [N, K]."""
    labels = torch.zeros(len(dataset), len(class_names))
    for column, name in enumerate(class_names):
        if name in dataset.class_names:
            labels[:, column] = dataset.labels[:, dataset.class_names.index(name)].float()
    return labels


def _in_memory(dataset: ImageFolder, folder: str | Path) -> torch.Tensor:
    """Return the images of a data set; raise ValueError if they were not decoded at once."""
    if dataset.images is None:
        raise ValueError(f"the {len(dataset)} images in {folder} do not fit in memory; give a smaller folder")
    return dataset.images


# ---------------------------------------------------------------------------------------------------------------------
# samples


def load_samples(folder: Path, image_size: int) -> torch.Tensor:
    """Load a folder of samples as uint8 [N, 3, image_size, image_size].

    Images that `generate.py --scale` enlarged are reduced to the pixels that the model drew, which their metadata
    allow; scaling them down as other images would blur them.

    Raises:
        DataError: as `ImageFolder` does.
        ValueError: if they do not fit in memory.
    """
    dataset = ImageFolder(folder, image_size, label_source="none")
    images = _in_memory(dataset, folder)
    for i, path in enumerate(dataset.files):
        scale, side = _scale_and_side(path)
        if scale > 1:
            pixels = torch.from_numpy(decode_image(path, scale * side)[:, ::scale, ::scale].copy())
            images[i] = pixels if side == image_size else _resize(pixels, image_size)
    return images


def native_side(folder: Path) -> int:
    """Return the side in pixels of the first image in a folder of samples, as the model drew it.

    Raises:
        DataError: if there is no image, or none that can be read.
    """
    for path in find_images(folder):
        with contextlib.suppress(Exception):  # a damaged file can make Pillow raise nearly anything
            return _scale_and_side(path)[1]
    raise DataError(f"none of the image files in {folder} can be read: give a folder of images")


def _scale_and_side(path: Path | ZipMember) -> tuple[int, int]:
    """Return by how much generate.py enlarged an image (1 if it did not), and the image's shorter side before that."""
    with open_image(path) as image:
        size = image.size
    try:
        settings = read_settings(path)
        side, scale = settings["image_size"], settings["scale"]
    except (ValueError, KeyError, TypeError, OSError):  # another image, or damaged metadata
        return 1, min(size)
    if type(side) is int and type(scale) is int and scale > 1 and size == (scale * side, scale * side):
        return scale, side
    return 1, min(size)


def _resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize a square image, uint8 [3, S, S], as `decode_image` does."""
    resized = to_pil(pixels).resize((side, side), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
