"""A feature space that is written down: what a picture looks like in a few hundred numbers, without a trained network.

    space = FeatureSpace(real_images)          # images uint8 [N, 3, S, S]
    f = space(images)                          # float32 [M, 70]: near means alike

Four descriptions are put side by side (`describe`): where which colours are, which colours there are at all, how much
edge of which direction is where, at three scales, and how much there is at all at each of the three. The first three
are the classical ones from before trained features (colour layout, colour histogram, and oriented gradients in the
manner of Dalal & Triggs 2005): layout and edges tell shapes apart, colours tell types apart. The last tells what is
blurred or grainy from what is clean.

Layout, colours and edges get the same weight, and the 64 directions in which real pictures differ most are kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CELLS = 4  # edges are counted in 4 x 4 cells
DIRECTIONS = 6
SHADES = 5  # of each of red, green and blue, in the histogram


def describe(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The descriptions of pictures uint8 [N, 3, S, S], S at least 8: float32 [N, 192], [N, 125], [N, 288], [N, 6]."""
    x = images.float() / 255
    scales = [x]
    while len(scales) < 3:
        x = F.avg_pool2d(x, 2) if x.shape[-1] >= 8 else x
        scales.append(x)
    edges, grain = torch.cat([_edges(x) for x in scales], dim=1), torch.cat([_grain(x) for x in scales], dim=1)
    return F.adaptive_avg_pool2d(scales[0], 8).flatten(1), _colours(scales[0]), edges, grain


def _colours(x: torch.Tensor) -> torch.Tensor:
    """A histogram of 5 x 5 x 5 colours, each pixel shared between the nearest shades; square roots of the shares."""
    place = F.adaptive_avg_pool2d(x, min(32, x.shape[-1])).flatten(2) * (SHADES - 1)  # [N, 3, P], 0 ... 4
    shades = torch.arange(SHADES, device=x.device).view(1, 1, SHADES, 1)
    weight = (1 - (place[:, :, None] - shades).abs()).clamp(min=0)  # [N, 3, 5, P]
    red, green, blue = weight.unbind(1)
    red_green = (red[:, :, None] * green[:, None]).flatten(1, 2)  # [N, 25, P]
    return (red_green @ blue.transpose(1, 2)).flatten(1).div(place.shape[-1]).sqrt()


def _edges(x: torch.Tensor) -> torch.Tensor:
    """How much edge of each of 6 directions is in each of 4 x 4 cells, [N, 96]: square roots of the strength."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    # The strength is spread over the two nearest of the directions, which go round in half a turn.
    angle = torch.atan2(dy, dx).remainder(math.pi) * (DIRECTIONS / math.pi)
    strength = (dx**2 + dy**2).sqrt()
    cells = []
    for k in range(DIRECTIONS):
        off = (angle - k).abs()
        near = (1 - torch.minimum(off, DIRECTIONS - off)).clamp(min=0)
        cells.append(F.adaptive_avg_pool2d((strength * near).sum(1), CELLS))
    return torch.stack(cells, dim=1).flatten(1).sqrt()


def _grain(x: torch.Tensor) -> torch.Tensor:
    """How far pixels are from the mean of their 3 x 3 neighbours, [N, 2]: logarithms of the mean, which grain on a
    plain background raises most, and of the root of the mean square, which is made by sharp edges."""
    off = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).flatten(1)
    return torch.stack([off.abs().mean(dim=1), off.square().mean(dim=1).sqrt()], dim=1).clamp(min=1e-3).log()


class FeatureSpace:
    """The map from pictures to features, fitted to real ones: `space(images)` -> float32 [N, dimensions + 6].

    Layout, colours and edges are each centred and scaled to a total variance of 1 over the real pictures, so that none
    outweighs the others by its units. Of them together the principal components are kept, each divided by the square
    root of its deviation: halfway between leaving them, where a few broad differences are all that counts, and making
    all deviations 1, where the faintest component counts as much as the first. A creature's nearest neighbours are then
    around 1 away. The grain is put beside them in its own units: a factor of e counts for 1. Scaled by its deviation it
    would, for drawings, which are all equally sharp, make the faintest softness outweigh everything.
    """

    def __init__(self, images: torch.Tensor, dimensions: int = 64):
        *blocks, grain = _describe_all(images)
        self.means = [block.mean(dim=0) for block in blocks]
        self.scales = [block.var(dim=0, unbiased=False).sum().sqrt().clamp(min=1e-6) for block in blocks]
        self.grain = grain.mean(dim=0)
        joined = self._join(blocks)
        variance, axes = torch.linalg.eigh(joined.T @ joined / len(joined))  # ascending
        kept = max(1, min(dimensions, len(images) - 1))
        deviation = variance.flip(0)[:kept].clamp(min=1e-12).sqrt()
        self.axes = axes.flip(1)[:, :kept] / deviation.clamp(min=1e-3 * deviation[0]).sqrt()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        *blocks, grain = _describe_all(images)
        return torch.cat([self._join(blocks) @ self.axes, grain - self.grain], dim=1)

    def _join(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([(b - mean) / scale for b, mean, scale in zip(blocks, self.means, self.scales)], dim=1)


def _describe_all(images: torch.Tensor) -> list[torch.Tensor]:
    """`describe` in batches, so that memory holds the numbers of all pictures but the pixels of a few."""
    return [torch.cat(block) for block in zip(*(describe(batch) for batch in images.split(64)))]
