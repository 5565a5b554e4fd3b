"""The images of a run: those to train on, those held out, and those that an autoencoder is measured with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from critters import UNSEEN_SEEDS
from training.augment import augment
from training.config import TrainingConfig
from training.dataset import ImageFolder, held_out_names, image_names, load_images

MAX_MEASURED = 100  # images that an autoencoder's PSNR is measured with
MAX_STATISTICS = 500  # images that the normalisation of latents is measured with


@dataclass
class RunImages:
    """The images of a run.

    Attributes:
        dataset: the images to train on.
        held_out: names of the images that are not in it.
        fingerprint: of the data set's names and labels.
    """

    dataset: ImageFolder
    held_out: list[str]
    fingerprint: str


def load_run_images(config: TrainingConfig, checkpoint: dict[str, Any] | None) -> RunImages:
    """Load a run's images. A resumed run holds out what it held out before, whatever was added to the folder.

    Raises:
        ValueError, DataError: for a folder without usable images, or other images than those of the run to resume.
    """
    if checkpoint is None:
        names = image_names(config.data, config.num_critters)
        held_out = held_out_names(names, config.holdout, config.splits)
        if len(held_out) == len(names):
            raise ValueError(f"--holdout {config.holdout} holds out all of the {len(names)} images; give less")
    else:
        held_out = checkpoint["held_out"]
    excluded = set(held_out)
    dataset = load_images(
        config.data, config.image_size, label_source=getattr(config, "labels", "none"),
        label_columns=getattr(config, "label_column", ()), splits=config.splits,
        keep=lambda name: name not in excluded, num_critters=config.num_critters, seed=config.data_seed,
    )
    images = RunImages(dataset, held_out, dataset.fingerprint())
    if checkpoint is not None:
        _check_same_images(config.data, images, checkpoint)
    return images


def _check_same_images(data: str, images: RunImages, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if the images or labels are not those of the run to resume."""
    dataset = images.dataset
    if len(dataset) != checkpoint["num_images"]:
        raise ValueError(f"{data} has {len(dataset)} usable images and the run to resume had "
                         f"{checkpoint['num_images']}; bring those back, or start another run with --run_name")
    if list(dataset.class_names) != checkpoint["types"]:
        raise ValueError(f"{data} has the types {' '.join(dataset.class_names) or '(none)'} and the run to resume had "
                         f"{' '.join(checkpoint['types']) or '(none)'}; bring its labels back")
    if images.fingerprint != checkpoint["fingerprint"]:
        raise ValueError(f"{data} has other file names or other labels than when the run to resume began; bring those "
                         f"back, or start another run with --run_name")


def plain_batches(dataset: ImageFolder) -> Iterator[torch.Tensor]:
    """Yield up to 500 images, spread over the data set, in batches [B, 3, S, S] in [-1, 1]."""
    chosen = torch.linspace(0, len(dataset) - 1, min(MAX_STATISTICS, len(dataset))).round().long()
    for indices in tqdm(chosen.split(32), desc="measuring latents", unit="batch", delay=2, leave=False):
        yield augment(dataset.__getitems__(indices.tolist())[0], mode="none")[0]


def images_to_measure(config: TrainingConfig, images: RunImages) -> tuple[torch.Tensor, str]:
    """Choose up to 100 images to measure an autoencoder with.

    They are held-out images or, for critters without --holdout, ones of another seed; else training images.

    Returns:
        Images [N, 3, S, S] in [-1, 1], and a phrase that says where they come from.
    """
    if images.held_out:
        every = math.ceil(len(images.held_out) / MAX_MEASURED)  # spread over all, which are sorted by name
        chosen = set(images.held_out[::every])
        dataset = load_images(config.data, config.image_size, label_source="none", keep=lambda name: name in chosen,
                              num_critters=config.num_critters, seed=config.data_seed)
        origin = "held-out images"
    elif config.data == "critters":
        dataset = load_images("critters", config.image_size, label_source="none", num_critters=MAX_MEASURED,
                              seed=UNSEEN_SEEDS["autoencoder"])
        origin = "unseen critters"
    else:
        dataset, origin = images.dataset, "training images (--holdout holds some out)"
    indices = torch.linspace(0, len(dataset) - 1, min(len(dataset), MAX_MEASURED)).round().long().tolist()
    return dataset.__getitems__(indices)[0].float() / 127.5 - 1, origin
