"""A feature space that is written down: what a picture looks like in a few hundred numbers, without a trained network.

    space = FeatureSpace(real_images)          # images uint8 [N, 3, S, S]
    f = space(images)                          # float32 [M, 64]: near means alike

Three descriptions are put side by side (`describe`): where which colours are, which colours there are at all, and how
much edge of which direction is where, at three scales. They are the classical ones from before trained features
(colour layout, colour histogram, and the oriented gradients of Dalal & Triggs 2005), chosen since each answers one of
the questions here: layout and edges tell shapes apart, colours tell types apart, and the edges' strength at the finest
scale, which is not normalised away as Dalal & Triggs do, tells blur and noise from a clean picture.

Each description gets the same weight; then the 64 directions in which real pictures differ most are kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CELLS = 4  # edges are counted in 4 x 4 cells
DIRECTIONS = 6
SHADES = 5  # of each of red, green and blue, in the histogram


def describe(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The three descriptions of pictures uint8 [N, 3, S, S], S at least 8: float32 [N, 192], [N, 125] and [N, 288]."""
    x = images.float() / 255
    return F.adaptive_avg_pool2d(x, 8).flatten(1), _colours(x), torch.cat(_edges(x), dim=1)


def _colours(x: torch.Tensor) -> torch.Tensor:
    """A histogram of 5 x 5 x 5 colours, each pixel shared between the nearest shades; square roots of the shares."""
    place = F.adaptive_avg_pool2d(x, min(32, x.shape[-1])).flatten(2) * (SHADES - 1)  # [N, 3, P], 0 ... 4
    shades = torch.arange(SHADES, device=x.device).view(1, 1, SHADES, 1)
    weight = (1 - (place[:, :, None] - shades).abs()).clamp(min=0)  # [N, 3, 5, P]
    red, green, blue = weight.unbind(1)
    red_green = (red[:, :, None] * green[:, None]).flatten(1, 2)  # [N, 25, P]
    return (red_green @ blue.transpose(1, 2)).flatten(1).div(place.shape[-1]).sqrt()


def _edges(x: torch.Tensor) -> list[torch.Tensor]:
    """At three scales, how much edge of each of 6 directions each of 4 x 4 cells has: square roots of the strength."""
    scales = []
    for _ in range(3):
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
        scales.append(torch.stack(cells, dim=1).flatten(1).sqrt())
        x = F.avg_pool2d(x, 2) if x.shape[-1] >= 8 else x
    return scales


class FeatureSpace:
    """The map from pictures to features, fitted to real ones: `space(images)` -> float32 [N, dimensions].

    Each description is centred and scaled to a total variance of 1 over the real pictures, so that none outweighs the
    others by its units. Of the three together the principal components are kept, each divided by the square root of
    its deviation: halfway between leaving them, where a few broad differences drown blur and noise, and making all
    deviations 1, where the faintest component counts as much as the first.
    """

    def __init__(self, images: torch.Tensor, dimensions: int = 64):
        blocks = _describe_all(images)
        self.means = [block.mean(dim=0) for block in blocks]
        self.scales = [block.var(dim=0).sum().sqrt().clamp(min=1e-6) for block in blocks]
        joined = self._join(blocks)
        variance, axes = torch.linalg.eigh(joined.T @ joined / len(joined))  # ascending
        kept = min(dimensions, len(images) - 1)
        deviation = variance.flip(0)[:kept].clamp(min=1e-12).sqrt()
        self.axes = axes.flip(1)[:, :kept] / deviation.clamp(min=1e-3 * deviation[0]).sqrt()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._join(_describe_all(images)) @ self.axes

    def _join(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([(b - mean) / scale for b, mean, scale in zip(blocks, self.means, self.scales)], dim=1)


def _describe_all(images: torch.Tensor) -> list[torch.Tensor]:
    """`describe` in batches, so that memory holds the numbers of all pictures but the pixels of a few."""
    return [torch.cat(block) for block in zip(*(describe(batch) for batch in images.split(64)))]
