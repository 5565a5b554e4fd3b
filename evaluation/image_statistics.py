"""Statistics of single images, to compare samples with the data: brightness, colours, tilt.

    image_statistics(images)["saturation"].mean()               # images uint8 [N, 3, S, S]

A difference between samples and data shows that training or sampling has left a trace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from evaluation.artifacts import border_pixels
from evaluation.memorization import warp

ANGLES = torch.arange(-20.0, 21.0, 4.0)  # degrees
SHIFTS = (-0.06, -0.03, 0.0, 0.03, 0.06)  # fractions of the side
TILT_SIZE = 32  # side of the images for the tilt, pixels


def image_statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute statistics of images, uint8 [N, 3, S, S]: float32 [N] each.

        border: median brightness of the outermost pixels, 0 ... 1.
        brightness, contrast: mean and standard deviation of the grey image, 0 ... 1.
        saturation: largest minus smallest of red, green and blue, averaged over the image, 0 ... 1.
        red_to_blue: mean red minus mean blue, -1 ... 1; above 0 is warm.
        tilt: the rotation, 0 ... 20 degrees, after which the left half mirrors the right half best. No image is quite
            symmetric, so the data do not have 0 either; leaked rotations increase it.
    """
    parts = [_batch_statistics(batch) for batch in images.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _batch_statistics(images: torch.Tensor) -> dict[str, torch.Tensor]:
    x = images.float() / 255
    grey = x.mean(dim=1)
    return {
        "border": border_pixels(grey).median(dim=1).values,
        "brightness": grey.mean(dim=(1, 2)),
        "contrast": grey.flatten(1).std(dim=1),
        "saturation": (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2)),
        "red_to_blue": (x[:, 0] - x[:, 2]).mean(dim=(1, 2)),
        "tilt": _tilt(x),
    }


def _tilt(x: torch.Tensor) -> torch.Tensor:
    """Return the angle [N] at which images differ least from their mirror image, wherever their axis is."""
    side = min(TILT_SIZE, x.shape[-1])
    small = F.interpolate(x, size=(side, side), mode="area")
    differences = []
    for angle in ANGLES.tolist():
        rotated = [warp(small, torch.tensor([1.0, angle, shift, 0.0]).expand(len(x), 4)) for shift in SHIFTS]
        asymmetry = [(y - y.flip(-1)).square().mean(dim=(1, 2, 3)) for y in rotated]
        differences.append(torch.stack(asymmetry).amin(dim=0))
    return ANGLES[torch.stack(differences).argmin(dim=0)].abs()
