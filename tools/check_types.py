"""Measure how often a model of critters draws the requested types.

    python -m tools.check_types --checkpoint checkpoints/critters.pt    # 100 images of each type, 20 of each pair

The types of a sample are recognised by the colours of their palettes, without a network: see critters/recognizer.py.
The model may have been trained on the built-in critters or on a folder that `python -m critters` wrote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from critters import TYPES
from critters.recognizer import CritterRecognizer
from models.pipeline import BY_EARLIER, DEFAULT_GUIDANCE, Pipeline
from reverse_diffusion import SAMPLERS
from utils.cli import device_setting, parse, seed_setting, setting
from utils.device import pick_device
from utils.errors import one_line_errors
from utils.images import to_uint8

SINGLES = [(name,) for name in TYPES]
PAIRS = list(itertools.combinations(TYPES, 2))
BATCH_SIZE = 64
LOWEST = 3  # pairs that are named in the report


@dataclass
class Settings:
    """The flags of this command."""

    checkpoint: str = setting("checkpoints/critters.pt", "checkpoint of a model of critters")
    num_images: int = setting(100, "images of each type", least=1)
    num_pairs: int = setting(20, "images of each pair of types", least=1)
    guidance: float | None = setting(
        None, f"guidance scale; 1: off (default: {DEFAULT_GUIDANCE:g}, or 1 for a model that was trained with "
        "--label_dropout 0 and holds no earlier network)", kind=float)
    guide: str | None = setting(None, "what guidance goes away from, as in generate.py", kind=str)
    sampler: str = setting("dpm++", "how to sample", tuple(SAMPLERS))
    steps: int = setting(20, "network passes for each image", least=1)
    seed: int = seed_setting("seed of the first image of each type and pair; the others follow")
    device: str = device_setting()


def main() -> None:
    with one_line_errors(out_of_memory="give smaller --num_images and --num_pairs"):
        settings = parse(Settings, "Measure how often a model of critters draws the requested types.",
                         prog="python -m tools.check_types")
        pipeline = Pipeline.load(settings.checkpoint, pick_device(settings.device))
        if sorted(pipeline.class_names) != sorted(TYPES):
            raise ValueError(f"{settings.checkpoint} is not a model of critters with their types; train one: "
                             f"python train.py --preset quick")
        settings.guide = pipeline.use_guide(settings.guide)
        if settings.guidance is None:
            settings.guidance = pipeline.default_guidance(has_types=True, guide=settings.guide)

        # Draw.
        requested = [types for types in SINGLES for _ in range(settings.num_images)]
        requested += [types for types in PAIRS for _ in range(settings.num_pairs)]
        images = draw(pipeline, requested, settings)

        # Recognise.
        recognizer = CritterRecognizer(pipeline.image_size)
        num_singles = len(SINGLES) * settings.num_images
        recognized = recognizer.types(images[:num_singles], 1) + recognizer.types(images[num_singles:], 2)
        correct = np.array([names == set(types) for names, types in zip(recognized, requested)])
        print(f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}"
              + (f" ({pipeline.earlier_name if settings.guide == BY_EARLIER else settings.guide})"
                 if settings.guide else ""))
        print_report(correct[:num_singles].reshape(len(SINGLES), -1).mean(axis=1),
                     correct[num_singles:].reshape(len(PAIRS), -1).mean(axis=1))


def draw(pipeline: Pipeline, requested: Sequence[tuple[str, ...]], settings: Settings) -> np.ndarray:
    """Draw an image for each of the N requests: uint8 [N, S, S, 3]."""
    seeds = [settings.seed + i for _ in SINGLES for i in range(settings.num_images)]
    seeds += [settings.seed + i for _ in PAIRS for i in range(settings.num_pairs)]
    labels = pipeline.class_labels(requested)
    # Checked by `sample` as well, but an error must not follow a progress bar.
    pipeline.choose_sampler(settings.sampler, settings.steps)
    settings.guide = pipeline.choose_guide(settings.guidance, labels, settings.guide)
    passes = settings.steps * math.ceil(len(seeds) / BATCH_SIZE)
    with tqdm(total=passes, unit="step", dynamic_ncols=True) as bar:
        images = pipeline.sample(seeds, labels=labels, guidance=settings.guidance, guide=settings.guide,
                                 sampler=settings.sampler, steps=settings.steps, batch_size=BATCH_SIZE,
                                 callback=lambda *_: bar.update())
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def print_report(correct_singles: np.ndarray, correct_pairs: np.ndarray) -> None:
    """Print the fractions of images that show what was requested, of each type and of each pair."""
    print("images that show the requested type, in percent:")
    for name, fraction in zip(TYPES, correct_singles):
        print(f"{100 * fraction:6.1f}  {name}")
    print(f"images that show both of two requested types, in percent:\n"
          f"{100 * correct_pairs.mean():6.1f}  mean of all {len(PAIRS)} pairs")
    for i in np.argsort(correct_pairs)[:LOWEST]:
        print(f"{100 * correct_pairs[i]:6.1f}  {' '.join(PAIRS[i])}")


if __name__ == "__main__":
    main()
