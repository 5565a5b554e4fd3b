"""Does a model of critters draw what it is asked for? A check that knows the types' palettes answers.

    python recognise.py --checkpoint checkpoints/critters.pt         # 100 images of each type, 20 of each pair

    recogniser = CritterRecogniser(image_size=32)
    recogniser.types(pixels, count=1)          # the likeliest type of each picture, or with count=2 the likeliest pair

No network is in the check. A picture's foreground is sorted into the colours of all palettes, and a linear map, fitted
by least squares to critters that the program drew, turns the shares of the colours into a score for each type. On
critters of other seeds it named 1,000 of 1,000 single types and 900 of 900 pairs (tests/test_recognise.py asks for
nearly as much of fewer). It looks at colours alone: a red smudge is "fire" to it, so look at the pictures too.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import CheckpointError, load_model
from critters import PALETTES, TYPES, draw_critters
from devices import pick_device, pick_precision
from flags import Parser, finite, natural, positive
from labels import multi_hot
from pictures import to_pixels
from reverse_diffusion import DEFAULT_GUIDANCE, SAMPLERS, sample_seeds

WHITE = 255 * np.ones((1, 3))
BATCH_SIZE = 64
NEAR = 0.04  # distance in OKLab over which two colours look alike


class CritterRecogniser:
    """Scores for `critters.TYPES`, fitted on `count` critters of one size, drawn with a seed of their own."""

    def __init__(self, image_size: int, count: int = 1000, seed: int = 1_000_003):
        images, labels = draw_critters(count, image_size, seed)
        wanted = np.array([[name in types for name in TYPES] for types in labels], float)
        shares = color_shares(images)
        # Ridge regression; the small term only keeps the system solvable where a colour never occurs.
        self.weights = np.linalg.solve(shares.T @ shares + 0.01 * np.eye(shares.shape[1]), shares.T @ wanted)

    def scores(self, images: np.ndarray) -> np.ndarray:
        """How much of each type is in each picture: uint8 [N, S, S, 3] -> float [N, len(TYPES)], about 0 to 1."""
        return color_shares(images) @ self.weights

    def types(self, images: np.ndarray, count: int) -> list[frozenset[str]]:
        """The `count` types with the highest scores, as a set for each picture."""
        best = np.argsort(self.scores(images), axis=1)[:, -count:]
        return [frozenset(TYPES[i] for i in row) for row in best]


def color_shares(images: np.ndarray, chunk: int = 64) -> np.ndarray:
    """Roots of the shares of the foreground that look like each palette colour: uint8 [N, S, S, 3] -> [N, 5 K + 1].

    A palette's fifth colour is its outline, half as bright as its shade. Roots, because a small horn or flame says as
    much as a large belly. The last column is 1, the linear map's offset.
    """
    colors = np.array([color for p in PALETTES.values()
                       for color in (p.main, p.light, p.dark, p.accent, tuple(c / 2 for c in p.dark))])
    colors, white = oklab(colors), oklab(WHITE)
    rows = []
    for i in range(0, len(images), chunk):
        pixels = oklab(images[i : i + chunk].reshape(len(images[i : i + chunk]), -1, 3))
        foreground = 1 - np.exp(-((pixels - white) ** 2).sum(-1) / 0.03**2)
        distance = ((pixels[:, :, None] - colors) ** 2).sum(-1)
        alike = np.exp(-(distance - distance.min(-1, keepdims=True)) / NEAR**2)
        alike *= (foreground / alike.sum(-1))[..., None]
        shares = alike.sum(1) / np.maximum(foreground.sum(1, keepdims=True), 1e-9)
        rows.append(np.hstack([np.sqrt(shares), np.ones((len(shares), 1))]))
    return np.vstack(rows)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """8-bit sRGB [..., 3] in the coordinates of OKLab (Ottosson 2020), where equal distances look equally different."""
    c = rgb / 255.0
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])
    lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])
    return np.cbrt(c @ cones.T) @ lab.T


def main() -> None:
    parser = Parser(description="Measure whether a model of critters draws the types that it is asked for.")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/critters.pt"), help="of a model of "
                        "critters with types (default: checkpoints/critters.pt)")
    parser.add_argument("--num_images", type=positive, default=100, help="images of each type (default: 100)")
    parser.add_argument("--num_pairs", type=positive, default=20, help="images of each pair of types (default: 20)")
    parser.add_argument("--guidance", type=finite, default=DEFAULT_GUIDANCE, help="how strongly they are pushed "
                        f"towards their types (default: {DEFAULT_GUIDANCE:g})")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm++", help="(default: dpm++)")
    parser.add_argument("--steps", type=positive, default=20, help="network passes an image (default: 20)")
    parser.add_argument("--seed", type=natural, default=0, help="of the first image of each type (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps, cpu, ... (default: auto)")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        precision = pick_precision("auto", device)
        model, scheduler, codec, config = load_model(args.checkpoint, device)
        if tuple(config["types"]) != TYPES:
            raise ValueError(f"{args.checkpoint} is not a model of critters with their types; train one: "
                             f"python train.py --preset quick")
        singles = [(name,) for name in TYPES]
        pairs = list(itertools.combinations(TYPES, 2))
        asked = [types for types in singles for _ in range(args.num_images)]
        asked += [types for types in pairs for _ in range(args.num_pairs)]
        seeds = [args.seed + i for _ in singles for i in range(args.num_images)]
        seeds += [args.seed + i for _ in pairs for i in range(args.num_pairs)]
        with tqdm(total=args.steps * math.ceil(len(seeds) / BATCH_SIZE), unit="step", dynamic_ncols=True) as bar:
            images = sample_seeds(
                model, scheduler, seeds, config["image_size"], device, precision, codec=codec, batch_size=BATCH_SIZE,
                types=torch.from_numpy(multi_hot(asked, TYPES)).float(), guidance=args.guidance, sampler=args.sampler,
                steps=args.steps, prediction=config["prediction"], callback=lambda *_: bar.update(),
            )
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; give a smaller --num_images and --num_pairs")
    except KeyboardInterrupt:
        sys.exit(130)

    recogniser = CritterRecogniser(config["image_size"])
    pixels = to_pixels(images).permute(0, 2, 3, 1).numpy()
    num_singles = len(singles) * args.num_images
    found = recogniser.types(pixels[:num_singles], 1) + recogniser.types(pixels[num_singles:], 2)
    right = np.array([names == set(types) for names, types in zip(found, asked)])
    of_type = right[:num_singles].reshape(len(singles), -1).mean(axis=1)
    of_pair = right[num_singles:].reshape(len(pairs), -1).mean(axis=1)
    print(f"{args.sampler} in {args.steps} steps, guidance {args.guidance:g}; the type asked for is found, of 100, in")
    for name, share in zip(TYPES, of_type):
        print(f"{100 * share:6.1f}  {name}")
    print(f"and both of two types, of 100, in\n{100 * of_pair.mean():6.1f}  on average over all {len(pairs)} pairs; "
          f"the least in")
    for i in np.argsort(of_pair)[:3]:
        print(f"{100 * of_pair[i]:6.1f}  {' '.join(pairs[i])}")


if __name__ == "__main__":
    main()
