"""Hand-written image features: 70 numbers per image, without a trained network.

    space = FeatureSpace(real_images)          # images uint8 [N, 3, S, S]
    features = space(images)                   # float32 [M, 70]; similar images are close together

Four descriptors (see `image_descriptors`) are concatenated: colour layout, colour histogram, oriented gradients at
three scales (in the manner of Dalal & Triggs 2005), and sharpness at the same three scales. Layout and gradients
separate shapes, colours separate types of creature, and sharpness separates blurred or grainy images from clean ones.

The first three have the same total variance, and the 64 directions in which real images vary most are kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CELLS = 4  # gradients are summed in 4 x 4 cells
DIRECTIONS = 6
SHADES = 5  # histogram bins for each of red, green and blue
SCALES = 3  # the image, and halved once and twice
BATCH = 64


def image_descriptors(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Describe images, uint8 [N, 3, S, S] with S at least 8.

    Returns:
        float32 colour layout [N, 192], colour histogram [N, 125], gradients [N, 288] and sharpness [N, 6].
    """
    x = images.float() / 255
    scales = [x]
    while len(scales) < SCALES:
        x = F.avg_pool2d(x, 2) if x.shape[-1] >= 8 else x
        scales.append(x)
    layout = F.adaptive_avg_pool2d(scales[0], 8).flatten(1)
    colours = _colour_histogram(scales[0])
    gradients = torch.cat([_oriented_gradients(x) for x in scales], dim=1)
    sharpness = torch.cat([_sharpness(x) for x in scales], dim=1)
    return layout, colours, gradients, sharpness


def _colour_histogram(x: torch.Tensor) -> torch.Tensor:
    """Return square roots of the fractions of 5 x 5 x 5 colours, [N, 125]; pixels are shared between adjacent bins."""
    position = F.adaptive_avg_pool2d(x, min(32, x.shape[-1])).flatten(2) * (SHADES - 1)  # [N, 3, P], 0 ... 4
    bins = torch.arange(SHADES, device=x.device).view(1, 1, SHADES, 1)
    weight = (1 - (position[:, :, None] - bins).abs()).clamp(min=0)  # [N, 3, 5, P]
    red, green, blue = weight.unbind(1)
    red_green = (red[:, :, None] * green[:, None]).flatten(1, 2)  # [N, 25, P]
    return (red_green @ blue.transpose(1, 2)).flatten(1).div(position.shape[-1]).sqrt()


def _oriented_gradients(x: torch.Tensor) -> torch.Tensor:
    """Return square roots of the gradient strength by direction (6) and cell (4 x 4), [N, 96]."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    # The strength is shared between the two nearest directions, which repeat every half turn.
    angle = torch.atan2(dy, dx).remainder(math.pi) * (DIRECTIONS / math.pi)
    strength = (dx**2 + dy**2).sqrt()
    cells = []
    for direction in range(DIRECTIONS):
        difference = (angle - direction).abs()
        weight = (1 - torch.minimum(difference, DIRECTIONS - difference)).clamp(min=0)
        cells.append(F.adaptive_avg_pool2d((strength * weight).sum(1), CELLS))
    return torch.stack(cells, dim=1).flatten(1).sqrt()


def _sharpness(x: torch.Tensor) -> torch.Tensor:
    """Return how far pixels are from the mean of their 3 x 3 neighbourhood, [N, 2], as logarithms.

    The mean absolute deviation reacts most to grain on a plain background, the root mean square to sharp edges.
    """
    deviation = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).flatten(1)
    mean, rms = deviation.abs().mean(dim=1), deviation.square().mean(dim=1).sqrt()
    return torch.stack([mean, rms], dim=1).clamp(min=1e-3).log()


class FeatureSpace:
    """Map from images to features, fitted to real images: `space(images)` -> float32 [N, dimensions + 6].

    Layout, colours and gradients are each centred and scaled to a total variance of 1 over the real images, so that
    their units do not matter. The principal components of the three together are each divided by the square root of
    their standard deviation. This is halfway between no scaling, where a few broad differences dominate, and whitening,
    where the weakest component counts as much as the strongest. A creature's nearest neighbours are then at a distance
    of about 1. Sharpness is appended in its own units, where a factor of e counts as 1: drawings are all equally sharp,
    so after scaling by the standard deviation the slightest blur would outweigh everything else.
    """

    def __init__(self, images: torch.Tensor, dimensions: int = 64):
        *blocks, sharpness = _describe_in_batches(images)
        self.means = [block.mean(dim=0) for block in blocks]
        self.scales = [block.var(dim=0, unbiased=False).sum().sqrt().clamp(min=1e-6) for block in blocks]
        self.mean_sharpness = sharpness.mean(dim=0)

        # Principal components
        normalised = self._normalise(blocks)
        variances, axes = torch.linalg.eigh(normalised.T @ normalised / len(normalised))  # ascending
        kept = max(1, min(dimensions, len(images) - 1))
        deviations = variances.flip(0)[:kept].clamp(min=1e-12).sqrt()
        self.axes = axes.flip(1)[:, :kept] / deviations.clamp(min=1e-3 * deviations[0]).sqrt()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        *blocks, sharpness = _describe_in_batches(images)
        return torch.cat([self._normalise(blocks) @ self.axes, sharpness - self.mean_sharpness], dim=1)

    def _normalise(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        centred = [(block - mean) / scale for block, mean, scale in zip(blocks, self.means, self.scales)]
        return torch.cat(centred, dim=1)


def _describe_in_batches(images: torch.Tensor) -> list[torch.Tensor]:
    """Return `image_descriptors` of all images; only the pixels of one batch are in memory as floats."""
    batches = [image_descriptors(batch) for batch in images.split(BATCH)]
    return [torch.cat(block) for block in zip(*batches)]
