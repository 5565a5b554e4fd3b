"""Look at a data set as training will see it: count the images and types, draw what augmentation does.

    python -m tools.preview_data data/pokemon_jpg --image_size 64       # writes outputs/augmentation.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from training.augment import augment
from training.dataset import POKEMON_FOLDER, ImageFolder, load_images
from training.splits import SPLIT_SETTINGS
from utils.cli import parse, seed_setting, setting
from utils.errors import one_line_errors, printable
from utils.images import LONGEST_SIDE, image_grid, save_image, to_uint8

NUM_IMAGES = 8  # rows of the grid
NUM_AUGMENTED = 7  # columns beside the plain images


@dataclass
class Settings:
    """The flags of this command."""

    folder: str = setting(POKEMON_FOLDER, "folder of images, at any depth, or a .zip of one; or 'critters', the "
                                          "built-in creatures", positional=True)
    labels: str = setting("auto", "source of the images' types, as in train.py")
    label_column: tuple[str, ...] = setting((), "columns of the metadata that hold the types, as in train.py (default: "
                                            "those with a usual name)", kind=str, metavar="NAME")
    splits: str = setting("auto", "whether top folders named train, validation and test divide the images, as in "
                                  "train.py", SPLIT_SETTINGS)
    image_size: int = setting(64, "side of the decoded images, in pixels", least=8, most=4096)
    seed: int = seed_setting("seed of the augmentations")
    output: str = setting("outputs/augmentation.png", "image file to write")


def main() -> None:
    with one_line_errors(out_of_memory="give a smaller --image_size"):
        settings = parse(Settings, "Count a folder's images and draw what augmentation does to them.",
                         prog="python -m tools.preview_data")
        check(settings)
        dataset = load_images(settings.folder, settings.image_size, label_source=settings.labels,
                              label_columns=settings.label_column, splits=settings.splits)
        print(f"{len(dataset):,} images in {printable(settings.folder)}, {dataset.left_out:,} files left out")
        if dataset.origin:
            print(printable(dataset.origin))
        for name, count in zip(dataset.class_names, dataset.labels.sum(0, dtype=torch.long).tolist()):
            print(f"{count:6d} {printable(name)}")
        save_image(augmentation_grid(dataset, settings.seed), settings.output)
        print(f"{printable(settings.output)}: left column plain, the other {NUM_AUGMENTED} augmented")


def check(settings: Settings) -> None:
    """Raise ValueError for an output of an unknown format."""
    if Path(settings.output).suffix.lower() not in LONGEST_SIDE:
        raise ValueError(f"--output must end in one of {', '.join(LONGEST_SIDE)}, not {settings.output}")


def augmentation_grid(dataset: ImageFolder, seed: int) -> Image.Image:
    """Draw images spread over the data set, one a row: plain on the left, then augmented versions."""
    chosen = torch.linspace(0, len(dataset) - 1, NUM_IMAGES, dtype=torch.float64).round().long().tolist()
    images, _ = dataset.__getitems__(chosen)
    generator = torch.Generator().manual_seed(seed)
    columns = [augment(images, generator, "none")[0]]
    columns += [augment(images, generator, "full")[0] for _ in range(NUM_AUGMENTED)]
    return image_grid(to_uint8(torch.stack(columns, dim=1).flatten(0, 1)), columns=len(columns))


if __name__ == "__main__":
    main()
