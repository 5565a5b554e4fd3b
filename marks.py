"""What augmentation and sampling leave behind on pictures: black corners, collapse, other colours, tilt.

    marks(images)["black_corner"].float().mean()       # images uint8 [N, 3, S, S]: the share that has it
    looks(images)["saturation"].mean()                 # numbers of each picture, to compare with those of the data
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from copies import warp

ANGLES = torch.arange(-20.0, 21.0, 4.0)  # degrees
SHIFTS = (-0.06, -0.03, 0.0, 0.03, 0.06)  # shares of the side


def marks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which pictures, uint8 [N, 3, S, S], show which mark: bool tensors [N].

    A corner is a square with sides of S/16 pixels; values are means over the channels, from 0 (black) to 1 (white).
        black_corner: some corner has a mean below 0.25.
        collapsed: the whole picture has a mean below 0.25.
        clean: the median of the outermost pixels is above 0.95 and every corner has a mean above 0.9.
    """
    x = torch.cat([batch.float().mean(dim=1) for batch in images.split(256)]) / 255
    k = max(1, x.shape[-1] // 16)
    corners = torch.stack([x[:, rows, columns].mean(dim=(1, 2)) for rows in (slice(k), slice(-k, None))
                           for columns in (slice(k), slice(-k, None))], dim=1)
    border = torch.cat([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], dim=1)
    return {
        "black_corner": (corners < 0.25).any(dim=1),
        "collapsed": x.mean(dim=(1, 2)) < 0.25,
        "clean": (border.median(dim=1).values > 0.95) & (corners > 0.9).all(dim=1),
    }


def looks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Numbers that say how pictures, uint8 [N, 3, S, S], look: float32 [N] each. Where samples have drifted from the
    data in one of them, training or sampling has left a mark.

        border: brightness of the outermost pixels, their median, 0 ... 1.
        brightness, contrast: mean and standard deviation of the grey picture, 0 ... 1.
        saturation: the largest less the smallest of red, green and blue, mean over the picture, 0 ... 1.
        red_to_blue: mean red less mean blue, -1 ... 1: warm or cold.
        tilt: degrees, 0 ... 20, that the picture must be turned until its left half mirrors its right half best.
            Nothing is quite symmetric, so it is not 0 for the data either; rotations that leak make it larger.
    """
    parts = [_looks(batch) for batch in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _looks(images: torch.Tensor) -> dict[str, torch.Tensor]:
    x = images.float() / 255
    grey = x.mean(dim=1)
    border = torch.cat([grey[:, 0], grey[:, -1], grey[:, 1:-1, 0], grey[:, 1:-1, -1]], dim=1)
    return {
        "border": border.median(dim=1).values,
        "brightness": grey.mean(dim=(1, 2)),
        "contrast": grey.flatten(1).std(dim=1),
        "saturation": (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        "red_to_blue": (x[:, 0] - x[:, 2]).mean(dim=(1, 2)),
        "tilt": _tilt(x),
    }


def _tilt(x: torch.Tensor) -> torch.Tensor:
    """The angle at which the difference between a picture and its mirror image is smallest, wherever its middle is."""
    side = min(32, x.shape[-1])
    small = F.interpolate(x, size=(side, side), mode="area")
    differences = []
    for angle in ANGLES.tolist():
        turned = [warp(small, torch.tensor([1.0, angle, shift, 0.0]).expand(len(x), 4)) for shift in SHIFTS]
        differences.append(torch.stack([(y - y.flip(-1)).square().mean(dim=(1, 2, 3)) for y in turned]).amin(dim=0))
    return ANGLES[torch.stack(differences).argmin(dim=0)].abs()
