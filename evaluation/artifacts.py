"""Artifacts of augmentation and sampling: black corners, collapse to black, a background that is not white.

    find_artifacts(images)["black_corner"].float().mean()       # images uint8 [N, 3, S, S]: the fraction that has it
"""

from __future__ import annotations

import torch

DARK = 0.25  # grey values, from 0 (black) to 1 (white)
WHITE_BORDER = 0.95
WHITE_CORNER = 0.9


def find_artifacts(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Find the images, uint8 [N, 3, S, S], with each artifact: bool [N] each.

    A corner is a square with sides of S / 16 pixels. Grey values are means over the channels, from 0 to 1.

        black_corner: some corner has a mean below 0.25.
        collapsed: the whole image has a mean below 0.25.
        clean: no artifact, but a white background: the median of the outermost pixels is above 0.95, and every corner
            has a mean above 0.9.
    """
    grey = torch.cat([batch.float().mean(dim=1) for batch in images.split(256)]) / 255
    corners = _corner_means(grey)
    return {
        "black_corner": (corners < DARK).any(dim=1),
        "collapsed": grey.mean(dim=(1, 2)) < DARK,
        "clean": (border_pixels(grey).median(dim=1).values > WHITE_BORDER) & (corners > WHITE_CORNER).all(dim=1),
    }


def border_pixels(grey: torch.Tensor) -> torch.Tensor:
    """Return the outermost pixels of images [N, S, S] as [N, 4 S - 4]."""
    return torch.cat([grey[:, 0], grey[:, -1], grey[:, 1:-1, 0], grey[:, 1:-1, -1]], dim=1)


def _corner_means(grey: torch.Tensor) -> torch.Tensor:
    """Return the mean of each of the four corners of images [N, S, S] as [N, 4]."""
    side = max(1, grey.shape[-1] // 16)
    first, last = slice(side), slice(-side, None)
    corners = [grey[:, rows, columns] for rows in (first, last) for columns in (first, last)]
    return torch.stack([corner.mean(dim=(1, 2)) for corner in corners], dim=1)
